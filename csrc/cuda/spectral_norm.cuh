// The work division that the passes of spectral norm and of its gradient share: the weights of a launch among blocks.
#pragma once

#include <algorithm>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/team.cuh"

namespace fastgen::cuda::spectral {

constexpr int kThreads = 512;
constexpr int kMaxWeights = 32;                // per launch: their records fill the 4 KB of its parameters
constexpr int kMaxSums = 512;                  // per weight; every block of the last pass adds them
constexpr int kPerThread = 8;                  // elements per thread in the passes over elements
constexpr int kBlock = kThreads * kPerThread;  // elements per block there
constexpr int kShared = kThreads * 8 * int(sizeof(float));

// The number of blocks of a pass that writes one sum per block.
FASTGEN_HD int64_t summing_blocks(int64_t blocks) { return blocks < 1 ? 1 : blocks > kMaxSums ? kMaxSums : blocks; }

// The records of a launch, one per weight, and its blocks: those of record i are starts[i], ..., starts[i + 1] - 1.
template <class Record>
struct Group {
  Record records[kMaxWeights];
  unsigned starts[kMaxWeights + 1];
  int count;

  template <class Blocks>
  dim3 grid(const Blocks& blocks) {
    starts[0] = 0;
    for (int i = 0; i < kMaxWeights; ++i)
      starts[i + 1] = starts[i] + (i < count ? static_cast<unsigned>(blocks(records[i])) : 0);
    return dim3(starts[kMaxWeights]);
  }
};

// The record of this block, and the block's index among that record's blocks.
struct Work {
  int index = 0;
  int64_t number, blocks;

  template <class Record>
  __device__ explicit Work(const Group<Record>& group) {
#pragma unroll
    for (int step = kMaxWeights / 2; step > 0; step /= 2)
      if (group.starts[index + step] <= blockIdx.x) index += step;
    number = blockIdx.x - group.starts[index];
    blocks = group.starts[index + 1] - group.starts[index];
  }
};

// The sum over the block, in its first thread. Shared memory may be used again after the next barrier.
__device__ inline double block_total(double x) {
  __syncthreads();
  return team_sum(x, kThreads, shared_memory<double>());
}

__device__ inline double total_of(const double* sums, int64_t count) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) total += sums[i];
  return block_total(total);
}

// The floats for `access` elements of a weight, in accesses of up to 4, which are aligned to 16 bytes.
template <int access>
__device__ void load_floats(const float* from, float (&to)[access]) {
  constexpr int width = access < 4 ? access : 4;
#pragma unroll
  for (int i = 0; i < access; i += width) {
    float values[width];
    load<width>(from + i, values);
#pragma unroll
    for (int j = 0; j < width; ++j) to[i + j] = values[j];
  }
}

// A block's kBlock elements, kPerThread per thread, in accesses: the thread's element i is at(i - i % access) + i %
// access.
template <int access>
struct Elements {
  int64_t start, size;

  __device__ int64_t at(int i) const {
    return start + (static_cast<int64_t>(i / access) * kThreads + threadIdx.x) * access;
  }

  template <class T>
  __device__ void load_all(const T* from, float (&to)[kPerThread]) const {
#pragma unroll
    for (int i = 0; i < kPerThread; i += access) {
      float values[access] = {};
      if (at(i) < size) load<access>(from + at(i), values);
#pragma unroll
      for (int j = 0; j < access; ++j) to[i + j] = values[j];
    }
  }

  template <class T>
  __device__ void store_all(T* to, const float (&from)[kPerThread]) const {
#pragma unroll
    for (int i = 0; i < kPerThread; i += access) {
      float values[access];
#pragma unroll
      for (int j = 0; j < access; ++j) values[j] = from[i + j];
      if (at(i) < size) store<access>(to + at(i), values);
    }
  }
};

// The number of adjacent columns of a line.
inline int width_of(const SpectralMatrix& m) {
  return m.outer == 1 ? 1 : static_cast<int>(std::max<int64_t>(1, m.inner));
}

}  // namespace fastgen::cuda::spectral
