// A convolution, strided or transposed, with its epilogue as an implicit matrix product (Chetlur et al., cuDNN, 2014):
// the launcher.
//
// Rows are output pixels, columns are output channels, and the sum runs over taps and input channels. In a transposed
// convolution, output pixels with the same (pixel + padding) mod stride (an output phase) use the same taps: each phase
// is a separate product, so nothing is multiplied by the zeros between the pixels of the input. A strided convolution
// has one phase.
//
// Operands move in chunks: 16 bytes of the channels of one tap. So x must be (samples, height, width, channels) and the
// weight (output channels, taps, channels), with the channels padded by zeros to whole chunks; `arrange` copies tensors
// of any other order. One step of the sum reads a few chunks of each row and column of a tile. Several steps are being
// copied to shared memory (cp.async) while one is multiplied, by tensor cores or by FMA. The tile's sums then pass
// through shared memory once more, so that the epilogue (bias; then partial statistics of the batch, or a norm with
// given statistics, residual and activation) moves whole rows.
//
// A product of few tiles and a long sum is split along the sum (split-K) into float32 tensors, which `add_splits` adds
// in a fixed order.
#pragma once

#include <algorithm>

#include "cuda/arrange.cuh"
#include "cuda/convolve.cuh"
#include "cuda/statistics.cuh"

