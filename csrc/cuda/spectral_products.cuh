// The products of spectral norm: the part that a block computes from its chunk of lines.
#pragma once

#include "cuda/spectral_norm.cuh"

namespace fastgen::cuda::spectral {

constexpr int kBatch = 4;  // lines that a team multiplies at a time

// A weight in a launch; spectral_norm.cu explains the terms.
struct Weight {
  const void* weight;
  void* out;
  const float *line_vector, *summed_vector;  // before the step
  float *new_line_vector, *new_summed_vector, *sigma;
  float* products;  // the line product and the summed product, not normalized
  float* parts;     // of the summed product: (chunks, line_size / width)
  double* sums;     // one per block, for the squared norms or for sigma
  int64_t lines, line_size;
  int width, chunk;  // chunk: lines per block
  int lanes_log2;    // threads that share a line
  bool fused, aligned;

  FASTGEN_HD int64_t size() const { return lines * line_size; }
  FASTGEN_HD int64_t line_vector_size() const { return lines * width; }
  FASTGEN_HD int64_t summed_vector_size() const { return line_size / width; }
  FASTGEN_HD int64_t chunks() const { return ceil_div(lines, chunk); }
  FASTGEN_HD int64_t summed_blocks() const { return summing_blocks(ceil_div(summed_vector_size(), kWarp)); }
  FASTGEN_HD float* line_product() const { return products; }
  FASTGEN_HD int64_t summed_offset() const { return ceil_div(line_vector_size(), 4) * 4; }  // aligned to 16 bytes
  FASTGEN_HD float* summed_product() const { return products + summed_offset(); }
  FASTGEN_HD double* line_sums() const { return sums; }
  FASTGEN_HD double* summed_sums() const { return sums + chunks(); }
};

// Adds `count` values that are `stride` apart into the first of them, in each of `planes`. This thread's value has the
// index `index` and is at `value`. Call it after a barrier.
template <int planes>
__device__ void add_across(float* value, int index, int count, int stride) {
  for (int left = count; left > 1;) {
    const int half = (left + 1) / 2;
    if (index + half < left) {
#pragma unroll
      for (int i = 0; i < planes; ++i) value[i * kThreads] += value[i * kThreads + half * stride];
    }
    __syncthreads();
    left = half;
  }
}

template <int access>
__device__ void store_floats(float* to, const float (&from)[access]) {
  constexpr int width = access < 4 ? access : 4;
#pragma unroll
  for (int i = 0; i < access; i += width) {
    float values[width];
#pragma unroll
    for (int j = 0; j < width; ++j) values[j] = from[i + j];
    store<width>(to + i, values);
  }
}

// The lines of a block.
struct Chunk {
  int64_t number, first, count;  // its index, its first line and the number of lines
  bool evaluate;

  // Writes an element of the line product and returns what it adds to the block's sum.
  __device__ double put(const Weight& m, int64_t at, float value) const {
    m.line_product()[first * m.width + at] = value;
    return static_cast<double>(value) * (evaluate ? m.line_vector[first * m.width + at] : value);
  }
};

// The line product of the chunk for width 1: a team of threads side by side along a line multiplies kBatch lines at a
// time.
template <class T, int access>
__device__ double multiply_lines(const Weight& m, const Chunk& chunk, const float* summed_vector) {
  const int lanes = 1 << m.lanes_log2, lane = threadIdx.x & (lanes - 1), team = threadIdx.x >> m.lanes_log2;
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.line_size;
  float* const scratch = shared_memory<float>();
  double total = 0;
  for (int64_t batch = 0; batch < chunk.count; batch += (kThreads >> m.lanes_log2) * kBatch) {
    const int64_t line = batch + team * kBatch;
    const T* lines[kBatch];
    float sums[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) lines[i] = weight + min(line + i, chunk.count - 1) * m.line_size;
#pragma unroll 2
    for (int64_t at = lane * access; at < m.line_size; at += lanes * access) {
      float vector[access], values[kBatch][access];
      load_floats(summed_vector + at, vector);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) load<access>(lines[i] + at, values[i]);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int j = 0; j < access; ++j) sums[i] += values[i][j] * vector[j];
    }
    for (int step = min(lanes, kWarp) / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], step);
    if (lanes > kWarp) {
      if (threadIdx.x % kWarp == 0)
#pragma unroll
        for (int i = 0; i < kBatch; ++i) scratch[threadIdx.x / kWarp * kBatch + i] = sums[i];
      __syncthreads();
      if (lane < kBatch && line + lane < chunk.count) {
        float sum = 0;
        for (int i = 0; i < lanes / kWarp; ++i) sum += scratch[(team * (lanes / kWarp) + i) * kBatch + lane];
        total += chunk.put(m, line + lane, sum);
      }
      __syncthreads();
    } else if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (line + i < chunk.count) total += chunk.put(m, line + i, sums[i]);
    }
  }
  return total;
}

