#include "cpu/convolution.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/convolution_weight_grad.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/axis.h"
#include "cpu/winograd_transform.h"
#include "cpu/weight_gradient.h"
#include "cpu/band.h"
#include "cpu/amx_tiles.h"
#include "cpu/amx_axis.h"
#include "cpu/amx_weights.h"
#include "cpu/amx_lines.h"
#include "cpu/amx_weight_gradient.h"

namespace fastgen::cpu::FASTGEN_ISA {

template <int m_, int r_>
struct WinogradSize {
  static constexpr int m = m_, r = r_;
};

// The strided convolution of the same weight from the larger image to the smaller.
inline Geometry from_big_to_small(Geometry conv) {
  if (conv.transposed) {
    std::swap(conv.ic, conv.oc);
    std::swap(conv.ih, conv.oh);
    std::swap(conv.iw, conv.ow);
    conv.transposed = false;
  }
  return conv;
}

template <class T>
void weight_grad(const Geometry& conv, const Epilogue& output, const void* grad_, const void* x_, void* out,
                 const ParallelFor& parallel) {
  using A = Acc<T>;
  const int64_t* const s = conv.weight_strides;
  if constexpr (std::is_same_v<T, BFloat16>)
    if (uses_amx(conv, output))
      return with_tiles([&](auto* kind) {
        const auto x = pixels_first<T>(static_cast<const T*>(x_), output.n, conv.ic, conv.ih * conv.iw,
                                       conv.x_channels_last, parallel);
        const auto grad =
            pixels_first<T>(static_cast<const T*>(grad_), output.n, output.c, output.s, output.channels_last, parallel);
        const AmxWeightGradient<std::remove_pointer_t<decltype(kind)>, 1> gradient{
            AmxConvolution(from_big_to_small(conv), 1), output.n};
        gradient.run((conv.transposed ? grad : x).get(), (conv.transposed ? x : grad).get(), static_cast<T*>(out),
                     {s[1], s[0], s[2], s[3]}, parallel);
      });

  if constexpr (std::is_same_v<A, float>) {
    const auto winograd = [&](auto tile) {
      constexpr int m = decltype(tile)::m, r = decltype(tile)::r;
      const auto x = pixels_first<Stored<T>>(static_cast<const T*>(x_), output.n, conv.ic, conv.ih * conv.iw,
                                             conv.x_channels_last, parallel);
      const auto grad = pixels_first<Stored<T>>(static_cast<const T*>(grad_), output.n, output.c, output.s,
                                                output.channels_last, parallel);
      WinogradWeightGradient<A, m, r, 2>{
          output.n, conv.ic, conv.ih, conv.iw, output.c, winograd_axis_of(conv, 0), winograd_axis_of(conv, 1)}
          .run(x.get(), grad.get(), static_cast<T*>(out),
               {s[conv.transposed ? 0 : 1], s[conv.transposed ? 1 : 0], s[2], s[3]}, parallel);
    };
    switch (choose_for_weight_grad(conv, output)) {
      case Algorithm::winograd_4x2: return winograd(WinogradSize<4, 2>{});
      case Algorithm::winograd_4x3: return winograd(WinogradSize<4, 3>{});
      default: break;
    }
  }

  const auto x =
      pixels_first<A>(static_cast<const T*>(x_), output.n, conv.ic, conv.ih * conv.iw, conv.x_channels_last, parallel);
  const auto grad =
      pixels_first<A>(static_cast<const T*>(grad_), output.n, output.c, output.s, output.channels_last, parallel);
  DirectWeightGradient<A> direct{output.n, conv.ih, conv.iw, conv.ic, conv.oh, conv.ow,     output.c,
                                 conv.kh,  conv.kw, {},      {},      {},      conv.groups, conv.reflect};
  if (conv.transposed) {
    std::swap(direct.bh, direct.sh);
    std::swap(direct.bw, direct.sw);
    std::swap(direct.bc, direct.sc);
  }
  std::copy_n(conv.stride, 2, direct.stride);
  std::copy_n(conv.padding, 2, direct.padding);
  std::copy_n(conv.dilation, 2, direct.dilation);
  direct.run((conv.transposed ? grad : x).get(), (conv.transposed ? x : grad).get(), static_cast<T*>(out),
             {s[1], s[0], s[2], s[3]}, parallel);
}

inline void convolution_weight_grad(const Geometry& conv, const Epilogue& output, const void* grad, const void* x,
                                    void* out, const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(output.dtype, weight_grad, conv, output, grad, x, out, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void convolution_weight_grad(const Geometry& conv, const Epilogue& output, const void* grad, const void* x, void* out,
                             const ParallelFor& parallel) {
  FASTGEN_DISPATCH(convolution_weight_grad, conv, output, grad, x, out, parallel)
}

}  // namespace fastgen::cpu
#endif
