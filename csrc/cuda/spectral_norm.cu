// weight / sigma for many weights by power iteration (Miyato et al., Spectral Normalization for Generative Adversarial
// Networks, 2018), and the gradient: a fixed number of launches for up to kMost weights, which come as kernel
// parameters.
//
// In memory a weight is `lines` of `length` elements: the matrix's rows if outer == 1, else its blocks (rows, inner),
// of `width` = SpectralMatrix::inner columns. Of its two vectors `outer`, (lines, width), is u if SpectralMatrix::outer
// == 1, else v; `inner`, (length / width), is the other one. Neighbouring lines make a block's chunk: their product W
// inner is complete, and the block adds to W^T outer the part of its lines, read again while they are in the cache;
// another launch adds the parts. Where outer is the first vector of a step, one pass gives both products (`fused`);
// else the first pass gives the sum alone and a second one the other. The second product is of the first one before it
// is normalized: norms and sigma = second . (W first) / |first| need no further pass.
//
// Products are float32, norms float64, in an order that a weight's shape alone decides.
#include <algorithm>

#include "cuda/common.cuh"

namespace fastgen::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBatch = 4;                 // lines that a team multiplies at a time
constexpr int kMost = 32;                 // weights of a launch: their records fill the 4 KB of its parameters
constexpr int kMostParts = 512;           // sums that every block of the last pass adds
constexpr int kHeld = 8;                  // elements of a thread in the last pass
constexpr int kChunk = kThreads * kHeld;  // of a block
constexpr int kShared = kThreads * 8 * int(sizeof(float));

enum class Pass { first, second, evaluate };  // evaluate: sigma of the given vectors

FASTGEN_HD int64_t some_parts(int64_t blocks) { return blocks < 1 ? 1 : blocks > kMostParts ? kMostParts : blocks; }

struct Weight {
  const void* weight;
  void* out;
  const float *outer, *inner;  // as they are before the step
  float *new_outer, *new_inner, *sigma;
  float* products;  // W inner and W^T outer, not normalized
  float* parts;     // of W^T outer: (chunks, length / width)
  double* sums;     // each block's part of the squared norms, or of sigma
  int64_t lines, length;
  int width, chunk;  // chunk: lines of a block
  int lanes_log2;    // threads that share a line
  bool fused, aligned;

  FASTGEN_HD int64_t size() const { return lines * length; }
  FASTGEN_HD int64_t outer_size() const { return lines * width; }
  FASTGEN_HD int64_t inner_size() const { return length / width; }
  FASTGEN_HD int64_t chunks() const { return ceil_div(lines, chunk); }
  FASTGEN_HD int64_t inner_blocks() const { return some_parts(ceil_div(inner_size(), kWarp)); }
  FASTGEN_HD float* outer_product() const { return products; }
  FASTGEN_HD int64_t inner_offset() const { return ceil_div(outer_size(), 4) * 4; }  // aligned to 16 bytes
  FASTGEN_HD float* inner_product() const { return products + inner_offset(); }
  FASTGEN_HD double* outer_sums() const { return sums; }
  FASTGEN_HD double* inner_sums() const { return sums + chunks(); }
};

// A weight's gradient.
struct WeightGrad {
  const void *weight, *grad_out;
  void* out;
  const float *outer, *inner, *sigma, *grad_sigma;
  double* sums;  // each block's part of grad_out . weight
  int64_t lines, length;
  int width;
  bool aligned;

  FASTGEN_HD int64_t size() const { return lines * length; }
  FASTGEN_HD int64_t blocks() const { return some_parts(ceil_div(size(), kChunk)); }
};

// The records of a launch, and its blocks: those of record i are starts[i], ..., starts[i + 1] - 1.
template <class Record>
struct Group {
  Record of[kMost];
  unsigned starts[kMost + 1];
  int count;

  template <class Blocks>
  dim3 grid(const Blocks& blocks) {
    starts[0] = 0;
    for (int i = 0; i < kMost; ++i) starts[i + 1] = starts[i] + (i < count ? static_cast<unsigned>(blocks(of[i])) : 0);
    return dim3(starts[kMost]);
  }
};

static_assert(sizeof(Group<Weight>) + 2 * sizeof(double) <= 4096 && sizeof(Group<WeightGrad>) <= 4096);

