#include "cpu/convolution.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/convolution.cpp"
#include "cpu/isa.h"

#include "cpu/execute.h"

namespace fastgen::cpu::FASTGEN_ISA {

#if FASTGEN_HAS_DOT
template <int vectors>
void convolve_by_bf16_dot(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                          const ParallelFor& parallel) {
  const auto pixels = pixels_first<BFloat16>(static_cast<const BFloat16*>(tensors.x), epilogue.n, conv.ic,
                                             conv.ih * conv.iw, conv.x_channels_last, parallel);
  Geometry pairs = conv;
  pairs.ic /= 2;
  const Packed<float, vectors> packed{
      direct(pairs),
      pack_weights<true>(conv, vectors * Vector<float>::size, static_cast<const BFloat16*>(tensors.weight), parallel)};
  const auto x = packed.pixels(pairs, epilogue.n, reinterpret_cast<const float*>(pixels.get()), true, parallel);
  run_packed<true>(packed, pairs, epilogue, x.get(), static_cast<BFloat16*>(tensors.pre),
                   static_cast<BFloat16*>(tensors.out), parallel);
}
#endif

inline void convolve_by_tiles(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                              const ParallelFor& parallel) {
  using T = BFloat16;
  const AmxConvolution how(conv, 1);
  const auto x = pixels_first<T>(static_cast<const T*>(tensors.x), epilogue.n, conv.ic, conv.ih * conv.iw,
                                 conv.x_channels_last, parallel);
  const auto packed = how.pack(static_cast<const T*>(tensors.weight), parallel);
  run_amx<1>(how, packed.get(), epilogue, x.get(), static_cast<T*>(tensors.pre), static_cast<T*>(tensors.out),
             parallel);
}

template <class T, int vectors>
void convolve(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
              const ParallelFor& parallel) {
  const auto packed = pack<T, vectors>(conv, choose(conv, epilogue), epilogue.n * epilogue.s,
                                       static_cast<const T*>(tensors.weight), parallel);
  const auto x = packed.pixels(conv, epilogue.n, static_cast<const T*>(tensors.x), conv.x_channels_last, parallel);
  run_packed(packed, conv, epilogue, x.get(), static_cast<T*>(tensors.pre), static_cast<T*>(tensors.out), parallel);
}

template <class T>
void convolve_as(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                 const ParallelFor& parallel) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (uses_amx(conv, epilogue)) return convolve_by_tiles(conv, epilogue, tensors, parallel);
#if FASTGEN_HAS_DOT
  if constexpr (std::is_same_v<T, BFloat16>)
    if (uses_bf16_dot(conv, epilogue)) {
      const bool narrow = is_narrow<float>(conv, Algorithm::direct);
      return (narrow ? convolve_by_bf16_dot<1> : convolve_by_bf16_dot<2>)(conv, epilogue, tensors, parallel);
    }
#endif
  const bool narrow = is_narrow<Acc<T>>(conv, choose(conv, epilogue));
  (narrow ? convolve<T, 1> : convolve<T, 2>)(conv, epilogue, tensors, parallel);
}

inline void convolution_norm_act(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                                 const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(epilogue.dtype, convolve_as, conv, epilogue, tensors, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void convolution_norm_act(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                          const ParallelFor& parallel) {
  FASTGEN_DISPATCH(convolution_norm_act, conv, epilogue, tensors, parallel)
}

}  // namespace fastgen::cpu
#endif