namespace fastgen::cuda::convolution {

// How a product is divided into tiles and splits. The sizes were not measured, but chosen for registers, shared memory
// and a full chip.
struct Division {
  int64_t row_tiles, column_tiles, blocks, steps, splits;
  bool fills;  // the tiles fill the chip, or nearly
};

template <class Tile, class T>
Division divide(const Problem<T>& p, int64_t max_splits, const Queue& queue) {
  Division d;
  d.row_tiles = ceil_div(p.samples * p.height.max_pixels() * p.width.max_pixels(), Tile::rows);
  d.column_tiles = ceil_div(p.out_channels, Tile::columns);
  d.blocks = d.row_tiles * d.column_tiles * p.groups * p.height.phases * p.width.phases;
  d.steps =
      ceil_div(p.height.max_taps() * p.width.max_taps() * p.channels * int64_t(sizeof(T)), Tile::chunks * kAccess);
  d.splits = std::max<int64_t>(1, std::min({max_splits, queue.multiprocessors / d.blocks, d.steps / 4}));
  d.fills = d.blocks * d.splits * 4 >= queue.multiprocessors * 3;
  return d;
}

// A call of the op: `moments` requests the batch's statistics.
struct Call {
  const Epilogue& epilogue;
  const Queue& queue;
  bool reflect, moments;
};

// Launches the product with these tiles and its epilogue. Returns whether it computed the requested statistics.
template <class Tile, class T>
bool multiply_in(Problem<T> p, const Division& d, const Call& call) {
  const Epilogue& epilogue = call.epilogue;
  const int64_t parts = d.row_tiles * p.height.phases * p.width.phases;
  const bool moments = call.moments && d.splits == 1;
  p.column_tiles = static_cast<int>(d.column_tiles);
  p.split_steps = static_cast<int>(ceil_div(d.steps, d.splits));
  if (d.splits > 1) p.splits = static_cast<float*>(call.queue.scratch(d.splits * p.size * int64_t(sizeof(float))));
  if (moments) {
    p.counts = static_cast<float*>(call.queue.scratch(parts * (2 * epilogue.c + 1) * int64_t(sizeof(float))));
    p.means = p.counts + parts;
    p.m2s = p.means + parts * epilogue.c;
  }
  const auto kernel = call.reflect ? convolve<T, Tile, true> : convolve<T, Tile, false>;
  const dim3 blocks(static_cast<unsigned>(d.blocks), static_cast<unsigned>(d.splits));
  launch(call.queue, kernel, blocks, kThreads, Tile::bytes, p);
  if (d.splits > 1) {
    const TileEpilogue<T>& e = p.epilogue;
    const int64_t inner = epilogue.channels_last ? 1 : epilogue.s;
    const bool aligned = is_aligned(e.pre) && is_aligned(e.out) && is_aligned(e.residual);
    const bool wide = aligned && (epilogue.channels_last ? epilogue.c : epilogue.s) % 4 == 0;
    const dim3 accesses(static_cast<unsigned>(ceil_div(p.size, kAddThreads * (wide ? 4 : 1))));
    launch(call.queue, wide ? add_splits<T, 4> : add_splits<T, 1>, accesses, kAddThreads, 0, e, p.splits, d.splits,
           p.size, epilogue.c, inner);
  }
  if (moments) merge_moments(epilogue, p.counts, p.means, p.m2s, parts, epilogue.mean, epilogue.var, call.queue);
  return moments;
}

template <class T>
struct TensorTiles {
  using Large = Tile<TensorCores<T, 64, 64>, 128, 128, 4, 4, 2>;
  using Medium = Tile<TensorCores<T, 64, 32>, 128, 64, 4, 4, 3>;
  using Small = Tile<TensorCores<T, 16, 32>, 32, 64, 8, 4, 4>;
  using Narrow = Tile<TensorCores<T, 32, 8>, 128, 8, 4, 4, 4>;
};

struct FmaTiles {
  using Large = Tile<Fma<32, 64, 4, 8>, 128, 64, 4, 4, 2>;
  using Medium = Large;
  using Small = Tile<Fma<16, 32, 4, 8>, 32, 64, 8, 4, 4>;
  using Narrow = Tile<Fma<32, 8, 16, 2>, 128, 8, 4, 4, 4>;
};

// Uses the largest tile that fills the chip; if none does, splits the sum.
template <class Tiles, class T>
bool multiply(const Problem<T>& p, const Call& call) {
  using Large = typename Tiles::Large;
  using Medium = typename Tiles::Medium;
  using Small = typename Tiles::Small;
  using Narrow = typename Tiles::Narrow;
  if (p.out_channels <= Narrow::columns) return multiply_in<Narrow>(p, divide<Narrow>(p, 32, call.queue), call);
  if (p.samples * p.height.max_pixels() * p.width.max_pixels() > 2 * Small::rows) {
    const Division large = divide<Large>(p, 1, call.queue), medium = divide<Medium>(p, 8, call.queue);
    if (p.out_channels > Medium::columns && large.fills) return multiply_in<Large>(p, large, call);
    if (medium.fills) return multiply_in<Medium>(p, medium, call);
  }
  return multiply_in<Small>(p, divide<Small>(p, 32, call.queue), call);
}

template <class T>
void run(const Geometry& geometry, const Epilogue& epilogue, const ConvolutionTensors& tensors, const Queue& queue) {
  constexpr int64_t values = kAccess / sizeof(T), max_index = (int64_t{1} << 31) - 1;
  const bool tf32 = std::is_same_v<T, float> && geometry.tf32;
  const bool second_pass = epilogue.normalize && epilogue.batch_stats;  // of norm, residual and activation, over `sum`
  T* const out = static_cast<T*>(tensors.out);
  T* const sum = second_pass && !tensors.pre ? out : static_cast<T*>(tensors.pre);
  const int64_t padded = ceil_div(geometry.ic / geometry.groups, values) * values,
                out_channels = epilogue.c / geometry.groups;
  if (geometry.ih * geometry.iw * geometry.groups * padded / values > max_index ||
      geometry.oh * geometry.ow > max_index || geometry.kh * geometry.kw * padded / values * out_channels > max_index)
    throw std::runtime_error("fastgen: an image or a weight is larger than the CUDA kernels can index");

  Problem<T> p{};
  p.x = arranged_x<T>(geometry, epilogue.n, padded, tensors.x, queue);
  p.weight = arranged_weight<T>(geometry, out_channels, padded, tf32, tensors.weight, queue);
  p.height = make_axis(geometry.transposed, geometry.ih, geometry.oh, geometry.kh, geometry.stride[0],
                       geometry.padding[0], geometry.dilation[0]);
  p.width = make_axis(geometry.transposed, geometry.iw, geometry.ow, geometry.kw, geometry.stride[1],
                      geometry.padding[1], geometry.dilation[1]);
  p.samples = epilogue.n;
  p.size = epilogue.n * epilogue.c * epilogue.s;
  p.groups = static_cast<int>(geometry.groups);
  p.channels = static_cast<int>(padded);
  p.out_channels = static_cast<int>(out_channels);
  p.channels_last = epilogue.channels_last;
  p.epilogue.bias = static_cast<const float*>(epilogue.bias);
  p.epilogue.pre = sum;
  if (!second_pass) {
    p.epilogue.out = out;
    p.epilogue.activation = epilogue.activation;
    p.epilogue.slope = static_cast<float>(epilogue.negative_slope);
    p.epilogue.residual = static_cast<const T*>(epilogue.residual);
    if (epilogue.normalize) {
      p.epilogue.mean = static_cast<const float*>(epilogue.mean);
      p.epilogue.var = static_cast<const float*>(epilogue.var);
      p.epilogue.weight = static_cast<const float*>(epilogue.norm_weight);
      p.epilogue.shift = static_cast<const float*>(epilogue.norm_bias);
      p.epilogue.eps = static_cast<float>(epilogue.eps);
    }
  }
  const bool aligned = is_aligned(sum) && is_aligned(p.epilogue.out) && is_aligned(p.epilogue.residual);
  p.wide = epilogue.channels_last && out_channels % values == 0 && aligned;

  const Call call{epilogue, queue, geometry.reflect, second_pass && !epilogue.per_sample};
  bool moments;
  if constexpr (std::is_same_v<T, float>)
    moments = tf32 ? multiply<TensorTiles<T>>(p, call) : multiply<FmaTiles>(p, call);
  else moments = multiply<TensorTiles<T>>(p, call);
  if (!second_pass) return;
  if (!moments) norm_act_moments(epilogue, sum, epilogue.mean, epilogue.var, queue);
  norm_act_apply(epilogue, sum, out, queue);
}

// Compiled for float32 in convolution_float32.cu, for the others in convolution_16_bits.cu.
#define FASTGEN_CONVOLUTION(T) \
  template void run<T>(const Geometry&, const Epilogue&, const ConvolutionTensors&, const Queue&);
extern FASTGEN_CONVOLUTION(float) extern FASTGEN_CONVOLUTION(BFloat16) extern FASTGEN_CONVOLUTION(Float16)

}  // namespace fastgen::cuda::convolution
