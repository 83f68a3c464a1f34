// Copies a convolution's input and weight into the memory order that its kernel reads, if they are in another.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"

namespace fastgen::cuda::convolution {

// A tensor's element (i, j, k, l, d) has the strides `from`, its copy the strides `to` with d contiguous and padded
// with zeros.
struct Arrangement {
  int64_t size[4], from[4], to[4];
  int64_t depth, padded, from_depth;
  bool tf32;  // rounds float32 to TF32
  int width;  // of a block's tile along d, a power of 2
};
constexpr int kArrangeThreads = 256, kArrangeElements = 2048;  // threads of a block, elements of its tile

// Grid: tiles along (i, j, k, l) times tiles along d. A block reads its tile along l and writes it along d, 16 bytes
// per thread.
template <class T>
__global__ void __launch_bounds__(kArrangeThreads) arrange(Arrangement a, const T* from, T* to) {
  constexpr int values = kAccess / sizeof(T);
  const int tile_lines = kArrangeElements / a.width, line = threadIdx.x % tile_lines,
            first = static_cast<int>(blockIdx.y) * a.width;
  int64_t* const targets = shared_memory<int64_t>();  // of the tile's lines, -1 beyond the last
  T* const tile = reinterpret_cast<T*>(targets + tile_lines);
  int64_t rest = static_cast<int64_t>(blockIdx.x) * tile_lines + line, source = 0, target = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    source += rest % a.size[i] * a.from[i];
    target += rest % a.size[i] * a.to[i];
    rest /= a.size[i];
  }
  if (threadIdx.x < tile_lines) targets[line] = rest ? -1 : target;
#pragma unroll
  for (int i = 0; i < kArrangeElements / kArrangeThreads; ++i) {
    const int d = threadIdx.x / tile_lines + i * (kArrangeThreads / tile_lines);
    T value = from_float<T>(0.f);
    if (!rest && first + d < a.depth) value = from[source + (first + d) * a.from_depth];
    if constexpr (std::is_same_v<T, float>)
      if (a.tf32) value = float_of_bits(static_cast<int32_t>(to_tf32(value)));
    tile[d * (tile_lines + 1) + line] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kArrangeElements / values; i += kArrangeThreads) {
    const int d = i % (a.width / values) * values, to_line = i / (a.width / values);
    if (targets[to_line] < 0 || first + d >= a.padded) continue;
    Vector<T, values> chunk;
#pragma unroll
    for (int j = 0; j < values; ++j) chunk.value[j] = tile[(d + j) * (tile_lines + 1) + to_line];
    *reinterpret_cast<Vector<T, values>*>(to + targets[to_line] + first + d) = chunk;
  }
}

template <class T>
const T* arranged(Arrangement a, const void* from, const Queue& queue) {
  const int64_t lines = a.size[0] * a.size[1] * a.size[2] * a.size[3];
  T* const to = static_cast<T*>(queue.scratch(lines * a.padded * int64_t(sizeof(T))));
  for (a.width = 8; a.width < 64 && a.width < a.padded;) a.width *= 2;
  const int tile_lines = kArrangeElements / a.width;
  const dim3 blocks(static_cast<unsigned>(ceil_div(lines, tile_lines)),
                    static_cast<unsigned>(ceil_div(a.padded, a.width)));
  launch(queue, arrange<T>, blocks, kArrangeThreads,
         tile_lines * int(sizeof(int64_t)) + a.width * (tile_lines + 1) * int(sizeof(T)), a,
         static_cast<const T*>(from), to);
  return to;
}

template <class T>
const T* arranged_x(const Geometry& geometry, int64_t samples, int64_t padded, const void* x, const Queue& queue) {
  const int64_t channels = geometry.ic / geometry.groups, pixels = geometry.ih * geometry.iw,
                all_channels = geometry.groups * padded;
  if (geometry.x_channels_last && padded == channels && is_aligned(x)) return static_cast<const T*>(x);
  const int64_t channel_stride = geometry.x_channels_last ? 1 : pixels,
                pixel_stride = geometry.x_channels_last ? geometry.ic : 1;
  return arranged<T>({{1, samples, geometry.groups, pixels},
                      {0, geometry.ic * pixels, channels * channel_stride, pixel_stride},
                      {0, pixels * all_channels, padded, all_channels},
                      channels,
                      padded,
                      channel_stride,
                      false,
                      0},
                     x, queue);
}

// A weight that is already in this order is not copied, such as that of conv2d in channels_last order.
template <class T>
const T* arranged_weight(const Geometry& geometry, int64_t out_channels, int64_t padded, bool tf32, const void* weight,
                         const Queue& queue) {
  const int64_t* const stride = geometry.weight_strides;
  const int64_t channels = geometry.ic / geometry.groups, depth_stride = stride[geometry.transposed ? 0 : 1],
                column_stride = stride[geometry.transposed ? 1 : 0];
  const int64_t group_stride = geometry.transposed ? channels * depth_stride : out_channels * column_stride,
                taps = geometry.kh * geometry.kw;
  const auto has_stride = [](int64_t size, int64_t actual, int64_t expected) {
    return size == 1 || actual == expected;
  };
  if (!tf32 && padded == channels && is_aligned(weight) && has_stride(channels, depth_stride, 1) &&
      has_stride(geometry.kw, stride[3], channels) && has_stride(geometry.kh, stride[2], geometry.kw * channels) &&
      has_stride(out_channels, column_stride, taps * channels) &&
      has_stride(geometry.groups, group_stride, out_channels * taps * channels))
    return static_cast<const T*>(weight);
  Arrangement a{{geometry.groups, out_channels, geometry.kh, geometry.kw},
                {group_stride, column_stride, stride[2], stride[3]},
                {out_channels * taps * padded, taps * padded, geometry.kw * padded, padded},
                channels,
                padded,
                depth_stride,
                tf32,
                0};
  if (column_stride < stride[3])  // reads go along the dimension of the smallest stride
    for (int64_t* values : {a.size, a.from, a.to}) std::rotate(values + 1, values + 2, values + 4);
  return arranged<T>(a, weight, queue);
}

}  // namespace fastgen::cuda::convolution
