// The gradients of norm_act (norm_act.cu) in two passes: sums over each channel, then the gradient of each element.
#include "cuda/activation.cuh"
#include "cuda/norm_act.cuh"

namespace fastgen::cuda {
namespace {

using namespace norm_act;

// g, the gradient of the activation's input, and the normalized x for one access.
template <class T, bool channels_last, int access, int channels>
__device__ void gradient_of_z(const Epilogue& op, const Scales<channels>& scales, const T* grad_out, const T* x,
                              const T* residual, int64_t at, float (&g)[access], float (&normalized)[access]) {
  float added[access] = {};
  load<access>(grad_out + at, g);
  load<access>(x + at, normalized);
  if (residual) load<access>(residual + at, added);
#pragma unroll
  for (int i = 0; i < access; ++i) {
    const int j = channels_last ? i : 0;
    normalized[i] = (normalized[i] - scales.center[j]) * scales.rstd[j];
    const float z = normalized[i] * scales.gain[j] + scales.shift[j] + added[i];
    g[i] = activate_grad(op.activation, g[i], z, static_cast<float>(op.negative_slope));
  }
}

// Sums of g and of g * normalized x over each line's chunk. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2) backward_sums(Tiling tiling, int64_t samples, Epilogue op,
                                                             const T* grad_out, const T* x, float* sums, float* dots) {
  constexpr int channels = kChannels<channels_last, access>;
  const Slice<channels_last, access> slice(tiling);
  float sum[channels] = {}, dot[channels] = {};
  if (slice.valid) {
    const Scales<channels> scales(op, slice.sample, slice.channel);
    int64_t at = slice.at;
    for (int64_t left = slice.count; left > 0; --left, at += slice.advance) {
      float g[access], normalized[access];
      gradient_of_z<T, channels_last>(op, scales, grad_out, x, static_cast<const T*>(op.residual), at, g, normalized);
#pragma unroll
      for (int i = 0; i < access; ++i) {
        sum[channels_last ? i : 0] += g[i];
        dot[channels_last ? i : 0] += g[i] * normalized[i];
      }
    }
  }
  float* const shared = shared_memory<float>();
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    float* const slot = shared + 2 * (slice.lane * slice.deep + slice.depth);
    slot[0] = sum[i];
    slot[1] = dot[i];
    __syncthreads();
    for (int half = slice.deep / 2; half > 0; half /= 2) {
      if (slice.depth < half) {
        slot[0] += slot[2 * half];
        slot[1] += slot[2 * half + 1];
      }
      __syncthreads();
    }
    if (slice.valid && slice.depth == 0) {
      const int64_t at = part_at(tiling, samples, slice.sample, slice.channel + i);
      sums[at] = slot[0];
      dots[at] = slot[1];
    }
    __syncthreads();
  }
}

// The gradients of weight and bias, one team per channel. With statistics of x also the means over each statistics
// group of gain * g and of gain * g * normalized x, one team per group. The first `channels` teams each handle a
// channel, the next `groups` teams a group.
__global__ void __launch_bounds__(kThreads, 2)
    merge_sums(StatGroups stats, int team, int64_t channels, int64_t groups, float count, const float* weight,
               const float* sums, const float* dots, float* grad_bias, float* grad_weight, float* mean_sums,
               float* mean_dots) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team,
                group = index - channels;
  const bool is_channel = index < channels, is_group = !is_channel && group < groups,
             one_sample = is_group && stats.per_sample;
  const int64_t width = is_channel ? 1 : stats.channels, samples = one_sample ? 1 : stats.n,
                sample = one_sample ? group / stats.groups : 0;
  const int64_t first = is_channel ? index : group % stats.groups * stats.channels;
  const int64_t parts = is_channel || is_group ? stats.splits * samples * width : 0;
  float sum = 0, dot = 0;
  for (int64_t i = threadIdx.x % team; i < parts; i += team) {
    const int64_t row = i / width, channel = first + i % width,
                  at = (row / samples * stats.n + sample + row % samples) * stats.c + channel;
    const float gain = is_group && weight ? weight[channel] : 1.f;
    sum += gain * sums[at];
    dot += gain * dots[at];
  }
  sum = team_sum(sum, team, shared_memory<float>());
  dot = team_sum(dot, team, shared_memory<float>() + kThreads / kWarp);
  if (threadIdx.x % team != 0) return;
  if (is_channel) {
    grad_bias[index] = sum;
    grad_weight[index] = dot;
  } else if (is_group) {
    mean_sums[group] = sum / count;
    mean_dots[group] = dot / count;
  }
}

