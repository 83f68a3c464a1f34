// y = norm_act(convolution(x, weight) + bias), the convolution strided or transposed.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/norm_act.h"

namespace fastgen::cpu {

// Winograd's algorithms have tiles of m x m outputs of r x r taps. `rows`, for few output channels: the taps of a row
// of the kernel are output channels of one matrix product, and their sums the output. direct_bf16 and rows_bf16, for
// bfloat16 alone, multiply pairs of channels by one instruction that not all processors have.
enum class Algorithm { direct, rows, winograd_4x2, winograd_4x3, direct_bf16, rows_bf16 };
constexpr int64_t kAlgorithms = 6;

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
  }
  return false;
}

// FASTGEN_WINOGRAD: "0" turns Winograd's off, "always" uses them wherever they can be used, whatever it costs (for
// tests).
inline bool winograd_is(const char* wanted) {
  const char* asked = getenv("FASTGEN_WINOGRAD");
  return asked && !strcmp(asked, wanted);
}

// The one to use: where it was measured to be the fastest (benchmarks/NOTES.md). least: lines of the smaller side's
// images from which on a 3x3 kernel of stride 2 saves more by Winograd's algorithm than the tiles' edges cost.
inline Algorithm choose(const Geometry& conv, const Epilogue& op, int64_t least = 8) {
  const bool never = op.dtype == DType::float64 || winograd_is("0"), always = winograd_is("always");
  const bool wide = conv.ic >= 16 && conv.oc >= 16;
  const int64_t pixels = op.n * conv.oh * conv.ow;
  const bool large = conv.kh == 4 || std::min(conv.ih, conv.oh) >= least;
  if (!never && can_run(Algorithm::winograd_4x2, conv) && (always || (wide && large && pixels >= 1024)))
    return Algorithm::winograd_4x2;
  if (!never && can_run(Algorithm::winograd_4x3, conv) && (always || (wide && pixels >= 256 && conv.oh >= 8)))
    return Algorithm::winograd_4x3;
  if (!op.batch_stats && can_run(Algorithm::rows, conv)) return Algorithm::rows;
  return Algorithm::direct;
}

// Whether a convolution of bfloat16 multiplies pairs of channels by one instruction instead.
inline bool in_pairs(const Geometry& conv, const Epilogue& op) {
  return op.dtype == DType::bfloat16 && can_dot_bf16() && can_run(Algorithm::direct_bf16, conv) && conv.oc > 4 &&
         !winograd_is("always");
}

// Floats of all weights in Winograd's transform.
inline int64_t transformed_size(const Geometry& conv) { return conv.ic * conv.oc * (conv.stride[0] == 2 ? 100 : 36); }

// Whether each band of the output transforms the weights anew: where transformed ones are too many to be kept; or where
// they serve few pixels (of one call, or all that there will be), as they then are read from memory about as often as
// transformed.
inline bool transforms_in_bands(const Geometry& conv, int64_t pixels) {
  return transformed_size(conv) * int64_t(sizeof(float)) > (16 << 20) || (conv.stride[0] == 1 && pixels <= 1600);
}

// Bytes of the packed weights of a PackedConvolution.
inline int64_t packed_bytes(Algorithm algorithm, const Geometry& conv) {
  const int64_t plain = conv.ic / conv.groups * conv.oc * conv.kh * conv.kw;
  if (algorithm == Algorithm::direct_bf16 || algorithm == Algorithm::rows_bf16) return plain * 2;
  const bool winograd = algorithm == Algorithm::winograd_4x2 || algorithm == Algorithm::winograd_4x3;
  return 4 *
         (winograd && !transforms_in_bands(conv, std::numeric_limits<int64_t>::max()) ? transformed_size(conv) : plain);
}

void convolution_norm_act(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
                          const ParallelFor& parallel);

// The gradient of the weight, `out` with conv.weight_strides, from the gradient of the output (no norm), which `op`
// describes.
void convolution_weight_grad(const Geometry& conv, const Epilogue& op, const void* grad, const void* x, void* out,
                             const ParallelFor& parallel);

// A convolution of float32 or bfloat16 whose weights are packed once, for any number of images.
class PackedConvolution {
 public:
  virtual ~PackedConvolution() = default;
  // x (n, ih, iw, ic) and out of op.dtype, bfloat16 if the algorithm asks for it.
  virtual void run(const Epilogue& op, const void* x, void* out, const ParallelFor& parallel) const = 0;
};
std::unique_ptr<PackedConvolution> pack_convolution(const Geometry& conv, Algorithm algorithm, const float* weight,
                                                    const ParallelFor& parallel);

}  // namespace fastgen::cpu
