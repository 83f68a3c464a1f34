// weight / sigma for many weights by power iteration (Miyato et al., Spectral Normalization for Generative Adversarial
// Networks, 2018): a fixed number of launches for up to kMaxWeights weights, which are kernel parameters.
//
// The terms are defined at SpectralMatrix (shared/problems.h). A weight is `lines` of `line_size` elements, in which
// `width` columns are adjacent. The `line` vector, (lines, width), is u if the lines are the matrix's rows, else v; the
// `summed` vector, (line_size / width), is the other one. A block multiplies a chunk of lines: it completes their
// elements of the line product, then reads the lines again from the cache for its part of the summed product; another
// launch adds the parts. If the line product comes first in a step, one pass computes both products (`fused`); else the
// first pass computes the summed product and a second pass the line product. The second product uses the first one
// before it is normalized, so norms and sigma = second . (W first) / |first| need no further pass.
//
// Products are float32, norms float64, summed in an order that depends only on the weight's shape.
#include <algorithm>
#include "cuda/spectral_products.cuh"

namespace fastgen::cuda {
namespace {

using namespace spectral;

enum class Pass { first, second, evaluate };  // evaluate: sigma of the input vectors

static_assert(sizeof(Group<Weight>) + 2 * sizeof(double) <= 4096);

// Grid: one block per chunk of each weight; in the second pass only for weights that are not fused.
template <class T>
__global__ void __launch_bounds__(kThreads) multiply(const __grid_constant__ Group<Weight> group, Pass pass) {
  constexpr int widest = kAccess / sizeof(T);
  const Work work(group);
  const Weight& m = group.records[work.index];
  const int64_t first = work.number * m.chunk;
  const Chunk chunk{work.number, first, min(static_cast<int64_t>(m.chunk), m.lines - first), pass == Pass::evaluate};
  if (m.fused || pass != Pass::first) {
    const float* const factor = pass == Pass::second ? m.summed_product() : m.summed_vector;
    double total = m.width > 1 ? multiply_columns<T>(m, chunk, factor)
                   : m.aligned ? multiply_lines<T, widest>(m, chunk, factor)
                               : multiply_lines<T, 1>(m, chunk, factor);
    total = block_total(total);
    if (threadIdx.x == 0) m.line_sums()[work.number] = total;
    __syncthreads();
  }
  if (pass != Pass::first) return;
  const float* const factor = m.fused ? m.line_product() : m.line_vector;
  if (m.width > 1) add_columns<T>(m, chunk, factor);
  else if (m.aligned) add_lines<T, widest>(m, chunk, factor);
  else add_lines<T, 1>(m, chunk, factor);
}

// The summed product from its parts. Grid: up to kMaxSums blocks per weight; a block adds kWarp elements at a time,
// with the parts divided among its warps in turn.
__global__ void __launch_bounds__(kThreads) add_parts(const __grid_constant__ Group<Weight> group) {
  constexpr int warps = kThreads / kWarp;
  const Work work(group);
  const Weight& m = group.records[work.index];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t size = m.summed_vector_size(), chunks = m.chunks();
  float* const scratch = shared_memory<float>();
  double total = 0;
  for (int64_t first = work.number * kWarp; first < size; first += work.blocks * kWarp) {
    const int64_t at = first + lane;
    float sum = 0;
    if (at < size)
#pragma unroll 8
      for (int64_t i = warp; i < chunks; i += warps) sum += m.parts[i * size + at];
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && at < size) {
      for (int i = 1; i < warps; ++i) sum += scratch[i * kWarp + lane];
      m.summed_product()[at] = sum;
      total += static_cast<double>(sum) * sum;
    }
    __syncthreads();
  }
  total = block_total(total);
  if (threadIdx.x == 0) m.summed_sums()[work.number] = total;
}

// The divisors of the last pass; the first thread computes them for the block.
struct Divisors {
  double line, summed;
  float sigma;

  __device__ Divisors(const Weight& m, double eps, bool iterate) {
    Divisors* const shared = reinterpret_cast<Divisors*>(shared_memory<double>() + kThreads / kWarp);
    const double line_total = total_of(m.line_sums(), m.chunks());
    const double summed_total = iterate ? total_of(m.summed_sums(), m.summed_blocks()) : 0;
    if (threadIdx.x == 0) {
      if (iterate) {
        const double size = sqrt(m.fused ? line_total : summed_total),
                     first = size < eps ? eps : size;  // NaN stays NaN
        const double norm = sqrt(m.fused ? summed_total : line_total) / first, second = norm < eps ? eps : norm;
        shared->line = m.fused ? first : first * second;
        shared->summed = m.fused ? first * second : first;
        shared->sigma = static_cast<float>(norm * (norm / second));
      } else {
        shared->sigma = static_cast<float>(line_total);
      }
    }
    __syncthreads();
    *this = *shared;
  }
};

template <class T, int access>
__device__ void finish_block(const Weight& m, const Work& work, double eps, bool iterate, bool scale) {
  const Elements<access> elements{work.number * kBlock, m.size()};
  float values[kPerThread];
  if (scale && m.out) elements.load_all(static_cast<const T*>(m.weight), values);  // loads while the norms are added
  const Divisors divisors(m, eps, iterate);
  for (int64_t i = elements.start + threadIdx.x; i < elements.start + kBlock; i += kThreads) {
    if (i < m.line_vector_size())
      m.new_line_vector[i] = iterate ? static_cast<float>(m.line_product()[i] / divisors.line) : m.line_vector[i];
    if (i < m.summed_vector_size())
      m.new_summed_vector[i] =
          iterate ? static_cast<float>(m.summed_product()[i] / divisors.summed) : m.summed_vector[i];
  }
  if (!scale) return;
  if (work.number == 0 && threadIdx.x == 0) *m.sigma = divisors.sigma;
  if (!m.out) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) values[i] /= divisors.sigma;
  elements.store_all(static_cast<T*>(m.out), values);
}