// The record of this block, and its number among that record's blocks.
struct Place {
  int index = 0;
  int64_t number, blocks;

  template <class Record>
  __device__ explicit Place(const Group<Record>& group) {
#pragma unroll
    for (int step = kMost / 2; step > 0; step /= 2)
      if (group.starts[index + step] <= blockIdx.x) index += step;
    number = blockIdx.x - group.starts[index];
    blocks = group.starts[index + 1] - group.starts[index];
  }
};

// The sum over the block, in its first thread. Shared memory is free again after the next barrier.
__device__ double block_total(double x) {
  __syncthreads();
  return team_sum(x, kThreads, shared_memory<double>());
}

__device__ double total_of(const double* sums, int64_t count) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) total += sums[i];
  return block_total(total);
}

// Adds `count` values `stride` apart, of which the thread's own is number `index`, into the first; in each of `planes`.
// After a barrier.
template <int planes>
__device__ void add_across(float* own, int index, int count, int stride) {
  for (int left = count; left > 1;) {
    const int half = (left + 1) / 2;
    if (index + half < left) {
#pragma unroll
      for (int i = 0; i < planes; ++i) own[i * kThreads] += own[i * kThreads + half * stride];
    }
    __syncthreads();
    left = half;
  }
}

// Floats beside `access` elements of a weight: aligned to 16 bytes, and so in accesses of up to 4.
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

// A block's lines, and the elements of the pass that they give.
struct Chunk {
  int64_t number, first, count;  // lines
  bool evaluate;

  // Writes an element of W inner and returns what it adds to the block's sum.
  __device__ double put(const Weight& m, int64_t at, float value) const {
    m.outer_product()[first * m.width + at] = value;
    return static_cast<double>(value) * (evaluate ? m.outer[first * m.width + at] : value);
  }
};

