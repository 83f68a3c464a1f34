// A convolution, strided or transposed, with what follows it, as an implicit matrix product (Chetlur et al., cuDNN,
// 2014).
//
// Rows are output pixels, columns output channels, the sum runs over taps and input channels. The pixels of a
// transposed convolution that share (pixel + padding) mod stride, an output phase, share their taps: each phase is a
// product of its own, and nothing is multiplied by the zeros between the pixels of its input. A strided convolution has
// one phase.
//
// What is summed moves in chunks: 16 bytes of the channels of one tap. For that x is (samples, height, width, channels)
// and the weight (output channels, taps, channels), the channels padded by zeros to whole chunks; `arrange` copies what
// does not lie so. A step of the sum is some chunks of each row and column of a tile. Several steps are on their way to
// shared memory (cp.async) while one is multiplied, by tensor cores or by FMA. The tile's sums then pass through shared
// memory once more, so that the epilogue (bias; parts of the batch's statistics, or a norm by given ones, residual and
// activation) moves whole rows.
//
// Products of few tiles and long sums are split along the sum into float32 tensors that `add_splits` adds in a fixed
// order.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda/arrange.cuh"
#include "cuda/norm_act.cuh"
#include "cuda/warp_product.cuh"

namespace fastgen::cuda::convolution {

// ---- Which pixels and taps meet

// One dimension of the images. By its tap t the output's pixel o reads the input's o * stride - padding + t * dilation;
// transposed, (o + padding - t * dilation) / stride where that is whole.
struct Axis {
  int in, out, kernel, stride, padding, dilation;
  bool transposed;
  int phases;
  int in_step, out_step;   // from a phase's output pixel to its next, in the input and in the output
  int tap_step, tap_move;  // from a phase's tap to its next, in taps and in the input

  int64_t most_pixels() const { return ceil_div(out, out_step); }  // that a phase has
  int64_t most_taps() const { return ceil_div(kernel, tap_step); }
};

inline Axis make_axis(bool transposed, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                      int64_t dilation) {
  // The only pixel of an input meets each pixel of the output by one tap, whatever the stride: by this one each is a
  // phase.
  if (transposed && in == 1) stride = out + 2 * padding;
  Axis axis{int(in), int(out), int(kernel), int(stride), int(padding), int(dilation), transposed};
  axis.phases = axis.out_step = transposed ? axis.stride : 1;
  axis.in_step = transposed ? 1 : axis.stride;
  axis.tap_step = transposed ? axis.stride / std::gcd(axis.stride, axis.dilation) : 1;
  axis.tap_move = transposed ? -axis.tap_step * axis.dilation / axis.stride : axis.dilation;
  return axis;
}

// A phase along one dimension: its first output pixel, how many it has, the input's pixel that its first tap reads for
// the first of them, its first tap and how many taps.
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

__device__ inline int mirrored(int i, int size) { return size - 1 - abs(size - 1 - abs(i)); }

// ---- The epilogue

// The sum with its bias goes to `pre`, what follows to `out`; either may be null.
template <class T>
struct TileEpilogue {
  const float *bias, *mean, *var, *weight, *shift;  // (c), each or null
  float eps, slope;
  Activation activation;
  const T* residual;
  T *pre, *out;
};

// (z + bias - center) * gain + shift, of `count` neighbouring elements.
template <int count>
struct Affine {
  float bias[count], center[count], gain[count], shift[count];
};

// `step`: from an element's channel to its neighbour's, 0 or 1.
template <int count, class T>
__device__ Affine<count> affine_of(const TileEpilogue<T>& e, int64_t channel, int step) {
  Affine<count> affine;
#pragma unroll
  for (int i = 0; i < count; ++i, channel += step) {
    affine.bias[i] = e.bias ? e.bias[channel] : 0.f;
    affine.center[i] = e.mean ? e.mean[channel] : 0.f;
    affine.gain[i] = e.mean ? (e.weight ? e.weight[channel] : 1.f) / sqrtf(e.var[channel] + e.eps) : 1.f;
    affine.shift[i] = e.shift ? e.shift[channel] : 0.f;
  }
  return affine;
}

// What follows the sums z of the elements from `at`.
template <int count, class T>
__device__ void finish(const TileEpilogue<T>& e, int64_t at, float (&z)[count], const Affine<count>& affine) {
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] += affine.bias[i];
  if (e.pre) store<count>(e.pre + at, z);
  if (!e.out) return;
  float added[count] = {};
  if (e.residual) load<count>(e.residual + at, added);
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = (z[i] - affine.center[i]) * affine.gain[i] + affine.shift[i] + added[i];
  activate(e.activation, z, e.slope);
  store<count>(e.out + at, z);
}

