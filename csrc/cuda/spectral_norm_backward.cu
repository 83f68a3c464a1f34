// The gradient of weight / sigma and sigma (spectral_norm.cu), with u and v as constants.
#include "cuda/spectral_norm.cuh"

namespace fastgen::cuda {
namespace {

using namespace spectral;

// The gradient of one weight.
struct WeightGrad {
  const void *weight, *grad_out;
  void* out;
  const float *line_vector, *summed_vector, *sigma, *grad_sigma;
  double* sums;  // one per block, for grad_out . weight
  int64_t lines, line_size;
  int width;
  bool aligned;

  FASTGEN_HD int64_t size() const { return lines * line_size; }
  FASTGEN_HD int64_t blocks() const { return summing_blocks(ceil_div(size(), kBlock)); }
};

static_assert(sizeof(Group<WeightGrad>) <= 4096);

__device__ int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

template <class T, int access>
__device__ double dot_of(const WeightGrad& m, const Work& work) {
  double total = 0;
  for (int64_t start = work.number * kBlock; start < m.size(); start += work.blocks * kBlock) {
    const Elements<access> elements{start, m.size()};
    float weight[kPerThread], grad[kPerThread], sum = 0;
    elements.load_all(static_cast<const T*>(m.weight), weight);
    elements.load_all(static_cast<const T*>(m.grad_out), grad);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += weight[i] * grad[i];
    total += sum;
  }
  return total;
}

// Partial sums of grad_out . weight. Grid: up to kMaxSums blocks per weight.
template <class T>
__global__ void __launch_bounds__(kThreads) dot(const __grid_constant__ Group<WeightGrad> group) {
  const Work work(group);
  const WeightGrad& m = group.records[work.index];
  const double total = block_total(m.aligned ? dot_of<T, kAccess / sizeof(T)>(m, work) : dot_of<T, 1>(m, work));
  if (threadIdx.x == 0) m.sums[work.number] = total;
}

template <class T, int access>
__device__ void differentiate_block(const WeightGrad& m, const Work& work) {
  const Elements<access> elements{work.number * kBlock, m.size()};
  float values[kPerThread];
  elements.load_all(static_cast<const T*>(m.grad_out), values);
  const double total = total_of(m.sums, m.blocks());
  float* const shared = shared_memory<float>() + 2 * kThreads / kWarp;
  const float sigma = *m.sigma;
  if (threadIdx.x == 0) *shared = static_cast<float>(*m.grad_sigma - total / (static_cast<double>(sigma) * sigma));
  __syncthreads();
  const float slope = *shared;
#pragma unroll
  for (int i = 0; i < kPerThread; i += access) {
    const int64_t at = elements.at(i);
    if (at >= m.size()) break;
    const int64_t line = divide(at, m.line_size), in_line = at - line * m.line_size;
    float summed_values[access], line_values[access];
    if (m.width == 1) {
      load_floats(m.summed_vector + in_line, summed_values);
      const float line_value = m.line_vector[line];
#pragma unroll
      for (int j = 0; j < access; ++j) line_values[j] = line_value;
    } else {
      int64_t row = divide(in_line, m.width), column = in_line - row * m.width;
#pragma unroll
      for (int j = 0; j < access; ++j) {
        summed_values[j] = m.summed_vector[row];
        line_values[j] = m.line_vector[line * m.width + column];
        if (++column == m.width) {
          column = 0;
          ++row;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < access; ++j) values[i + j] = values[i + j] / sigma + slope * line_values[j] * summed_values[j];
  }
  elements.store_all(static_cast<T*>(m.out), values);
}

// grad_out / sigma + (grad_sigma - grad_out . weight / sigma^2) u v^T. Grid: one block per kBlock elements.
template <class T>
__global__ void __launch_bounds__(kThreads) differentiate(const __grid_constant__ Group<WeightGrad> group) {
  const Work work(group);
  const WeightGrad& m = group.records[work.index];
  if (m.aligned) differentiate_block<T, kAccess / sizeof(T)>(m, work);
  else differentiate_block<T, 1>(m, work);
}

template <class T>
void differentiate_all(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                       const Queue& queue) {
  for (size_t begin = 0; begin < matrices.size(); begin += kMaxWeights) {
    Group<WeightGrad> group{};
    group.count = static_cast<int>(std::min<size_t>(kMaxWeights, matrices.size() - begin));
    double* sums = static_cast<double*>(queue.scratch(group.count * kMaxSums * sizeof(double)));
    for (int i = 0; i < group.count; ++i, sums += kMaxSums) {
      const SpectralMatrix& m = matrices[begin + i];
      const SpectralMatrixGrad& grad = grads[begin + i];
      const float *const u = static_cast<const float*>(m.input_u), *const v = static_cast<const float*>(m.input_v);
      WeightGrad& record = group.records[i];
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
      record.aligned =
          access_of<T>(record.line_size, m.weight, grad.grad_out, grad.grad_weight, record.summed_vector) > 1;
    }
    launch(queue, dot<T>, group.grid([](const WeightGrad& m) { return m.blocks(); }), kThreads, kShared, group);
    const dim3 blocks = group.grid([](const WeightGrad& m) { return ceil_div(m.size(), kBlock); });
    launch(queue, differentiate<T>, blocks, kThreads, kShared, group);
  }
}

}  // namespace

void spectral_norm_backward(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                            const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(matrices[0].dtype, differentiate_all, matrices, grads, queue)
}

}  // namespace fastgen::cuda