// W inner of the chunk's lines, width 1: a team of threads side by side along a line has kBatch lines at a time.
template <class T, int access>
__device__ double multiply_lines(const Weight& m, const Chunk& chunk, const float* inner) {
  const int lanes = 1 << m.lanes_log2, lane = threadIdx.x & (lanes - 1), team = threadIdx.x >> m.lanes_log2;
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.length;
  float* const scratch = shared_memory<float>();
  double total = 0;
  for (int64_t batch = 0; batch < chunk.count; batch += (kThreads >> m.lanes_log2) * kBatch) {
    const int64_t line = batch + team * kBatch;
    const T* lines[kBatch];
    float sums[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) lines[i] = weight + min(line + i, chunk.count - 1) * m.length;
#pragma unroll 2
    for (int64_t at = lane * access; at < m.length; at += lanes * access) {
      float vector[access], values[kBatch][access];
      load_floats(inner + at, vector);
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

// The chunk's part of W^T outer, width 1: a thread has columns, and a team every so many lines.
template <class T, int access>
__device__ void add_lines(const Weight& m, const Chunk& chunk, const float* outer) {
  const int lanes = 1 << m.lanes_log2, lane = threadIdx.x & (lanes - 1), team = threadIdx.x >> m.lanes_log2;
  const int teams = kThreads >> m.lanes_log2;
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.length;
  float* const scratch = shared_memory<float>();
  float* const part = m.parts + chunk.number * m.length;
  for (int64_t at = lane * access; at < m.length; at += lanes * access) {  // once, if there are several teams
    float sums[access] = {};
#pragma unroll 4
    for (int64_t line = team; line < chunk.count; line += teams) {
      float values[access];
      load<access>(weight + line * m.length + at, values);
      const float factor = outer[chunk.first + line];
#pragma unroll
      for (int j = 0; j < access; ++j) sums[j] += factor * values[j];
    }
    if (teams == 1) store_floats(part + at, sums);
    else store_floats(scratch + team * lanes * access + at, sums);
  }
  if (teams == 1) return;
  __syncthreads();
  for (int at = threadIdx.x; at < m.length; at += kThreads) {
    float sum = 0;
    for (int i = 0; i < teams; ++i) sum += scratch[i * lanes * access + at];
    part[at] = sum;
  }
}

// Where a thread is in a line of width > 1: `span` neighbouring columns, and `deep` elements of inner at a time.
struct Columns {
  int span, deep, column, depth;

  __device__ explicit Columns(const Weight& m)
      : span(min(m.width, kThreads)), deep(kThreads / span), column(threadIdx.x % span), depth(threadIdx.x / span) {}
};

// As multiply_lines, for width > 1.
template <class T>
__device__ double multiply_columns(const Weight& m, const Chunk& chunk, const float* inner) {
  const Columns at(m);
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.length;
  float* const own = shared_memory<float>() + threadIdx.x;
  double total = 0;
  for (int64_t line = 0; line < chunk.count; line += kBatch)
    for (int column = at.column; column - at.column < m.width; column += at.span) {
      const bool valid = at.depth < at.deep && column < m.width;
      float sums[kBatch] = {};
      for (int64_t i = at.depth; valid && i < m.inner_size(); i += at.deep) {
        const float factor = inner[i];
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          sums[j] += factor * to_float(weight[min(line + j, chunk.count - 1) * m.length + i * m.width + column]);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) own[j * kThreads] = sums[j];
      __syncthreads();
      add_across<kBatch>(own, at.depth, at.deep, at.span);
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (valid && at.depth == 0 && line + j < chunk.count)
          total += chunk.put(m, (line + j) * m.width + column, own[j * kThreads]);
      __syncthreads();
    }
  return total;
}

// As add_lines, for width > 1.
template <class T>
__device__ void add_columns(const Weight& m, const Chunk& chunk, const float* outer) {
  const Columns at(m);
  const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.length;
  float* const own = shared_memory<float>() + threadIdx.x;
  for (int64_t first = 0; first < m.inner_size(); first += at.deep) {
    const int64_t i = first + at.depth;
    const bool valid = at.depth < at.deep && i < m.inner_size();
    float sum = 0;
    for (int column = at.column; valid && column < m.width; column += at.span)
#pragma unroll 4
      for (int64_t line = 0; line < chunk.count; ++line)
        sum +=
            outer[(chunk.first + line) * m.width + column] * to_float(weight[line * m.length + i * m.width + column]);
    *own = sum;
    __syncthreads();
    add_across<1>(own, valid ? at.column : at.span, at.span, 1);
    if (valid && at.column == 0) m.parts[chunk.number * m.inner_size() + i] = *own;
    __syncthreads();
  }
}

// Grid: a block for each chunk of each weight; of those that are not fused in the second pass.
template <class T>
__global__ void __launch_bounds__(kThreads) multiply(const __grid_constant__ Group<Weight> group, Pass pass) {
  constexpr int widest = kAccess / sizeof(T);
  const Place place(group);
  const Weight& m = group.of[place.index];
  const int64_t first = place.number * m.chunk;
  const Chunk chunk{place.number, first, min(static_cast<int64_t>(m.chunk), m.lines - first), pass == Pass::evaluate};
  if (m.fused || pass != Pass::first) {
    const float* const inner = pass == Pass::second ? m.inner_product() : m.inner;
    double total = m.width > 1 ? multiply_columns<T>(m, chunk, inner)
                   : m.aligned ? multiply_lines<T, widest>(m, chunk, inner)
                               : multiply_lines<T, 1>(m, chunk, inner);
    total = block_total(total);
    if (threadIdx.x == 0) m.outer_sums()[place.number] = total;
    __syncthreads();
  }
  if (pass != Pass::first) return;
  const float* const outer = m.fused ? m.outer_product() : m.outer;
  if (m.width > 1) add_columns<T>(m, chunk, outer);
  else if (m.aligned) add_lines<T, widest>(m, chunk, outer);
  else add_lines<T, 1>(m, chunk, outer);
}

// W^T outer from its parts. Grid: up to kMostParts blocks a weight; a block has a warp's width of elements at a time,
// and each of its warps every so many parts.
__global__ void __launch_bounds__(kThreads) add_parts(const __grid_constant__ Group<Weight> group) {
  constexpr int warps = kThreads / kWarp;
  const Place place(group);
  const Weight& m = group.of[place.index];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t size = m.inner_size(), chunks = m.chunks();
  float* const scratch = shared_memory<float>();
  double total = 0;
  for (int64_t first = place.number * kWarp; first < size; first += place.blocks * kWarp) {
    const int64_t at = first + lane;
    float sum = 0;
    if (at < size)
#pragma unroll 8
      for (int64_t i = warp; i < chunks; i += warps) sum += m.parts[i * size + at];
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && at < size) {
      for (int i = 1; i < warps; ++i) sum += scratch[i * kWarp + lane];
      m.inner_product()[at] = sum;
      total += static_cast<double>(sum) * sum;
    }
    __syncthreads();
  }
  total = block_total(total);
  if (threadIdx.x == 0) m.inner_sums()[place.number] = total;
}

// A block's kChunk elements, kHeld a thread, in accesses: element i of the thread's is at(i - i % access) + i % access.
template <int access>
struct Elements {
  int64_t start, size;

  __device__ int64_t at(int i) const {
    return start + (static_cast<int64_t>(i / access) * kThreads + threadIdx.x) * access;
  }

  template <class T>
  __device__ void load_all(const T* from, float (&to)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; i += access) {
      float values[access] = {};
      if (at(i) < size) load<access>(from + at(i), values);
#pragma unroll
      for (int j = 0; j < access; ++j) to[i + j] = values[j];
    }
  }

  template <class T>
  __device__ void store_all(T* to, const float (&from)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; i += access) {
      float values[access];
#pragma unroll
      for (int j = 0; j < access; ++j) values[j] = from[i + j];
      if (at(i) < size) store<access>(to + at(i), values);
    }
  }
};