// ---- The kernel

constexpr int kThreads = 128;

struct Row {
  int64_t x, out;  // the sample's first element of the group, and the row's in the output
  int y, z;        // the input's pixel that the phase's first tap reads
};
constexpr int kNowhere = -(1 << 29);  // twice it is still no pixel

// A tile of the product: chunks of a step, steps under way, and how many blocks a multiprocessor is to hold.
template <class Product_, int rows_, int columns_, int chunks_, int stages_, int resident_>
struct Tile {
  using Product = Product_;
  static constexpr int rows = rows_, columns = columns_, chunks = chunks_, stages = stages_, resident = resident_;
  static constexpr int stage = (rows + columns) * chunks;
  static constexpr int length = columns + (40 - columns % 32) % 32;  // of a row of sums: 8 mod 32
  static constexpr int body = std::max(stages * stage * kAccess, rows * length * int(sizeof(float)));
  static constexpr int bytes = body + rows * int(sizeof(Row)) + (4 * columns + kThreads) * int(sizeof(float));
  static_assert(rows / Product::rows * (columns / Product::columns) == kThreads / kWarp);
  static_assert(bytes <= (99 << 10));  // of a block on sm_86, sm_89 and sm_120; others have more
};

template <class T>
struct Problem {
  const T* x;
  const T* weight;
  Axis height, width;
  int64_t samples, size;               // size: elements of the output
  int groups, channels, out_channels;  // channels of a group, x's padded
  int column_tiles, split_steps;
  bool channels_last, wide;  // the output's order; wide: whole chunks of its channels lie on 16-byte boundaries
  TileEpilogue<T> epilogue;
  float* splits;                // (splits, size), then without epilogue; or null
  float *counts, *means, *m2s;  // (parts), (parts, c), (parts, c), a part for each tile of rows of each phase; or null
};