// iterate: computes u and v from the products; else copies them. scale: computes sigma and, if out is not null, weight
// / sigma. Grid: one block per kBlock elements of each weight, or of its longer vector.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ Group<Weight> group, double eps, bool iterate, bool scale) {
  const Work work(group);
  const Weight& m = group.records[work.index];
  if (m.aligned) finish_block<T, kAccess / sizeof(T)>(m, work, eps, iterate, scale);
  else finish_block<T, 1>(m, work, eps, iterate, scale);
}

// Lines per block: enough to fill it and to keep the parts of the summed product few, but few enough to stay in the
// cache and to give every multiprocessor a block.
int64_t chunk_of(const Weight& m) {
  if (m.width > 1) return std::max<int64_t>(kBatch, ceil_div(m.lines, 256));
  const int64_t small = ceil_div(4096, std::max<int64_t>(1, m.line_size)),
                large = std::min<int64_t>(16, ceil_div(m.lines, 128));
  return std::max({int64_t{1}, std::min(small, m.lines), large, ceil_div(m.lines, 2 * kMaxSums)});
}

template <class T>
Weight record_of(const SpectralMatrix& m, bool v_first) {
  Weight record{};
  record.weight = m.weight;
  record.out = m.out;
  record.line_vector = static_cast<const float*>(m.outer == 1 ? m.input_u : m.input_v);
  record.summed_vector = static_cast<const float*>(m.outer == 1 ? m.input_v : m.input_u);
  record.new_line_vector = static_cast<float*>(m.outer == 1 ? m.u : m.v);
  record.new_summed_vector = static_cast<float*>(m.outer == 1 ? m.v : m.u);
  record.sigma = static_cast<float*>(m.sigma);
  record.lines = m.lines();
  record.line_size = m.line_size();
  record.width = width_of(m);
  record.chunk = static_cast<int>(chunk_of(record));
  record.fused = (m.outer == 1) != v_first;
  const int access = access_of<T>(record.line_size, m.weight, m.out, record.summed_vector, record.new_summed_vector);
  record.aligned = access > 1;
  while ((1 << record.lanes_log2) < kThreads && (1 << record.lanes_log2) * access < record.line_size)
    ++record.lanes_log2;
  return record;
}

// Assigns each weight its part of the scratch memory at `base`; returns the bytes of all parts.
int64_t lay_out(Group<Weight>& group, void* base) {
  int64_t bytes = 0;
  const auto allocate = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(base) + bytes);
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 2 * kAccess) * 2 * kAccess;
  };
  for (int i = 0; i < group.count; ++i) {
    Weight& m = group.records[i];
    allocate(m.products, m.summed_offset() + m.summed_vector_size());
    allocate(m.parts, m.chunks() * m.summed_vector_size());
    allocate(m.sums, m.chunks() + m.summed_blocks());
  }
  return bytes;
}

template <class T>
void normalize(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
               const Queue& queue) {
  for (size_t begin = 0; begin < matrices.size(); begin += kMaxWeights) {
    Group<Weight> group{};
    group.count = static_cast<int>(std::min<size_t>(kMaxWeights, matrices.size() - begin));
    for (int i = 0; i < group.count; ++i) group.records[i] = record_of<T>(matrices[begin + i], v_first);
    lay_out(group, queue.scratch(lay_out(group, nullptr)));
    const auto run_multiply = [&](Pass pass) {
      const dim3 blocks = group.grid([&](const Weight& m) { return pass == Pass::second && m.fused ? 0 : m.chunks(); });
      launch(queue, multiply<T>, blocks, kThreads, kShared, group, pass);
    };
    const auto run_finish = [&](bool iterate, bool scale) {
      const dim3 blocks = group.grid([&](const Weight& m) {
        return std::max<int64_t>(
            1,
            ceil_div(std::max({scale && m.out ? m.size() : 0, m.line_vector_size(), m.summed_vector_size()}), kBlock));
      });
      launch(queue, finish<T>, blocks, kThreads, kShared, group, eps, iterate, scale);
    };
    for (int64_t step = 0; step < iterations; ++step) {
      run_multiply(Pass::first);
      launch(queue, add_parts, group.grid([](const Weight& m) { return m.summed_blocks(); }), kThreads, kShared, group);
      run_multiply(Pass::second);
      run_finish(true, step == iterations - 1);
      for (int i = 0; i < group.count; ++i) {
        group.records[i].line_vector = group.records[i].new_line_vector;
        group.records[i].summed_vector = group.records[i].new_summed_vector;
      }
    }
    if (iterations > 0) continue;
    run_multiply(Pass::evaluate);
    run_finish(false, true);
  }
}

}  // namespace

void spectral_norm(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                   const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(matrices[0].dtype, normalize, matrices, iterations, eps, v_first, queue)
}

}  // namespace fastgen::cuda
