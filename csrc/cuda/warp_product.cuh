// The product that a warp of the convolution kernel accumulates from shared memory in each step, by tensor cores or
// FMA.
#pragma once

#include "cuda/matrix.cuh"
#include "cuda/team.cuh"

namespace fastgen::cuda::convolution {

struct alignas(kAccess) Chunk {
  unsigned char bytes[kAccess];
};

// The swizzled position of a row's chunk in shared memory, whose 32 banks serve 8 chunks at a time. The pattern repeats
// every 8 rows, 8 * chunks positions later.
template <int chunks>
FASTGEN_HD constexpr int swizzle(int row, int chunk) {
  return row * chunks + (chunk ^ (row / (8 / chunks) % chunks));
}

// Whether 8 threads access different banks, both when they read the same chunk of 8 adjacent rows (ldmatrix, Fma) and
// when they copy all chunks of one or two rows.
template <int chunks>
constexpr bool meets_all_banks() {
  for (int chunk = 0; chunk < chunks; ++chunk) {
    int read = 0, copied = 0;
    for (int i = 0; i < 8; ++i) {
      read |= 1 << swizzle<chunks>(i, chunk) % 8;
      copied |= 1 << swizzle<chunks>(i / chunks, i % chunks) % 8;
    }
    if (read != 255 || copied != 255) return false;
  }
  return true;
}
static_assert(meets_all_banks<4>() && meets_all_banks<8>());

// A warp's part of a tile, `rows` by `columns`, on tensor cores: 16-bit values, or float32 in TF32.
template <class T, int rows_, int columns_>
struct TensorCores {
  static constexpr int rows = rows_, columns = columns_, high = rows / 16, wide = columns / 8;
  float total[high][wide][4] = {};

  template <int chunks>
  __device__ void add(const Chunk* a, const Chunk* b) {
    const int lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int chunk = 0; chunk < chunks; chunk += 2) {
      const Chunk* const from_a = a + swizzle<chunks>(matrix % 2 * 8 + line, chunk + matrix / 2);
      const Chunk* const from_b = b + swizzle<chunks>(matrix / 2 * 8 % columns + line, chunk + matrix % 2);
      uint32_t fragment_a[high][4], fragment_b[wide][2];
#pragma unroll
      for (int i = 0; i < high; ++i) load_matrices(fragment_a[i], from_a + i * 16 * chunks);
#pragma unroll
      for (int j = 0; j < wide; j += 2) {  // two adjacent matrices at once, or the same one twice if there is only one
        uint32_t pair[4];
        load_matrices(pair, from_b + j * 8 * chunks);
        fragment_b[j][0] = pair[0];
        fragment_b[j][1] = pair[1];
        if (j + 1 < wide) {
          fragment_b[j + 1][0] = pair[2];
          fragment_b[j + 1][1] = pair[3];
        }
      }
      if constexpr (std::is_same_v<T, float>) {  // the weight is already rounded
#pragma unroll
        for (int i = 0; i < high; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) fragment_a[i][k] = to_tf32(float_of_bits(static_cast<int32_t>(fragment_a[i][k])));
      }
#pragma unroll
      for (int i = 0; i < high; ++i)
#pragma unroll
        for (int j = 0; j < wide; ++j) {
          if constexpr (std::is_same_v<T, float>) multiply_tf32(total[i][j], fragment_a[i], fragment_b[j]);
          else multiply<T>(total[i][j], fragment_a[i], fragment_b[j]);
        }
    }
  }

  // Stores the sums as rows of floats, `length` apart. length is 8 mod 32, so that the stores of a half warp hit
  // different banks.
  __device__ void put(float* to, int length) const {
    const int lane = threadIdx.x % kWarp;
    to += lane / 4 * length + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < high; ++i)
#pragma unroll
      for (int j = 0; j < wide; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float values[2] = {total[i][j][half * 2], total[i][j][half * 2 + 1]};
          store<2>(to + (i * 16 + half * 8) * length + j * 8, values);
        }
  }
};

// The same by FMA, for float32: lane (r, c) of lane_rows x lane_columns has rows r, r + lane_rows, ... and columns
// likewise. Each step is summed separately: long sums then lose less to rounding.
template <int rows_, int columns_, int lane_rows, int lane_columns>
struct Fma {
  static constexpr int rows = rows_, columns = columns_, high = rows / lane_rows, wide = columns / lane_columns;
  float total[high][wide] = {};

  template <int chunks>
  __device__ void add(const Chunk* a, const Chunk* b) {
    const int row = threadIdx.x % kWarp / lane_columns, column = threadIdx.x % kWarp % lane_columns;
    const auto read = [](const Chunk* from, float (&to)[4]) { load<4>(reinterpret_cast<const float*>(from), to); };
    float sum[high][wide];
    const auto add_chunk = [&](int chunk, auto first) {
      float fragment_b[wide][4];
#pragma unroll
      for (int j = 0; j < wide; ++j) read(b + swizzle<chunks>(column + j * lane_columns, chunk), fragment_b[j]);
#pragma unroll
      for (int i = 0; i < high; ++i) {
        float fragment_a[4];
        read(a + swizzle<chunks>(row + i * lane_rows, chunk), fragment_a);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int j = 0; j < wide; ++j)
            sum[i][j] =
                first && k == 0 ? fragment_a[k] * fragment_b[j][k] : sum[i][j] + fragment_a[k] * fragment_b[j][k];
      }
    };
    add_chunk(0, std::true_type{});
#pragma unroll 1  // two chunks do not fit into the registers
    for (int chunk = 1; chunk < chunks; ++chunk) add_chunk(chunk, std::false_type{});
#pragma unroll
    for (int i = 0; i < high; ++i)
#pragma unroll
      for (int j = 0; j < wide; ++j) total[i][j] += sum[i][j];
  }

  __device__ void put(float* to, int length) const {
    const int row = threadIdx.x % kWarp / lane_columns, column = threadIdx.x % kWarp % lane_columns;
#pragma unroll
    for (int i = 0; i < high; ++i)
#pragma unroll
      for (int j = 0; j < wide; ++j) to[(row + i * lane_rows) * length + column + j * lane_columns] = total[i][j];
  }
};

}  // namespace fastgen::cuda::convolution
