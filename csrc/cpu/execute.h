// A convolution with packed weights: which algorithm runs, what it reads, and the passes over the output. Included once
// per instruction set (see isa.h); it includes the headers of the algorithms.
#include "cpu/store.h"
#include "cpu/block.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/axis.h"
#include "cpu/band.h"
#include "cpu/epilogue.h"
#include "cpu/direct.h"
#include "cpu/rows.h"
#include "cpu/winograd_transform.h"
#include "cpu/winograd.h"
#include "cpu/amx_tiles.h"
#include "cpu/amx_axis.h"
#include "cpu/amx_weights.h"
#include "cpu/amx_lines.h"
#include "cpu/amx_convolution.h"

namespace fastgen::cpu::FASTGEN_ISA {

// A convolution prepared for any number of images: its algorithm, and its weights packed for it.
template <class A, int vectors>
struct Packed {
  using Fast = std::variant<Direct, Rows, Winograd<float, 4, 2, vectors>, Winograd<float, 4, 3, vectors>>;
  std::conditional_t<std::is_same_v<A, float>, Fast, std::variant<Direct, Rows>> how;
  Buffer<A> weights;

  // x in the form that `how` reads.
  template <class T>
  Pixels<A> pixels(const Geometry& conv, int64_t n, const T* x, bool channels_last, const ParallelFor& parallel) const {
    auto plain = pixels_first<A>(x, n, conv.ic, conv.ih * conv.iw, channels_last, parallel);
    const Direct* const direct = std::get_if<Direct>(&how);
    if (!direct || direct->joined == 1) return plain;
    auto copy = with_edges(plain.get(), n * conv.ih, conv.iw, conv.ic, direct->edge, conv.reflect, parallel);
    return {copy.get(), std::move(copy)};
  }
};

// pixels: the number of output pixels that the packed weights will be used for.
template <class T, int vectors>
Packed<Acc<T>, vectors> pack(const Geometry& conv, Algorithm algorithm, int64_t pixels, const T* weight,
                             const ParallelFor& parallel) {
  using A = Acc<T>;
  constexpr int64_t width = vectors * Vector<A>::size;
  if constexpr (std::is_same_v<A, float>) {
    const auto winograd = [&](auto plan) {
      const WeightStrides s = weight_strides(conv);
      const int64_t strides[4] = {s.depth, s.channel, s.row, s.column};
      auto weights = scratch<A>(plan.packed_size());
      plan.pack(weight, strides, weights.get(), parallel);
      return Packed<A, vectors>{std::move(plan), std::move(weights)};
    };
    const bool expand = transforms_in_bands(conv, pixels);
    if (algorithm == Algorithm::winograd_4x2)
      return winograd(Winograd<A, 4, 2, vectors>{conv.ic, conv.ih, conv.iw, conv.oc, winograd_axis_of(conv, 0),
                                                 winograd_axis_of(conv, 1), expand});
    if (algorithm == Algorithm::winograd_4x3)
      return winograd(Winograd<A, 4, 3, vectors>{conv.ic, conv.ih, conv.iw, conv.oc, winograd_axis_of(conv, 0),
                                                 winograd_axis_of(conv, 1), expand});
  }
  if (algorithm == Algorithm::rows)
    return {Rows(axis_of(conv, 0), axis_of(conv, 1), conv.oc), pack_rows(conv, width, weight)};
  return {direct(conv), pack_weights(conv, width, weight, parallel)};
}

// Whether one vector is wide enough for the output channels (for Rows: for those of a row of taps).
template <class A>
bool is_narrow(const Geometry& conv, Algorithm algorithm) {
  const int64_t columns = algorithm == Algorithm::rows ? conv.kw * conv.oc : conv.oc / conv.groups;
  return columns <= Vector<A>::size;
}

// Computes a convolution by compute(output) with its epilogue. If the epilogue needs statistics of the output, the
// convolution computes them, and the rest of the epilogue is a second pass over the output.
template <int vectors, class T, class Compute>
void run_with_epilogue(const Geometry& conv, const Epilogue& epilogue, T* pre, T* out, const ParallelFor& parallel,
                       const Compute& compute) {
  using A = Acc<T>;
  const bool later = epilogue.normalize && epilogue.batch_stats;
  T* const sum = later && !pre ? out : pre;
  std::vector<Moments<double>> parts;
  const auto affine = epilogue.normalize && !later ? std::make_unique<Affine<A>>(epilogue) : nullptr;
  Output<T, vectors> output{conv,
                            epilogue,
                            static_cast<const A*>(epilogue.bias),
                            affine.get(),
                            later ? nullptr : static_cast<const T*>(epilogue.residual),
                            sum,
                            later ? nullptr : out,
                            later ? &parts : nullptr};
  compute(output);
  if (!later) return;
  merge_moments(epilogue, parts, output.bands_per_image(), epilogue.mean, epilogue.var);
  norm_act_apply(epilogue, sum, out, parallel);
}

// x: from Packed::pixels.
template <bool dot = false, class T, int vectors>
void run_packed(const Packed<Acc<T>, vectors>& packed, const Geometry& conv, const Epilogue& epilogue, const Acc<T>* x,
                T* pre, T* out, const ParallelFor& parallel) {
  run_with_epilogue<vectors>(conv, epilogue, pre, out, parallel, [&](auto& output) {
    std::visit([&](const auto& algorithm) { run<dot>(output, algorithm, x, packed.weights.get(), parallel); },
               packed.how);
  });
}

// x: (n, h, w, c). packed: from how.pack.
template <int parts, class S, class T>
void run_amx(const AmxConvolution& how, const uint32_t* packed, const Epilogue& epilogue, const S* x, T* pre, T* out,
             const ParallelFor& parallel) {
  with_tiles([&](auto* kind) {
    using Kind = std::remove_pointer_t<decltype(kind)>;
    const auto compute = [&](auto& output) { run_tiles<Kind, parts>(output, how, x, packed, parallel); };
    constexpr int half = 16 / Vector<float>::size;
    if (how.width() == 16) run_with_epilogue<half>(how.conv, epilogue, pre, out, parallel, compute);
    else run_with_epilogue<2 * half>(how.conv, epilogue, pre, out, parallel, compute);
  });
}

}  // namespace fastgen::cpu::FASTGEN_ISA
