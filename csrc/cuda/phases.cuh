// Which input pixels and taps of a convolution, strided or transposed, contribute to an output pixel.
#pragma once

#include <numeric>

#include "shared/problems.h"

namespace fastgen::cuda::convolution {

// One dimension of the images. Tap t of output pixel o reads input pixel o * stride - padding + t * dilation;
// transposed: (o + padding - t * dilation) / stride, where that is whole.
struct Axis {
  int in, out, kernel, stride, padding, dilation;
  bool transposed;
  int phases;
  int in_step, out_step;   // distance between output pixels of a phase, in the input and in the output
  int tap_step, tap_move;  // distance between taps of a phase, in taps and in the input

  int64_t max_pixels() const { return ceil_div(out, out_step); }  // of any phase
  int64_t max_taps() const { return ceil_div(kernel, tap_step); }
};

inline Axis make_axis(bool transposed, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                      int64_t dilation) {
  // An input of one pixel contributes to each output pixel through one tap, whatever the stride. With this stride each
  // output pixel is a phase of its own.
  if (transposed && in == 1) stride = out + 2 * padding;
  Axis axis{int(in), int(out), int(kernel), int(stride), int(padding), int(dilation), transposed};
  axis.phases = axis.out_step = transposed ? axis.stride : 1;
  axis.in_step = transposed ? 1 : axis.stride;
  axis.tap_step = transposed ? axis.stride / std::gcd(axis.stride, axis.dilation) : 1;
  axis.tap_move = transposed ? -axis.tap_step * axis.dilation / axis.stride : axis.dilation;
  return axis;
}

// A phase along one dimension: its first output pixel, the number of its output pixels, the input pixel that the first
// tap reads for the first output pixel, the first tap and the number of taps.
struct Phase {
  int first, size, origin, tap, taps;
};

__device__ inline Phase phase_of(const Axis& axis, int q) {
  const int stride = axis.stride, padding = axis.padding;
  if (!axis.transposed) return {0, axis.out, -padding, 0, axis.kernel};
  const int first = (q + stride - padding % stride) % stride;  // first + padding = q mod stride
  int tap = 0;
  while (tap < axis.tap_step && tap * axis.dilation % stride != q) ++tap;
  const int taps = tap < axis.tap_step ? max(axis.kernel - tap + axis.tap_step - 1, 0) / axis.tap_step : 0;
  return {first, max(axis.out - first + stride - 1, 0) / stride, (first + padding - tap * axis.dilation) / stride, tap,
          taps};
}

// The pixel that reflection padding shows at i.
__device__ inline int mirrored(int i, int size) { return size - 1 - abs(size - 1 - abs(i)); }

}  // namespace fastgen::cuda::convolution
