// The kernels of a convolution with its epilogue, as an implicit matrix product.
#pragma once

#include <algorithm>

#include "cuda/epilogue.cuh"
#include "cuda/phases.cuh"
#include "cuda/warp_product.cuh"

namespace fastgen::cuda::convolution {

constexpr int kThreads = 128;

// An output pixel.
struct Row {
  int64_t x, out;  // offsets: of its sample and group in the input, of the pixel in the output
  int y, z;        // the input pixel that the phase's first tap reads
};
constexpr int kNowhere = -(1 << 29);  // not a pixel, nor is twice this value

// A block's tile of the product: `chunks` per row and step, `stages` steps in flight, `resident` blocks per
// multiprocessor.
template <class Product_, int rows_, int columns_, int chunks_, int stages_, int resident_>
struct Tile {
  using Product = Product_;
  static constexpr int rows = rows_, columns = columns_, chunks = chunks_, stages = stages_, resident = resident_;
  static constexpr int stage = (rows + columns) * chunks;
  static constexpr int length = columns + (40 - columns % 32) % 32;  // row pitch of the sums: 8 mod 32
  static constexpr int body = std::max(stages * stage * kAccess, rows * length * int(sizeof(float)));
  static constexpr int bytes = body + rows * int(sizeof(Row)) + (4 * columns + kThreads) * int(sizeof(float));
  static_assert(rows / Product::rows * (columns / Product::columns) == kThreads / kWarp);
  static_assert(bytes <= (99 << 10));  // the limit per block on sm_86, sm_89 and sm_120; other chips have more
};

template <class T>
struct Problem {
  const T* x;
  const T* weight;
  Axis height, width;
  int64_t samples, size;               // size: elements of the output
  int groups, channels, out_channels;  // channels: per group; those of x are padded
  int column_tiles, split_steps;
  bool channels_last, wide;  // of the output; wide: its channels are whole chunks on 16-byte boundaries
  TileEpilogue<T> epilogue;
  float* splits;                // (splits, size), without the epilogue; or null
  float *counts, *means, *m2s;  // (parts), (parts, c), (parts, c), one part per tile of rows and phase; or null
};

// Grid: (tiles of rows, phases, groups, tiles of columns), the last one fastest, times splits of the sum. A block
// multiplies a tile; each of its warps has a Product.
template <class T, class Tile, bool reflect>
__global__ void __launch_bounds__(kThreads, Tile::resident) convolve(Problem<T> p) {
  using Product = typename Tile::Product;
  constexpr int values = kAccess / sizeof(T), chunks = Tile::chunks, length = Tile::length;
  const int thread = threadIdx.x, warp = thread / kWarp;
  takes_shared_memory<Tile::bytes>();
  Chunk* const stages = shared_memory<Chunk>();
  float* const sums = shared_memory<float>();  // after the last stage
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
  const int64_t first_row = static_cast<int64_t>(part / phases) * Tile::rows,
                remaining = p.samples * pixels - first_row;
  const int count = static_cast<int>(max(int64_t{0}, min(remaining, int64_t{Tile::rows})));
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
    const Affine<1> column_affine = affine_of<1>(p.epilogue, first_channel + thread, 0);
    affine[thread] = column_affine.bias[0];
    affine[thread + Tile::columns] = column_affine.center[0];
    affine[thread + 2 * Tile::columns] = column_affine.gain[0];
    affine[thread + 3 * Tile::columns] = column_affine.shift[0];
  }
  __syncthreads();

  // In each step the thread copies the chunk at `position` of some rows and columns. It is chunk number `chunk` of tap
  // (a, b). An image, or the weight of a group, has fewer than 2^31 chunks.
  constexpr int lines_per_pass = kThreads / chunks, rows_per_thread = Tile::rows / lines_per_pass;
  constexpr int columns_per_thread = (Tile::columns + lines_per_pass - 1) / lines_per_pass;
  static_assert(Tile::rows % lines_per_pass == 0 && lines_per_pass % 8 == 0);
  const int position = thread % chunks, line = thread / chunks, taps = max(width.taps, 1);
  const int chunks_per_tap = p.channels / values, chunks_per_pixel = p.groups * chunks_per_tap;
  const int chunks_per_column = p.height.kernel * p.width.kernel * chunks_per_tap;
  const Chunk* const weight =
      reinterpret_cast<const Chunk*>(p.weight) + static_cast<int64_t>(first_channel) * chunks_per_column;
  const Chunk* from[rows_per_thread];
  int y[rows_per_thread], z[rows_per_thread];
#pragma unroll
  for (int i = 0; i < rows_per_thread; ++i) {
    const Row& row = rows[line + i * lines_per_pass];
    from[i] = reinterpret_cast<const Chunk*>(p.x + row.x);
    y[i] = row.y;
    z[i] = row.z;
  }
  const int steps = count ? (height.taps * width.taps * chunks_per_tap + chunks - 1) / chunks : 0;
  int step = static_cast<int>(blockIdx.y) * p.split_steps;
  const int last = min(steps, step + p.split_steps);
  int chunk = (step * chunks + position) % chunks_per_tap, a = (step * chunks + position) / chunks_per_tap / taps;
  int b = (step * chunks + position) / chunks_per_tap % taps;
  const auto copy_step = [&](int slot) {
    Chunk* const to = stages + slot * Tile::stage + swizzle<chunks>(line, position);
    const bool inside = a < height.taps;
    const int move_y = inside ? a * p.height.tap_move : kNowhere, move_z = b * p.width.tap_move;
#pragma unroll
    for (int i = 0; i < rows_per_thread; ++i) {  // unsigned, so that negative pixels are out of range too
      const unsigned h = reflect ? mirrored(y[i] + move_y, p.height.in) : y[i] + move_y;
      const unsigned w = reflect ? mirrored(z[i] + move_z, p.width.in) : z[i] + move_z;
      const unsigned at = (h * p.width.in + w) * chunks_per_pixel + chunk;
      copy_async(to + i * lines_per_pass * chunks, from[i] + at, h < unsigned(p.height.in) && w < unsigned(p.width.in));
    }
    const int tap = (height.tap + a * p.height.tap_step) * p.width.kernel + width.tap + b * p.width.tap_step;
    const unsigned tap_offset = tap * chunks_per_tap + chunk;
#pragma unroll
    for (int i = 0; i < columns_per_thread; ++i) {
      const int column = line + i * lines_per_pass;
      if (Tile::columns % lines_per_pass == 0 || column < Tile::columns)
        copy_async(to + (Tile::rows + i * lines_per_pass) * chunks,
                   weight + (tap_offset + unsigned(column * chunks_per_column)), inside && column < columns);
    }
    for (chunk += chunks; chunk >= chunks_per_tap; chunk -= chunks_per_tap)
      if (++b == taps) {
        b = 0;
        ++a;
      }
  };