// Grid: (tiles of rows, phases, groups, tiles of columns), the last one fastest, by splits of the sum. A block
// multiplies a tile; its warps have a Product each.
template <class T, class Tile, bool reflect>
__global__ void __launch_bounds__(kThreads, Tile::resident) convolve(Problem<T> p) {
  using Product = typename Tile::Product;
  constexpr int values = kAccess / sizeof(T), chunks = Tile::chunks, length = Tile::length;
  const int thread = threadIdx.x, warp = thread / kWarp;
  takes_shared_memory<Tile::bytes>();
  Chunk* const stages = shared_memory<Chunk>();
  float* const sums = shared_memory<float>();  // when the stages are done with
  Row* const rows = reinterpret_cast<Row*>(shared_memory<unsigned char>() + Tile::body);
  float* const affine = reinterpret_cast<float*>(rows + Tile::rows);  // (4, columns), the arrays of Affine
  float* const scratch = affine + 4 * Tile::columns;

  unsigned part = blockIdx.x;
  const int first_column = static_cast<int>(part % p.column_tiles) * Tile::columns;
  part /= p.column_tiles;
  const int group = static_cast<int>(part % p.groups), phases = p.height.phases * p.width.phases;
  part /= p.groups;
  const int q = static_cast<int>(part % phases);
  const Phase height = phase_of(p.height, q / p.width.phases), width = phase_of(p.width, q % p.width.phases);
  const unsigned pixels = static_cast<unsigned>(height.size) * width.size;
  const int64_t first_row = static_cast<int64_t>(part / phases) * Tile::rows, left = p.samples * pixels - first_row;
  const int count = static_cast<int>(max(int64_t{0}, min(left, int64_t{Tile::rows})));
  const int first_channel = group * p.out_channels + first_column,
            columns = min(Tile::columns, p.out_channels - first_column);

  const int64_t all_channels = static_cast<int64_t>(p.groups) * p.out_channels;
  const int64_t image = static_cast<int64_t>(p.height.out) * p.width.out;  // pixels
  if (thread < Tile::rows) {
    Row row{0, 0, kNowhere, kNowhere};
    if (thread < count) {
      unsigned pixel = static_cast<unsigned>(first_row % pixels) + thread;
      const int64_t sample = first_row / pixels + pixel / pixels;
      pixel %= pixels;
      const int i = static_cast<int>(pixel / width.size), j = static_cast<int>(pixel % width.size);
      const int to = (height.first + i * p.height.out_step) * p.width.out + width.first + j * p.width.out_step;
      row.x = (sample * p.height.in * p.width.in * p.groups + group) * p.channels;
      row.out = p.channels_last ? (sample * image + to) * all_channels : sample * all_channels * image + to;
      row.y = height.origin + i * p.height.in_step;
      row.z = width.origin + j * p.width.in_step;
    }
    rows[thread] = row;
  }
  if (thread < columns) {
    const Affine<1> of = affine_of<1>(p.epilogue, first_channel + thread, 0);
    affine[thread] = of.bias[0];
    affine[thread + Tile::columns] = of.center[0];
    affine[thread + 2 * Tile::columns] = of.gain[0];
    affine[thread + 3 * Tile::columns] = of.shift[0];
  }
  __syncthreads();

  // Of each step the thread copies one chunk, `own`, of these rows and columns: number `chunk` of the tap (a, b). An
  // image or a weight of a group has less than 2^31 chunks.
  constexpr int copiers = kThreads / chunks, of_rows = Tile::rows / copiers;
  constexpr int of_columns = (Tile::columns + copiers - 1) / copiers;
  static_assert(Tile::rows % copiers == 0 && copiers % 8 == 0);
  const int own = thread % chunks, line = thread / chunks, taps = max(width.taps, 1);
  const int chunks_a_tap = p.channels / values, chunks_a_pixel = p.groups * chunks_a_tap;
  const int chunks_a_column = p.height.kernel * p.width.kernel * chunks_a_tap;
  const Chunk* const weight =
      reinterpret_cast<const Chunk*>(p.weight) + static_cast<int64_t>(first_channel) * chunks_a_column;
  const Chunk* from[of_rows];
  int y[of_rows], z[of_rows];
#pragma unroll
  for (int i = 0; i < of_rows; ++i) {
    const Row& row = rows[line + i * copiers];
    from[i] = reinterpret_cast<const Chunk*>(p.x + row.x);
    y[i] = row.y;
    z[i] = row.z;
  }
  const int steps = count ? (height.taps * width.taps * chunks_a_tap + chunks - 1) / chunks : 0;
  int step = static_cast<int>(blockIdx.y) * p.split_steps;
  const int last = min(steps, step + p.split_steps);
  int chunk = (step * chunks + own) % chunks_a_tap, a = (step * chunks + own) / chunks_a_tap / taps;
  int b = (step * chunks + own) / chunks_a_tap % taps;
  const auto copy_step = [&](int slot) {
    Chunk* const to = stages + slot * Tile::stage + place<chunks>(line, own);
    const bool inside = a < height.taps;
    const int up = inside ? a * p.height.tap_move : kNowhere, along = b * p.width.tap_move;
#pragma unroll
    for (int i = 0; i < of_rows; ++i) {  // unsigned: what is negative is no pixel either
      const unsigned h = reflect ? mirrored(y[i] + up, p.height.in) : y[i] + up;
      const unsigned w = reflect ? mirrored(z[i] + along, p.width.in) : z[i] + along;
      const unsigned at = (h * p.width.in + w) * chunks_a_pixel + chunk;
      copy_async(to + i * copiers * chunks, from[i] + at, h < unsigned(p.height.in) && w < unsigned(p.width.in));
    }
    const int tap = (height.tap + a * p.height.tap_step) * p.width.kernel + width.tap + b * p.width.tap_step;
    const unsigned of_tap = tap * chunks_a_tap + chunk;
#pragma unroll
    for (int i = 0; i < of_columns; ++i) {
      const int column = line + i * copiers;
      if (Tile::columns % copiers == 0 || column < Tile::columns)
        copy_async(to + (Tile::rows + i * copiers) * chunks, weight + (of_tap + unsigned(column * chunks_a_column)),
                   inside && column < columns);
    }
    for (chunk += chunks; chunk >= chunks_a_tap; chunk -= chunks_a_tap)
      if (++b == taps) {
        b = 0;
        ++a;
      }
  };

  constexpr int across = Tile::columns / Product::columns;
  const int warp_row = warp / across * Product::rows, warp_column = warp % across * Product::columns;
  Product product;
#pragma unroll
  for (int i = 0; i < Tile::stages - 1; ++i) {
    if (step + i < last) copy_step(i);
    commit_copies();
  }
  for (int slot = 0; step < last; ++step) {
    wait_for_copies<Tile::stages - 2>();
    __syncthreads();  // the step has arrived for all, and all have multiplied the one before: its slot is free
    if (step + Tile::stages - 1 < last) copy_step(slot == 0 ? Tile::stages - 1 : slot - 1);
    commit_copies();
    const Chunk* const at = stages + slot * Tile::stage;
    product.template add<chunks>(at + warp_row * chunks, at + (Tile::rows + warp_column) * chunks);
    slot = slot + 1 == Tile::stages ? 0 : slot + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
  product.put(sums + warp_row * length + warp_column, length);
  __syncthreads();

  if (p.means) {  // of each column as it is stored, and the squared deviations from it
    constexpr int slices = kThreads / Tile::columns;
    const int column = thread % Tile::columns, slice = thread / Tile::columns;
    const float bias = column < columns ? affine[column] : 0.f;
    const auto stored = [&](int r) { return to_float(from_float<T>(sums[r * length + column] + bias)); };
    const auto over_rows = [&](const auto& value) {
      float own_rows = 0, total = 0;
      for (int r = slice; r < count; r += slices) own_rows += value(r);
      scratch[thread] = own_rows;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < slices; ++i) total += scratch[i * Tile::columns + column];
      __syncthreads();
      return total;
    };
    const float first = count ? stored(0) : 0.f;  // the mean is counted from here: that of equal values is exact
    const float mean = first + over_rows([&](int r) { return stored(r) - first; }) / static_cast<float>(max(count, 1));
    const float m2 = over_rows([&](int r) { return (stored(r) - mean) * (stored(r) - mean); });
    if (thread < columns) {
      p.means[part * all_channels + first_channel + column] = mean;
      p.m2s[part * all_channels + first_channel + column] = m2;
    }
    if (thread == 0 && first_channel == 0) p.counts[part] = static_cast<float>(count);
  }

  const auto put = [&](auto width_, int r, int column) {
    constexpr int side = decltype(width_)::value;
    if (r >= count || column >= columns) return;
    const int64_t at = rows[r].out + (first_channel + column) * (p.channels_last ? 1 : image);
    float value[side];
    load<side>(sums + r * length + column, value);
    if (p.splits) {
      store<side>(p.splits + blockIdx.y * p.size + at, value);
      return;
    }
    Affine<side> of;
    load<side>(affine + column, of.bias);
    load<side>(affine + column + Tile::columns, of.center);
    load<side>(affine + column + 2 * Tile::columns, of.gain);
    load<side>(affine + column + 3 * Tile::columns, of.shift);
    finish<side>(p.epilogue, at, value, of);
  };
  constexpr int across_values = Tile::columns / values;
  if (p.wide) {
    for (int i = thread; i < Tile::rows * across_values; i += kThreads)
      put(std::integral_constant<int, values>{}, i / across_values, i % across_values * values);
  } else {
    for (int i = thread; i < Tile::rows * Tile::columns; i += kThreads) {
      // Channels are neighbours in memory, or pixels: 8 of them in 4 channels, which lie in as many banks as a warp can
      // have.
      const int r = p.channels_last ? i / Tile::columns : i % 8 + i / 32 % (Tile::rows / 8) * 8;
      const int column = p.channels_last ? i % Tile::columns : i / 8 % 4 + i / (4 * Tile::rows) * 4;
      put(std::integral_constant<int, 1>{}, r, column);
    }
  }
}