// The gradient of each element. mean_sums: null unless the statistics are those of x. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2)
    backward_apply(Tiling tiling, Epilogue op, const T* grad_out, const T* x, const float* mean_sums,
                   const float* mean_dots, T* grad_x, T* grad_residual) {
  constexpr int channels = kChannels<channels_last, access>;
  const Slice<channels_last, access> slice(tiling);
  if (!slice.valid) return;
  const Scales<channels> scales(op, slice.sample, slice.channel);
  float mean_sum[channels] = {}, mean_dot[channels] = {};
  if (mean_sums) {
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int64_t group =
          (op.per_sample ? slice.sample * op.stats_groups : 0) + (slice.channel + i) / (op.c / op.stats_groups);
      mean_sum[i] = mean_sums[group];
      mean_dot[i] = mean_dots[group];
    }
  }
  int64_t at = slice.at;
  for (int64_t left = slice.count; left > 0; --left, at += slice.advance) {
    float g[access], normalized[access];
    gradient_of_z<T, channels_last>(op, scales, grad_out, x, static_cast<const T*>(op.residual), at, g, normalized);
    if (grad_residual) store<access>(grad_residual + at, g);
#pragma unroll
    for (int i = 0; i < access; ++i) {
      const int j = channels_last ? i : 0;
      g[i] = (g[i] * scales.gain[j] - mean_sum[j] - normalized[i] * mean_dot[j]) * scales.rstd[j];
    }
    store<access>(grad_x + at, g);
  }
}

template <class T>
void launch_backward(const Epilogue& op, const void* grad_out, const void* x, const NormActGrads& grads,
                     const Queue& queue) {
  with_layout<T>(
      op,
      [&](auto channels_last, auto access) {
        constexpr bool last = decltype(channels_last)::value;
        constexpr int width = decltype(access)::value;
        const Tiling tiling = tile<last>(op, access, queue);
        const T *const typed_grad = static_cast<const T*>(grad_out), *const typed_x = static_cast<const T*>(x);
        float *mean_sums = nullptr, *mean_dots = nullptr;
        if (op.normalize) {
          const StatGroups groups(op, tiling.splits);
          const int64_t parts = tiling.splits * op.n * op.c, count = op.batch_stats ? groups.count() : 0;
          float* const sums = static_cast<float*>(queue.scratch((2 * parts + 2 * count) * sizeof(float)));
          float* const dots = sums + parts;
          if (op.batch_stats) {
            mean_sums = dots + parts;
            mean_dots = mean_sums + count;
          }
          launch(queue, backward_sums<T, last, width>, grid<last>(tiling), kThreads, kThreads * 2 * int(sizeof(float)),
                 tiling, op.n, op, typed_grad, typed_x, sums, dots);
          const float values = static_cast<float>(op.n * op.c * op.s / groups.count());
          const int team = team_for(tiling.splits * op.n, kThreads);
          launch(queue, merge_sums, grid_of_teams(op.c + count, team, kThreads), kThreads,
                 kThreads / kWarp * 2 * int(sizeof(float)), groups, team, op.c, count, values,
                 static_cast<const float*>(op.norm_weight), sums, dots, static_cast<float*>(grads.bias),
                 static_cast<float*>(grads.weight), mean_sums, mean_dots);
        }
        launch(queue, backward_apply<T, last, width>, grid<last>(tiling), kThreads, 0, tiling, op, typed_grad, typed_x,
               mean_sums, mean_dots, static_cast<T*>(grads.x), static_cast<T*>(grads.residual));
      },
      grad_out, x, op.residual, grads.x, grads.residual);
}

}  // namespace

void norm_act_backward(const Epilogue& op, const void* grad_out, const void* x, const NormActGrads& grads,
                       const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, launch_backward, op, grad_out, x, grads, queue)
}

}  // namespace fastgen::cuda