  constexpr int warps_across = Tile::columns / Product::columns;
  const int warp_row = warp / warps_across * Product::rows, warp_column = warp % warps_across * Product::columns;
  Product product;
#pragma unroll
  for (int i = 0; i < Tile::stages - 1; ++i) {
    if (step + i < last) copy_step(i);
    commit_copies();
  }
  for (int slot = 0; step < last; ++step) {
    wait_for_copies<Tile::stages - 2>();
    __syncthreads();  // this step has arrived, and all threads are done with the previous one: its slot is free
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

  if (p.means) {  // the mean of each column as it is stored, and the squared deviations from it
    constexpr int slices = kThreads / Tile::columns;
    const int column = thread % Tile::columns, slice = thread / Tile::columns;
    const float bias = column < columns ? affine[column] : 0.f;
    const auto stored = [&](int r) { return to_float(from_float<T>(sums[r * length + column] + bias)); };
    const auto over_rows = [&](const auto& value) {
      float partial = 0, total = 0;
      for (int r = slice; r < count; r += slices) partial += value(r);
      scratch[thread] = partial;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < slices; ++i) total += scratch[i * Tile::columns + column];
      __syncthreads();
      return total;
    };
    const float first =
        count ? stored(0) : 0.f;  // the mean is computed relative to it, so that the mean of equal values is exact
    const float mean = first + over_rows([&](int r) { return stored(r) - first; }) / static_cast<float>(max(count, 1));
    const float m2 = over_rows([&](int r) { return (stored(r) - mean) * (stored(r) - mean); });
    if (thread < columns) {
      p.means[part * all_channels + first_channel + column] = mean;
      p.m2s[part * all_channels + first_channel + column] = m2;
    }
    if (thread == 0 && first_channel == 0) p.counts[part] = static_cast<float>(count);
  }

  const auto put = [&](auto width_, int r, int column) {
    constexpr int access = decltype(width_)::value;
    if (r >= count || column >= columns) return;
    const int64_t at = rows[r].out + (first_channel + column) * (p.channels_last ? 1 : image);
    float value[access];
    load<access>(sums + r * length + column, value);
    if (p.splits) {
      store<access>(p.splits + blockIdx.y * p.size + at, value);
      return;
    }
    Affine<access> affine_values;
    load<access>(affine + column, affine_values.bias);
    load<access>(affine + column + Tile::columns, affine_values.center);
    load<access>(affine + column + 2 * Tile::columns, affine_values.gain);
    load<access>(affine + column + 3 * Tile::columns, affine_values.shift);
    finish<access>(p.epilogue, at, value, affine_values);
  };
  constexpr int across_values = Tile::columns / values;
  if (p.wide) {
    for (int i = thread; i < Tile::rows * across_values; i += kThreads)
      put(std::integral_constant<int, values>{}, i / across_values, i % across_values * values);
  } else {
    for (int i = thread; i < Tile::rows * Tile::columns; i += kThreads) {
      // Adjacent in memory are either channels or pixels. With pixels a warp has 8 pixels of 4 channels, in 32
      // different banks.
      const int r = p.channels_last ? i / Tile::columns : i % 8 + i / 32 % (Tile::rows / 8) * 8;
      const int column = p.channels_last ? i % Tile::columns : i / 8 % 4 + i / (4 * Tile::rows) * 4;
      put(std::integral_constant<int, 1>{}, r, column);
    }
  }
}

// Adds the splits in order and applies the epilogue. `inner`: elements of one channel that are adjacent. Grid: one
// thread per access of `count` elements.
constexpr int kAddThreads = 256;

template <class T, int count>
__global__ void __launch_bounds__(kAddThreads) add_splits(TileEpilogue<T> epilogue, const float* splits, int number,
                                                          int64_t size, int64_t channels, int64_t inner) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x) * count;
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

}  // namespace fastgen::cuda::convolution