// The sums of the splits, one after another, and what follows them. `inner`: elements of one channel side by side.
// Grid: accesses of `count` elements, one a thread.
constexpr int kAdders = 256;

template <class T, int count>
__global__ void __launch_bounds__(kAdders) add_splits(TileEpilogue<T> epilogue, const float* splits, int number,
                                                      int64_t size, int64_t channels, int64_t inner) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kAdders + threadIdx.x) * count;
  if (at >= size) return;
  float total[count] = {};
#pragma unroll 8
  for (int split = 0; split < number; ++split) {
    float value[count];
    load<count>(splits + split * size + at, value);
#pragma unroll
    for (int i = 0; i < count; ++i) total[i] += value[i];
  }
  finish<count>(epilogue, at, total, affine_of<count>(epilogue, at / inner % channels, inner == 1));
}

// ---- The launcher

// How a tile divides a product. Not yet measured: chosen for registers, shared memory and a full chip.
struct Division {
  int64_t row_tiles, column_tiles, blocks, steps, splits;
  bool fills;  // the chip, or nearly
};

template <class Tile, class T>
Division divide(const Problem<T>& p, int64_t most_splits, const Queue& queue) {
  Division d;
  d.row_tiles = ceil_div(p.samples * p.height.most_pixels() * p.width.most_pixels(), Tile::rows);
  d.column_tiles = ceil_div(p.out_channels, Tile::columns);
  d.blocks = d.row_tiles * d.column_tiles * p.groups * p.height.phases * p.width.phases;
  d.steps =
      ceil_div(p.height.most_taps() * p.width.most_taps() * p.channels * int64_t(sizeof(T)), Tile::chunks * kAccess);
  d.splits = std::max<int64_t>(1, std::min({most_splits, queue.multiprocessors / d.blocks, d.steps / 4}));
  d.fills = d.blocks * d.splits * 4 >= queue.multiprocessors * 3;
  return d;
}

