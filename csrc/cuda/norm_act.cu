// y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual): one pass for the statistics and one to apply
// them. Sums are float32, in an order that depends only on the shape.
#include "cuda/norm_act.cuh"

#include "cuda/activation.cuh"
#include "cuda/statistics.cuh"
#include "shared/welford.h"

namespace fastgen::cuda {
namespace {

using namespace norm_act;

// Mean and sum of squared deviations of each line's chunk. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2)
    moments(Tiling tiling, int64_t samples, const T* x, float* counts, float* means, float* m2s) {
  constexpr int channels = kChannels<channels_last, access>;
  const Slice<channels_last, access> slice(tiling);
  Moments<float> running[channels];
  int64_t at = slice.at;
  for (int64_t left = slice.count; left > 0; --left, at += slice.advance) {  // Welford, 1962
    float values[access];
    load<access>(x + at, values);
    if constexpr (channels_last) {
      const float count = running[0].count + 1, share = 1 / count;
#pragma unroll
      for (int i = 0; i < channels; ++i) {
        const float delta = values[i] - running[i].mean;
        running[i].count = count;
        running[i].mean += delta * share;
        running[i].m2 += delta * (values[i] - running[i].mean);
      }
    } else {
      Moments<float> read;
      read.count = access;
#pragma unroll
      for (int i = 0; i < access; ++i) read.mean += values[i];
      read.mean /= access;
#pragma unroll
      for (int i = 0; i < access; ++i) read.m2 += (values[i] - read.mean) * (values[i] - read.mean);
      running[0].merge(read);
    }
  }
  Moments<float>* const shared = shared_memory<Moments<float>>();
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    Moments<float>* const slot = shared + slice.lane * slice.deep + slice.depth;
    *slot = running[i];
    __syncthreads();
    for (int half = slice.deep / 2; half > 0; half /= 2) {
      if (slice.depth < half) {
        running[i].merge(slot[half]);
        *slot = running[i];
      }
      __syncthreads();
    }
    if (slice.valid && slice.depth == 0) {
      const int64_t at = part_at(tiling, samples, slice.sample, slice.channel + i);
      counts[at] = running[i].count;
      means[at] = running[i].mean;
      m2s[at] = running[i].m2;
    }
    __syncthreads();
  }
}

// Merges the partial statistics of each group to mean and var: one team per group. `shared_counts`: counts are (splits
// * n), the same for all channels.
__global__ void __launch_bounds__(kThreads, 2)
    merge(StatGroups stats, int team, bool shared_counts, const float* counts, const float* means, const float* m2s,
          float* mean, float* var) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  const int64_t samples = stats.samples(), sample = stats.per_sample ? group / stats.groups : 0,
                first = group % stats.groups * stats.channels;
  const bool valid = group < stats.count();
  const int64_t parts = valid ? stats.splits * samples * stats.channels : 0;
  Moments<float> total;
  for (int64_t i = threadIdx.x % team; i < parts; i += team) {
    const int64_t row = i / stats.channels, line = row / samples * stats.n + sample + row % samples,
                  at = line * stats.c + first + i % stats.channels;
    Moments<float> part;
    part.count = counts[shared_counts ? line : at];
    part.mean = means[at];
    part.m2 = m2s[at];
    total.merge(part);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Moments<float> other;
    other.count = __shfl_xor_sync(kAllLanes, total.count, step);
    other.mean = __shfl_xor_sync(kAllLanes, total.mean, step);
    other.m2 = __shfl_xor_sync(kAllLanes, total.m2, step);
    total.merge(other);
  }
  Moments<float>* const warp_totals = shared_memory<Moments<float>>();
  if (threadIdx.x % kWarp == 0) warp_totals[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (!valid || threadIdx.x % team != 0) return;
  for (int i = 1; i < team / kWarp; ++i) total.merge(warp_totals[threadIdx.x / kWarp + i]);
  mean[group] = total.mean;
  var[group] = total.m2 / total.count;
}

// The second pass: computes y from x. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2) apply(Tiling tiling, Epilogue op, const T* x, T* out) {
  constexpr int channels = kChannels<channels_last, access>;
  const Slice<channels_last, access> slice(tiling);
  if (!slice.valid) return;
  const Scales<channels> scales(op, slice.sample, slice.channel);
  const T* const residual = static_cast<const T*>(op.residual);
  int64_t at = slice.at;
  for (int64_t left = slice.count; left > 0; --left, at += slice.advance) {
    float values[access], added[access] = {};
    load<access>(x + at, values);
    if (residual) load<access>(residual + at, added);
#pragma unroll
    for (int i = 0; i < access; ++i) {
      const int j = channels_last ? i : 0;
      values[i] = (values[i] - scales.center[j]) * scales.rstd[j] * scales.gain[j] + scales.shift[j] + added[i];
    }
    activate(op.activation, values, static_cast<float>(op.negative_slope));
    store<access>(out + at, values);
  }
}

void merge_parts(const StatGroups& stats, bool shared_counts, const float* counts, const float* means, const float* m2s,
                 void* mean, void* var, const Queue& queue) {
  const int team = team_for(stats.splits * stats.samples() * stats.channels, kThreads);
  launch(queue, merge, grid_of_teams(stats.count(), team, kThreads), kThreads,
         kThreads / kWarp * int(sizeof(Moments<float>)), stats, team, shared_counts, counts, means, m2s,
         static_cast<float*>(mean), static_cast<float*>(var));
}

template <class T>
void launch_moments(const Epilogue& op, const void* x, void* mean, void* var, const Queue& queue) {
  with_layout<T>(
      op,
      [&](auto channels_last, auto access) {
        constexpr bool last = decltype(channels_last)::value;
        const Tiling tiling = tile<last>(op, access, queue);
        const int64_t parts = tiling.splits * op.n * op.c;
        float* const counts = static_cast<float*>(queue.scratch(3 * parts * sizeof(float)));
        launch(queue, moments<T, last, decltype(access)::value>, grid<last>(tiling), kThreads,
               kThreads * int(sizeof(Moments<float>)), tiling, op.n, static_cast<const T*>(x), counts, counts + parts,
               counts + 2 * parts);
        merge_parts(StatGroups(op, tiling.splits), false, counts, counts + parts, counts + 2 * parts, mean, var, queue);
      },
      x);
}

template <class T>
void launch_apply(const Epilogue& op, const void* x, void* out, const Queue& queue) {
  with_layout<T>(
      op,
      [&](auto channels_last, auto access) {
        constexpr bool last = decltype(channels_last)::value;
        const Tiling tiling = tile<last>(op, access, queue);
        launch(queue, apply<T, last, decltype(access)::value>, grid<last>(tiling), kThreads, 0, tiling, op,
               static_cast<const T*>(x), static_cast<T*>(out));
      },
      x, op.residual, out);
}

}  // namespace

void norm_act_moments(const Epilogue& op, const void* x, void* mean, void* var, const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, launch_moments, op, x, mean, var, queue)
}

void merge_moments(const Epilogue& op, const float* counts, const float* means, const float* m2s, int64_t parts,
                   void* mean, void* var, const Queue& queue) {
  StatGroups channels(op, static_cast<int>(parts));
  channels.n = 1;  // a part may cover several samples
  merge_parts(channels, true, counts, means, m2s, mean, var, queue);
}

void norm_act_apply(const Epilogue& op, const void* x, void* out, const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, launch_apply, op, x, out, queue)
}

}  // namespace fastgen::cuda