// What the last pass divides by; thread 0 computes it for the block.
struct Divisors {
  double outer, inner;
  float sigma;

  __device__ Divisors(const Weight& m, double eps, bool iterate) {
    Divisors* const shared = reinterpret_cast<Divisors*>(shared_memory<double>() + kThreads / kWarp);
    const double of_outer = total_of(m.outer_sums(), m.chunks());
    const double of_inner = iterate ? total_of(m.inner_sums(), m.inner_blocks()) : 0;
    if (threadIdx.x == 0) {
      if (iterate) {
        const double length = sqrt(m.fused ? of_outer : of_inner),
                     first = length < eps ? eps : length;  // NaN stays NaN
        const double norm = sqrt(m.fused ? of_inner : of_outer) / first, second = norm < eps ? eps : norm;
        shared->outer = m.fused ? first : first * second;
        shared->inner = m.fused ? first * second : first;
        shared->sigma = static_cast<float>(norm * (norm / second));
      } else {
        shared->sigma = static_cast<float>(of_outer);
      }
    }
    __syncthreads();
    *this = *shared;
  }
};

template <class T, int access>
__device__ void finish_chunk(const Weight& m, const Place& place, double eps, bool iterate, bool scale) {
  const Elements<access> elements{place.number * kChunk, m.size()};
  float held[kHeld];
  if (scale && m.out) elements.load_all(static_cast<const T*>(m.weight), held);  // under way while the norms are added
  const Divisors divisors(m, eps, iterate);
  for (int64_t i = elements.start + threadIdx.x; i < elements.start + kChunk; i += kThreads) {
    if (i < m.outer_size())
      m.new_outer[i] = iterate ? static_cast<float>(m.outer_product()[i] / divisors.outer) : m.outer[i];
    if (i < m.inner_size())
      m.new_inner[i] = iterate ? static_cast<float>(m.inner_product()[i] / divisors.inner) : m.inner[i];
  }
  if (!scale) return;
  if (place.number == 0 && threadIdx.x == 0) *m.sigma = divisors.sigma;
  if (!m.out) return;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] /= divisors.sigma;
  elements.store_all(static_cast<T*>(m.out), held);
}

// iterate: u and v from the products; else they stay. scale: sigma, and weight / sigma where it is wanted. Grid: a
// block for kChunk elements of each weight, or of its longer vector.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ Group<Weight> group, double eps, bool iterate, bool scale) {
  const Place place(group);
  const Weight& m = group.of[place.index];
  if (m.aligned) finish_chunk<T, kAccess / sizeof(T)>(m, place, eps, iterate, scale);
  else finish_chunk<T, 1>(m, place, eps, iterate, scale);
}

__device__ int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

template <class T, int access>
__device__ double dot_of(const WeightGrad& m, const Place& place) {
  double total = 0;
  for (int64_t start = place.number * kChunk; start < m.size(); start += place.blocks * kChunk) {
    const Elements<access> elements{start, m.size()};
    float weight[kHeld], grad[kHeld], sum = 0;
    elements.load_all(static_cast<const T*>(m.weight), weight);
    elements.load_all(static_cast<const T*>(m.grad_out), grad);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sum += weight[i] * grad[i];
    total += sum;
  }
  return total;
}