// A call of the op: `moments` asks for the batch's statistics.
struct Call {
  const Epilogue& op;
  const Queue& queue;
  bool reflect, moments;
};

// The product in these tiles, with its epilogue. False: the statistics that are asked for are not there yet.
template <class Tile, class T>
bool multiply_in(Problem<T> p, const Division& d, const Call& call) {
  const Epilogue& op = call.op;
  const int64_t parts = d.row_tiles * p.height.phases * p.width.phases;
  const bool moments = call.moments && d.splits == 1;
  p.column_tiles = static_cast<int>(d.column_tiles);
  p.split_steps = static_cast<int>(ceil_div(d.steps, d.splits));
  if (d.splits > 1) p.splits = static_cast<float*>(call.queue.scratch(d.splits * p.size * int64_t(sizeof(float))));
  if (moments) {
    p.counts = static_cast<float*>(call.queue.scratch(parts * (2 * op.c + 1) * int64_t(sizeof(float))));
    p.means = p.counts + parts;
    p.m2s = p.means + parts * op.c;
  }
  const auto kernel = call.reflect ? convolve<T, Tile, true> : convolve<T, Tile, false>;
  const dim3 blocks(static_cast<unsigned>(d.blocks), static_cast<unsigned>(d.splits));
  launch(call.queue, kernel, blocks, kThreads, Tile::bytes, p);
  if (d.splits > 1) {
    const TileEpilogue<T>& e = p.epilogue;
    const int64_t inner = op.channels_last ? 1 : op.s;
    const bool aligned = is_aligned(e.pre) && is_aligned(e.out) && is_aligned(e.residual);
    const bool wide = aligned && (op.channels_last ? op.c : op.s) % 4 == 0;
    const dim3 accesses(static_cast<unsigned>(ceil_div(p.size, kAdders * (wide ? 4 : 1))));
    launch(call.queue, wide ? add_splits<T, 4> : add_splits<T, 1>, accesses, kAdders, 0, e, p.splits, d.splits, p.size,
           op.c, inner);
  }
  if (moments) merge_moments(op, p.counts, p.means, p.m2s, parts, op.mean, op.var, call.queue);
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

// By the largest tile that fills the chip; else the sum is split.
template <class Tiles, class T>
bool multiply(const Problem<T>& p, const Call& call) {
  using Large = typename Tiles::Large;
  using Medium = typename Tiles::Medium;
  using Small = typename Tiles::Small;
  using Narrow = typename Tiles::Narrow;
  if (p.out_channels <= Narrow::columns) return multiply_in<Narrow>(p, divide<Narrow>(p, 32, call.queue), call);
  if (p.samples * p.height.most_pixels() * p.width.most_pixels() > 2 * Small::rows) {
    const Division large = divide<Large>(p, 1, call.queue), medium = divide<Medium>(p, 8, call.queue);
    if (p.out_channels > Medium::columns && large.fills) return multiply_in<Large>(p, large, call);
    if (medium.fills) return multiply_in<Medium>(p, medium, call);
  }
  return multiply_in<Small>(p, divide<Small>(p, 32, call.queue), call);
}

template <class T>
void run(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors, const Queue& queue) {
  constexpr int64_t values = kAccess / sizeof(T), most = (int64_t{1} << 31) - 1;
  const bool tf32 = std::is_same_v<T, float> && conv.tf32;
  const bool later = op.normalize && op.batch_stats;  // the rest is a pass over the convolution, which `sum` is
  T* const out = static_cast<T*>(tensors.out);
  T* const sum = later && !tensors.pre ? out : static_cast<T*>(tensors.pre);
  const int64_t padded = ceil_div(conv.ic / conv.groups, values) * values, out_channels = op.c / conv.groups;
  if (conv.ih * conv.iw * conv.groups * padded / values > most || conv.oh * conv.ow > most ||
      conv.kh * conv.kw * padded / values * out_channels > most)
    throw std::runtime_error("fastgen: an image or a weight is larger than the CUDA kernels count");

  Problem<T> p{};
  p.x = arranged_x<T>(conv, op.n, padded, tensors.x, queue);
  p.weight = arranged_weight<T>(conv, out_channels, padded, tf32, tensors.weight, queue);
  p.height = make_axis(conv.transposed, conv.ih, conv.oh, conv.kh, conv.stride[0], conv.padding[0], conv.dilation[0]);
  p.width = make_axis(conv.transposed, conv.iw, conv.ow, conv.kw, conv.stride[1], conv.padding[1], conv.dilation[1]);
  p.samples = op.n;
  p.size = op.n * op.c * op.s;
  p.groups = static_cast<int>(conv.groups);
  p.channels = static_cast<int>(padded);
  p.out_channels = static_cast<int>(out_channels);
  p.channels_last = op.channels_last;
  p.epilogue.bias = static_cast<const float*>(op.bias);
  p.epilogue.pre = sum;
  if (!later) {
    p.epilogue.out = out;
    p.epilogue.activation = op.activation;
    p.epilogue.slope = static_cast<float>(op.negative_slope);
    p.epilogue.residual = static_cast<const T*>(op.residual);
    if (op.normalize) {
      p.epilogue.mean = static_cast<const float*>(op.mean);
      p.epilogue.var = static_cast<const float*>(op.var);
      p.epilogue.weight = static_cast<const float*>(op.norm_weight);
      p.epilogue.shift = static_cast<const float*>(op.norm_bias);
      p.epilogue.eps = static_cast<float>(op.eps);
    }
  }
  const bool aligned = is_aligned(sum) && is_aligned(p.epilogue.out) && is_aligned(p.epilogue.residual);
  p.wide = op.channels_last && out_channels % values == 0 && aligned;

  const Call call{op, queue, conv.reflect, later && !op.per_sample};
  bool moments;
  if constexpr (std::is_same_v<T, float>)
    moments = tf32 ? multiply<TensorTiles<T>>(p, call) : multiply<FmaTiles>(p, call);
  else moments = multiply<TensorTiles<T>>(p, call);
  if (!later) return;
  if (!moments) norm_act_moments(op, sum, op.mean, op.var, queue);
  norm_act_apply(op, sum, out, queue);
}

// Each of two files compiles the kernels of some types.
#define FASTGEN_CONVOLVE(T) \
  template void run<T>(const Geometry&, const Epilogue&, const ConvolutionTensors&, const Queue&);
extern FASTGEN_CONVOLVE(float) extern FASTGEN_CONVOLVE(BFloat16) extern FASTGEN_CONVOLVE(Float16)

}  // namespace fastgen::cuda::convolution
