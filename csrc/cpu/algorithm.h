// The algorithms of a convolution, and which of them is used.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/kernel.h"
#include "cpu/amx.h"

namespace fastgen::cpu {

// winograd_{m}x{r} computes tiles of m x m outputs from r x r taps. `rows`, for few output channels: one matrix product
// computes the taps of a kernel row as if they were output channels, and the output is their sum. direct_bf16 and
// rows_bf16, for bfloat16 only, multiply pairs of channels with one instruction that not all processors have. Plan
// files store these numbers, so a new algorithm is added at the end. amx_*: products of tiles of bfloat16; for float32,
// each number is the sum of two (bf16x3: three products) or three (bf16x6) of them.
enum class Algorithm {
  direct,
  rows,
  winograd_4x2,
  winograd_4x3,
  direct_bf16,
  rows_bf16,
  amx_bf16,
  amx_bf16x3,
  amx_bf16x6,
  end
};
constexpr int64_t kAlgorithms = static_cast<int64_t>(Algorithm::end);

constexpr bool is_winograd(Algorithm algorithm) {
  return algorithm == Algorithm::winograd_4x2 || algorithm == Algorithm::winograd_4x3;
}
constexpr bool is_bf16_dot(Algorithm algorithm) {
  return algorithm == Algorithm::direct_bf16 || algorithm == Algorithm::rows_bf16;
}
constexpr bool is_amx(Algorithm algorithm) {
  return algorithm == Algorithm::amx_bf16 || algorithm == Algorithm::amx_bf16x3 || algorithm == Algorithm::amx_bf16x6;
}
// Into how many bfloat16 an amx_* algorithm splits each number.
constexpr int parts_of(Algorithm algorithm) {
  return algorithm == Algorithm::amx_bf16 ? 1 : algorithm == Algorithm::amx_bf16x3 ? 2 : 3;
}
// Whether an algorithm is for tensors of bfloat16 only.
constexpr bool needs_bf16(Algorithm algorithm) { return is_bf16_dot(algorithm) || algorithm == Algorithm::amx_bf16; }
// The same algorithm for float32.
constexpr Algorithm without_bf16_dot(Algorithm algorithm) {
  return algorithm == Algorithm::direct_bf16 ? Algorithm::direct
         : algorithm == Algorithm::rows_bf16 ? Algorithm::rows
                                             : algorithm;
}

// The algorithms that can compute a convolution; direct is always one.
inline bool can_run(Algorithm algorithm, const Geometry& conv) {
  const bool plain = conv.kh == conv.kw && conv.stride[0] == conv.stride[1] && conv.groups == 1 &&
                     conv.dilation[0] == 1 && conv.dilation[1] == 1;
  switch (algorithm) {
    case Algorithm::direct: return true;
    case Algorithm::direct_bf16: return conv.ic / conv.groups % 2 == 0;
    case Algorithm::rows_bf16:
      if (conv.ic % 2) return false;
      [[fallthrough]];
    case Algorithm::rows: return conv.groups == 1 && conv.oc <= 4;
    case Algorithm::winograd_4x2: return plain && (conv.kh == 4 || conv.kh == 3) && conv.stride[0] == 2;
    case Algorithm::winograd_4x3: return plain && conv.kh == 3 && conv.stride[0] == 1;
    case Algorithm::amx_bf16:
    case Algorithm::amx_bf16x3:
    case Algorithm::amx_bf16x6: return conv.groups == 1;
    case Algorithm::end: break;
  }
  return false;
}

// FASTGEN_WINOGRAD: "0" turns Winograd's algorithms off, "always" uses them wherever they can run, even where they are
// slower (for tests).
inline bool winograd_is(const char* value) {
  const char* requested = getenv("FASTGEN_WINOGRAD");
  return requested && !strcmp(requested, value);
}

enum class UseWinograd { where_fastest, never, always };
inline UseWinograd winograd_of_environment() {
  return winograd_is("0")        ? UseWinograd::never
         : winograd_is("always") ? UseWinograd::always
                                 : UseWinograd::where_fastest;
}

// The algorithm that was measured to be the fastest (benchmarks/NOTES.md). least: for a 3x3 kernel with stride 2, if
// the smaller of the two images has fewer rows than this, Winograd's algorithm saves less than incomplete tiles at the
// edges cost.
inline Algorithm choose(const Geometry& conv, const Epilogue& epilogue, UseWinograd use = winograd_of_environment(),
                        int64_t least = 8) {
  const bool never = epilogue.dtype == DType::float64 || use == UseWinograd::never;
  const bool always = use == UseWinograd::always, wide = conv.ic >= 16 && conv.oc >= 16;
  const int64_t pixels = epilogue.n * conv.oh * conv.ow;
  const bool large = conv.kh == 4 || std::min(conv.ih, conv.oh) >= least;
  if (!never && can_run(Algorithm::winograd_4x2, conv) && (always || (wide && large && pixels >= 1024)))
    return Algorithm::winograd_4x2;
  if (!never && can_run(Algorithm::winograd_4x3, conv) && (always || (wide && pixels >= 256 && conv.oh >= 8)))
    return Algorithm::winograd_4x3;
  if (!epilogue.batch_stats && can_run(Algorithm::rows, conv)) return Algorithm::rows;
  return Algorithm::direct;
}

// The same for the gradient of the weight: a Winograd algorithm or direct. `output` describes the output's gradient.
inline Algorithm choose_for_weight_grad(const Geometry& conv, const Epilogue& output,
                                        UseWinograd use = winograd_of_environment()) {
  const Algorithm algorithm = choose(conv, output, use, 4);
  return is_winograd(algorithm) ? algorithm : Algorithm::direct;
}

// Whether a bfloat16 convolution, or its weight's gradient, multiplies tiles.
inline bool uses_amx(const Geometry& conv, const Epilogue& epilogue) {
  return epilogue.dtype == DType::bfloat16 && amx() != Amx::none && can_run(Algorithm::amx_bf16, conv) &&
         !winograd_is("always");
}

// Whether a bfloat16 convolution multiplies pairs of channels with one instruction.
inline bool uses_bf16_dot(const Geometry& conv, const Epilogue& epilogue) {
  return epilogue.dtype == DType::bfloat16 && can_dot_bf16() && can_run(Algorithm::direct_bf16, conv) && conv.oc > 4 &&
         !winograd_is("always");
}

// The number of floats in the Winograd transform of all weights.
inline int64_t transformed_size(const Geometry& conv) { return conv.ic * conv.oc * (conv.stride[0] == 2 ? 100 : 36); }

// Whether each band of the output transforms the weights again. It does where the transformed weights are too large to
// keep, or are used for few pixels (of this call, or in total): they would then be read from memory about as often as
// they are transformed.
inline bool transforms_in_bands(const Geometry& conv, int64_t pixels) {
  return transformed_size(conv) * int64_t(sizeof(float)) > (16 << 20) || (conv.stride[0] == 1 && pixels <= 1600);
}

// Bytes of the packed weights of a PackedConvolution.
inline int64_t packed_bytes(Algorithm algorithm, const Geometry& conv) {
  const int64_t plain = conv.ic / conv.groups * conv.oc * conv.kh * conv.kw;
  if (is_amx(algorithm)) return plain * 2 * parts_of(algorithm);
  if (is_bf16_dot(algorithm)) return plain * 2;
  const bool transformed = is_winograd(algorithm) && !transforms_in_bands(conv, std::numeric_limits<int64_t>::max());
  return 4 * (transformed ? transformed_size(conv) : plain);
}

}  // namespace fastgen::cpu