// Parts of grad_out . weight. Grid: up to kMostParts blocks a weight.
template <class T>
__global__ void __launch_bounds__(kThreads) dot(const __grid_constant__ Group<WeightGrad> group) {
  const Place place(group);
  const WeightGrad& m = group.of[place.index];
  const double total = block_total(m.aligned ? dot_of<T, kAccess / sizeof(T)>(m, place) : dot_of<T, 1>(m, place));
  if (threadIdx.x == 0) m.sums[place.number] = total;
}

template <class T, int access>
__device__ void differentiate_chunk(const WeightGrad& m, const Place& place) {
  const Elements<access> elements{place.number * kChunk, m.size()};
  float held[kHeld];
  elements.load_all(static_cast<const T*>(m.grad_out), held);
  const double total = total_of(m.sums, m.blocks());
  float* const shared = shared_memory<float>() + 2 * kThreads / kWarp;
  const float sigma = *m.sigma;
  if (threadIdx.x == 0) *shared = static_cast<float>(*m.grad_sigma - total / (static_cast<double>(sigma) * sigma));
  __syncthreads();
  const float slope = *shared;
#pragma unroll
  for (int i = 0; i < kHeld; i += access) {
    const int64_t at = elements.at(i);
    if (at >= m.size()) break;
    const int64_t line = divide(at, m.length), in_line = at - line * m.length;
    float inner[access], outer[access];
    if (m.width == 1) {
      load_floats(m.inner + in_line, inner);
      const float of_line = m.outer[line];
#pragma unroll
      for (int j = 0; j < access; ++j) outer[j] = of_line;
    } else {
      int64_t row = divide(in_line, m.width), column = in_line - row * m.width;
#pragma unroll
      for (int j = 0; j < access; ++j) {
        inner[j] = m.inner[row];
        outer[j] = m.outer[line * m.width + column];
        if (++column == m.width) {
          column = 0;
          ++row;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < access; ++j) held[i + j] = held[i + j] / sigma + slope * outer[j] * inner[j];
  }
  elements.store_all(static_cast<T*>(m.out), held);
}

// grad_out / sigma + (grad_sigma - grad_out . weight / sigma^2) u v^T. Grid: a block for kChunk elements.
template <class T>
__global__ void __launch_bounds__(kThreads) differentiate(const __grid_constant__ Group<WeightGrad> group) {
  const Place place(group);
  const WeightGrad& m = group.of[place.index];
  if (m.aligned) differentiate_chunk<T, kAccess / sizeof(T)>(m, place);
  else differentiate_chunk<T, 1>(m, place);
}

int width_of(const SpectralMatrix& m) { return m.outer == 1 ? 1 : static_cast<int>(std::max<int64_t>(1, m.inner)); }

// Lines of a block: so many that they fill it and their parts of the sum are few, so few that they stay in the cache
// and that there are blocks for every multiprocessor.
int64_t chunk_of(const Weight& m) {
  if (m.width > 1) return std::max<int64_t>(kBatch, ceil_div(m.lines, 256));
  const int64_t small = ceil_div(4096, std::max<int64_t>(1, m.length)),
                large = std::min<int64_t>(16, ceil_div(m.lines, 128));
  return std::max({int64_t{1}, std::min(small, m.lines), large, ceil_div(m.lines, 2 * kMostParts)});
}

template <class T>
Weight record_of(const SpectralMatrix& m, bool v_first) {
  Weight record{};
  record.weight = m.weight;
  record.out = m.out;
  record.outer = static_cast<const float*>(m.outer == 1 ? m.given_u : m.given_v);
  record.inner = static_cast<const float*>(m.outer == 1 ? m.given_v : m.given_u);
  record.new_outer = static_cast<float*>(m.outer == 1 ? m.u : m.v);
  record.new_inner = static_cast<float*>(m.outer == 1 ? m.v : m.u);
  record.sigma = static_cast<float*>(m.sigma);
  record.lines = m.lines();
  record.length = m.line_size();
  record.width = width_of(m);
  record.chunk = static_cast<int>(chunk_of(record));
  record.fused = (m.outer == 1) != v_first;
  const int access = access_of<T>(record.length, m.weight, m.out, record.inner, record.new_inner);
  record.aligned = access > 1;
  while ((1 << record.lanes_log2) < kThreads && (1 << record.lanes_log2) * access < record.length) ++record.lanes_log2;
  return record;
}

// Gives each weight its part of the scratch memory; returns the bytes of all.
int64_t lay_out(Group<Weight>& group, void* base) {
  int64_t bytes = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(base) + bytes);
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 2 * kAccess) * 2 * kAccess;
  };
  for (int i = 0; i < group.count; ++i) {
    Weight& m = group.of[i];
    take(m.products, m.inner_offset() + m.inner_size());
    take(m.parts, m.chunks() * m.inner_size());
    take(m.sums, m.chunks() + m.inner_blocks());
  }
  return bytes;
}