// The chunk's part of the summed product for width 1: each thread adds some columns over every n-th line.
template <class T, int access>
__device__ void add_lines(const Weight& m, const Chunk& chunk, const float* line_vector) {
  const int lanes = 1 << m.lanes_log2, lane = threadIdx.x & (lanes - 1), team = threadIdx.x >> m.lanes_log2;
  const int teams = kThreads >> m.lanes_log2;
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.line_size;
  float* const scratch = shared_memory<float>();
  float* const part = m.parts + chunk.number * m.line_size;
  for (int64_t at = lane * access; at < m.line_size;
       at += lanes * access) {  // a single iteration if there are several teams
    float sums[access] = {};
#pragma unroll 4
    for (int64_t line = team; line < chunk.count; line += teams) {
      float values[access];
      load<access>(weight + line * m.line_size + at, values);
      const float factor = line_vector[chunk.first + line];
#pragma unroll
      for (int j = 0; j < access; ++j) sums[j] += factor * values[j];
    }
    if (teams == 1) store_floats(part + at, sums);
    else store_floats(scratch + team * lanes * access + at, sums);
  }
  if (teams == 1) return;
  __syncthreads();
  for (int at = threadIdx.x; at < m.line_size; at += kThreads) {
    float sum = 0;
    for (int i = 0; i < teams; ++i) sum += scratch[i * lanes * access + at];
    part[at] = sum;
  }
}

// A thread's position in a line of width > 1: the block covers `span` adjacent columns and `deep` elements of the
// summed vector at a time.
struct Columns {
  int span, deep, column, depth;

  __device__ explicit Columns(const Weight& m)
      : span(min(m.width, kThreads)), deep(kThreads / span), column(threadIdx.x % span), depth(threadIdx.x / span) {}
};

// As multiply_lines, for width > 1.
template <class T>
__device__ double multiply_columns(const Weight& m, const Chunk& chunk, const float* summed_vector) {
  const Columns at(m);
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.line_size;
  float* const slot = shared_memory<float>() + threadIdx.x;
  double total = 0;
  for (int64_t line = 0; line < chunk.count; line += kBatch)
    for (int column = at.column; column - at.column < m.width; column += at.span) {
      const bool valid = at.depth < at.deep && column < m.width;
      float sums[kBatch] = {};
      for (int64_t i = at.depth; valid && i < m.summed_vector_size(); i += at.deep) {
        const float factor = summed_vector[i];
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          sums[j] += factor * to_float(weight[min(line + j, chunk.count - 1) * m.line_size + i * m.width + column]);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) slot[j * kThreads] = sums[j];
      __syncthreads();
      add_across<kBatch>(slot, at.depth, at.deep, at.span);
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (valid && at.depth == 0 && line + j < chunk.count)
          total += chunk.put(m, (line + j) * m.width + column, slot[j * kThreads]);
      __syncthreads();
    }
  return total;
}

// As add_lines, for width > 1.
template <class T>
__device__ void add_columns(const Weight& m, const Chunk& chunk, const float* line_vector) {
  const Columns at(m);
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.line_size;
  float* const slot = shared_memory<float>() + threadIdx.x;
  for (int64_t first = 0; first < m.summed_vector_size(); first += at.deep) {
    const int64_t i = first + at.depth;
    const bool valid = at.depth < at.deep && i < m.summed_vector_size();
    float sum = 0;
    for (int column = at.column; valid && column < m.width; column += at.span)
#pragma unroll 4
      for (int64_t line = 0; line < chunk.count; ++line)
        sum += line_vector[(chunk.first + line) * m.width + column] *
               to_float(weight[line * m.line_size + i * m.width + column]);
    *slot = sum;
    __syncthreads();
    add_across<1>(slot, valid ? at.column : at.span, at.span, 1);
    if (valid && at.column == 0) m.parts[chunk.number * m.summed_vector_size() + i] = *slot;
    __syncthreads();
  }
}

}  // namespace fastgen::cuda::spectral