template <class T>
void normalize(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
               const Queue& queue) {
  for (size_t begin = 0; begin < matrices.size(); begin += kMost) {
    Group<Weight> group{};
    group.count = static_cast<int>(std::min<size_t>(kMost, matrices.size() - begin));
    for (int i = 0; i < group.count; ++i) group.of[i] = record_of<T>(matrices[begin + i], v_first);
    lay_out(group, queue.scratch(lay_out(group, nullptr)));
    const auto run_multiply = [&](Pass pass) {
      const dim3 blocks = group.grid([&](const Weight& m) { return pass == Pass::second && m.fused ? 0 : m.chunks(); });
      launch(queue, multiply<T>, blocks, kThreads, kShared, group, pass);
    };
    const auto run_finish = [&](bool iterate, bool scale) {
      const dim3 blocks = group.grid([&](const Weight& m) {
        return std::max<int64_t>(
            1, ceil_div(std::max({scale && m.out ? m.size() : 0, m.outer_size(), m.inner_size()}), kChunk));
      });
      launch(queue, finish<T>, blocks, kThreads, kShared, group, eps, iterate, scale);
    };
    for (int64_t step = 0; step < iterations; ++step) {
      run_multiply(Pass::first);
      launch(queue, add_parts, group.grid([](const Weight& m) { return m.inner_blocks(); }), kThreads, kShared, group);
      run_multiply(Pass::second);
      run_finish(true, step == iterations - 1);
      for (int i = 0; i < group.count; ++i) {
        group.of[i].outer = group.of[i].new_outer;
        group.of[i].inner = group.of[i].new_inner;
      }
    }
    if (iterations > 0) continue;
    run_multiply(Pass::evaluate);
    run_finish(false, true);
  }
}

template <class T>
void differentiate_all(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                       const Queue& queue) {
  for (size_t begin = 0; begin < matrices.size(); begin += kMost) {
    Group<WeightGrad> group{};
    group.count = static_cast<int>(std::min<size_t>(kMost, matrices.size() - begin));
    double* sums = static_cast<double*>(queue.scratch(group.count * kMostParts * sizeof(double)));
    for (int i = 0; i < group.count; ++i, sums += kMostParts) {
      const SpectralMatrix& m = matrices[begin + i];
      const SpectralMatrixGrad& grad = grads[begin + i];
      const float *const u = static_cast<const float*>(m.given_u), *const v = static_cast<const float*>(m.given_v);
      WeightGrad& record = group.of[i];
      record = {m.weight,
                grad.grad_out,
                grad.grad_weight,
                m.outer == 1 ? u : v,
                m.outer == 1 ? v : u,
                static_cast<const float*>(m.sigma),
                static_cast<const float*>(grad.grad_sigma),
                sums,
                m.lines(),
                m.line_size(),
                width_of(m),
                false};
      record.aligned = access_of<T>(record.length, m.weight, grad.grad_out, grad.grad_weight, record.inner) > 1;
    }
    launch(queue, dot<T>, group.grid([](const WeightGrad& m) { return m.blocks(); }), kThreads, kShared, group);
    const dim3 blocks = group.grid([](const WeightGrad& m) { return ceil_div(m.size(), kChunk); });
    launch(queue, differentiate<T>, blocks, kThreads, kShared, group);
  }
}

}  // namespace

void spectral_norm(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                   const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(matrices[0].dtype, normalize, matrices, iterations, eps, v_first, queue)
}

void spectral_norm_backward(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                            const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(matrices[0].dtype, differentiate_all, matrices, grads, queue)
}

}  // namespace fastgen::cuda
