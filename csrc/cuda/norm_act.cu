// y = act((x - mean) / sqrt(var + eps) * weight + bias + residual) and its gradients: a pass for the statistics and one
// to apply them, two passes for the gradients. Sums are float32, in an order that the shape alone decides.
//
// A pass sees x as n samples of c channels of s pixels. The values of one channel of one sample are a line; in
// channels_last order they are c apart. Lines are cut into `splits` chunks of `chunk` accesses, so that few lines fill
// the chip too. A block has kThreads threads: `lanes` neighbouring places side by side along memory and kThreads /
// lanes further on. channels_last: the lanes are accesses to neighbouring channels; else they are neighbouring accesses
// to one line, and the block has several lines.
#include "cuda/norm_act.cuh"

#include <algorithm>

namespace fastgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostSplits = 64;
constexpr int kWave = 4;  // blocks of a multiprocessor that a pass asks for

// How a pass over x is cut up: blocks along channels (channels_last) or lines, times samples, times splits.
struct Cut {
  int64_t c, s;
  int64_t lines;      // in channels_last order accesses to channels, c / access; else lines, n * c
  int64_t length;     // accesses of a line: s, or s / access
  int64_t chunk;      // of them, for one block
  int splits, lanes;  // lanes: a power of 2, kThreads at most
  int64_t samples;    // n in channels_last order, else 1
};

template <bool channels_last>
Cut cut(const Epilogue& op, int access, const Queue& queue) {
  Cut cut{op.c,
          op.s,
          channels_last ? op.c / access : op.n * op.c,
          channels_last ? op.s : op.s / access,
          0,
          1,
          1,
          channels_last ? op.n : 1};
  const int64_t wide = channels_last ? cut.lines : cut.length;
  while (cut.lanes < (channels_last ? kWarp : kThreads) && cut.lanes < wide) cut.lanes *= 2;
  const int64_t deep = kThreads / cut.lanes;  // threads of a block that share a line, or lines of a block
  const int64_t blocks = ceil_div(cut.lines, channels_last ? cut.lanes : deep) * cut.samples;
  const int64_t least = channels_last ? 4 * deep : 4 * cut.lanes;  // accesses that are worth a block
  const int64_t wanted =
      std::min<int64_t>({kMostSplits, ceil_div(kWave * queue.multiprocessors, blocks), ceil_div(cut.length, least)});
  cut.chunk = ceil_div(cut.length, std::max<int64_t>(1, wanted));
  cut.splits = static_cast<int>(ceil_div(cut.length, cut.chunk));
  return cut;
}

template <bool channels_last>
dim3 grid(const Cut& cut) {
  const int64_t deep = kThreads / cut.lanes,
                blocks = ceil_div(cut.lines, channels_last ? cut.lanes : deep) * cut.samples;
  return dim3(static_cast<unsigned>(blocks), cut.splits);
}

// The part of a thread: `count` accesses, the first at element `at`, each `advance` from the last.
template <bool channels_last, int access>
struct Part {
  bool valid;
  int lane, depth, deep;    // place in the block: along the reduced direction there are `deep` threads
  int64_t sample, channel;  // of the first value
  int64_t at, advance, count;

  __device__ explicit Part(const Cut& cut) {
    const int column = threadIdx.x % cut.lanes, row = threadIdx.x / cut.lanes, rows = kThreads / cut.lanes;
    const int64_t per_block = channels_last ? cut.lanes : rows, blocks = (cut.lines + per_block - 1) / per_block;
    const int64_t line = blockIdx.x % blocks * per_block + (channels_last ? column : row);
    lane = channels_last ? column : row;
    depth = channels_last ? row : column;
    deep = channels_last ? rows : cut.lanes;
    valid = line < cut.lines;
    sample = channels_last ? blockIdx.x / blocks : line / cut.c;
    channel = channels_last ? line * access : line % cut.c;
    const int64_t first = blockIdx.y * cut.chunk + depth, stop = min((blockIdx.y + 1) * cut.chunk, cut.length);
    const int64_t step = channels_last ? cut.c : access;
    at = (channels_last ? sample * cut.s * cut.c + channel : line * cut.s) + first * step;
    advance = deep * step;
    count = valid && first < stop ? (stop - first + deep - 1) / deep : 0;
  }
};

// Values of a channel, or of neighbouring ones: one if an access lies in one line.
template <bool channels_last, int access>
constexpr int kOwn = channels_last ? access : 1;

// The parts that a pass leaves for the next: (splits, n, c).
__device__ inline int64_t part_at(const Cut& cut, int64_t samples, int64_t sample, int64_t channel) {
  return (blockIdx.y * samples + sample) * cut.c + channel;
}

// Mean and sum of squared deviations of each line's chunk. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2)
    moments(Cut cut, int64_t samples, const T* x, float* counts, float* means, float* m2s) {
  constexpr int own = kOwn<channels_last, access>;
  const Part<channels_last, access> part(cut);
  Moments<float> of[own];
  int64_t at = part.at;
  for (int64_t left = part.count; left > 0; --left, at += part.advance) {  // Welford, 1962
    float values[access];
    load<access>(x + at, values);
    if constexpr (channels_last) {
      const float count = of[0].count + 1, share = 1 / count;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const float delta = values[i] - of[i].mean;
        of[i].count = count;
        of[i].mean += delta * share;
        of[i].m2 += delta * (values[i] - of[i].mean);
      }
    } else {
      Moments<float> group;
      group.count = access;
#pragma unroll
      for (int i = 0; i < access; ++i) group.mean += values[i];
      group.mean /= access;
#pragma unroll
      for (int i = 0; i < access; ++i) group.m2 += (values[i] - group.mean) * (values[i] - group.mean);
      of[0].merge(group);
    }
  }
  Moments<float>* const shared = shared_memory<Moments<float>>();
#pragma unroll
  for (int i = 0; i < own; ++i) {
    Moments<float>* const mine = shared + part.lane * part.deep + part.depth;
    *mine = of[i];
    __syncthreads();
    for (int half = part.deep / 2; half > 0; half /= 2) {
      if (part.depth < half) {
        of[i].merge(mine[half]);
        *mine = of[i];
      }
      __syncthreads();
    }
    if (part.valid && part.depth == 0) {
      const int64_t at = part_at(cut, samples, part.sample, part.channel + i);
      counts[at] = of[i].count;
      means[at] = of[i].mean;
      m2s[at] = of[i].m2;
    }
    __syncthreads();
  }
}

// How the parts (splits, n, c) of a set of values that share statistics lie: those of `group` neighbouring channels, of
// one sample or of all.
struct Sets {
  int64_t c, n, sets, group;
  int splits;
  bool per_sample;
};

// Threads that merge the parts of one set: a warp, or the block where parts are many.
inline int team_for(int64_t parts) { return parts > 4 * kWarp ? kThreads : kWarp; }

inline dim3 grid_of_teams(int64_t teams, int team) {
  return dim3(static_cast<unsigned>(ceil_div(teams, kThreads / team)));
}

// mean and var of each set from its parts: a team a set. `shared_counts`: counts are (splits * n) and not for each
// channel.
__global__ void __launch_bounds__(kThreads, 2) merge(Sets of, int team, bool shared_counts, const float* counts,
                                                     const float* means, const float* m2s, float* mean, float* var) {
  const int64_t set = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  const int64_t rows = of.per_sample ? 1 : of.n, sample = of.per_sample ? set / of.sets : 0,
                first = set % of.sets * of.group;
  const bool valid = set < (of.per_sample ? of.n : 1) * of.sets;
  const int64_t parts = valid ? of.splits * rows * of.group : 0;
  Moments<float> total;
  for (int64_t i = threadIdx.x % team; i < parts; i += team) {
    const int64_t row = i / of.group, line = row / rows * of.n + sample + row % rows,
                  at = line * of.c + first + i % of.group;
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
  Moments<float>* const of_warps = shared_memory<Moments<float>>();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (!valid || threadIdx.x % team != 0) return;
  for (int i = 1; i < team / kWarp; ++i) total.merge(of_warps[threadIdx.x / kWarp + i]);
  mean[set] = total.mean;
  var[set] = total.m2 / total.count;
}

// What normalizes a thread's channels: z = (x - center) * gain + shift.
template <int own>
struct Scales {
  float center[own], rstd[own], gain[own], shift[own];

  __device__ Scales(const Epilogue& op, int64_t sample, int64_t channel) {
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int64_t set = (op.per_sample ? sample * op.stats_groups : 0) + (channel + i) / (op.c / op.stats_groups);
      center[i] = op.normalize ? static_cast<const float*>(op.mean)[set] : 0.f;
      rstd[i] = op.normalize ? 1 / sqrtf(static_cast<const float*>(op.var)[set] + static_cast<float>(op.eps)) : 1.f;
      gain[i] = op.normalize && op.norm_weight ? static_cast<const float*>(op.norm_weight)[channel + i] : 1.f;
      shift[i] = op.normalize && op.norm_bias ? static_cast<const float*>(op.norm_bias)[channel + i] : 0.f;
    }
  }
};

// The second pass. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2) apply(Cut cut, Epilogue op, const T* x, T* out) {
  constexpr int own = kOwn<channels_last, access>;
  const Part<channels_last, access> part(cut);
  if (!part.valid) return;
  const Scales<own> scales(op, part.sample, part.channel);
  const T* const residual = static_cast<const T*>(op.residual);
  int64_t at = part.at;
  for (int64_t left = part.count; left > 0; --left, at += part.advance) {
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

// g, the gradient before the activation, and the normalized x of one access.
template <class T, bool channels_last, int access, int own>
__device__ void gradient_of_z(const Epilogue& op, const Scales<own>& scales, const T* grad_out, const T* x,
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
__global__ void __launch_bounds__(kThreads, 2)
    backward_sums(Cut cut, int64_t samples, Epilogue op, const T* grad_out, const T* x, float* sums, float* dots) {
  constexpr int own = kOwn<channels_last, access>;
  const Part<channels_last, access> part(cut);
  float sum[own] = {}, dot[own] = {};
  if (part.valid) {
    const Scales<own> scales(op, part.sample, part.channel);
    int64_t at = part.at;
    for (int64_t left = part.count; left > 0; --left, at += part.advance) {
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
  for (int i = 0; i < own; ++i) {
    float* const mine = shared + 2 * (part.lane * part.deep + part.depth);
    mine[0] = sum[i];
    mine[1] = dot[i];
    __syncthreads();
    for (int half = part.deep / 2; half > 0; half /= 2) {
      if (part.depth < half) {
        mine[0] += mine[2 * half];
        mine[1] += mine[2 * half + 1];
      }
      __syncthreads();
    }
    if (part.valid && part.depth == 0) {
      const int64_t at = part_at(cut, samples, part.sample, part.channel + i);
      sums[at] = mine[0];
      dots[at] = mine[1];
    }
    __syncthreads();
  }
}

// The gradients of weight and bias, a team a channel; and, where statistics are of x, the means over each set of gain *
// g and of gain * g * normalized x, a team a set: teams below `channels` do the first.
__global__ void __launch_bounds__(kThreads, 2)
    merge_sums(Sets of, int team, int64_t channels, int64_t sets, float count, const float* weight, const float* sums,
               const float* dots, float* grad_bias, float* grad_weight, float* mean_sums, float* mean_dots) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team,
                set = index - channels;
  const bool of_channel = index < channels, of_set = !of_channel && set < sets, one_sample = of_set && of.per_sample;
  const int64_t group = of_channel ? 1 : of.group, rows = one_sample ? 1 : of.n,
                sample = one_sample ? set / of.sets : 0;
  const int64_t first = of_channel ? index : set % of.sets * of.group;
  const int64_t parts = of_channel || of_set ? of.splits * rows * group : 0;
  float sum = 0, dot = 0;
  for (int64_t i = threadIdx.x % team; i < parts; i += team) {
    const int64_t row = i / group, channel = first + i % group,
                  at = (row / rows * of.n + sample + row % rows) * of.c + channel;
    const float gain = of_set && weight ? weight[channel] : 1.f;
    sum += gain * sums[at];
    dot += gain * dots[at];
  }
  sum = team_sum(sum, team, shared_memory<float>());
  dot = team_sum(dot, team, shared_memory<float>() + kThreads / kWarp);
  if (threadIdx.x % team != 0) return;
  if (of_channel) {
    grad_bias[index] = sum;
    grad_weight[index] = dot;
  } else if (of_set) {
    mean_sums[set] = sum / count;
    mean_dots[set] = dot / count;
  }
}

// The second pass of the gradients. mean_sums: null where statistics are not of x. Grid: `grid`.
template <class T, bool channels_last, int access>
__global__ void __launch_bounds__(kThreads, 2)
    backward_apply(Cut cut, Epilogue op, const T* grad_out, const T* x, const float* mean_sums, const float* mean_dots,
                   T* grad_x, T* grad_residual) {
  constexpr int own = kOwn<channels_last, access>;
  const Part<channels_last, access> part(cut);
  if (!part.valid) return;
  const Scales<own> scales(op, part.sample, part.channel);
  float mean_sum[own] = {}, mean_dot[own] = {};
  if (mean_sums) {
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int64_t set =
          (op.per_sample ? part.sample * op.stats_groups : 0) + (part.channel + i) / (op.c / op.stats_groups);
      mean_sum[i] = mean_sums[set];
      mean_dot[i] = mean_dots[set];
    }
  }
  int64_t at = part.at;
  for (int64_t left = part.count; left > 0; --left, at += part.advance) {
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

// run<T, channels_last, access>() for the problem's.
template <class T, class Run, class... Pointers>
void in_order(const Epilogue& op, const Run& run, Pointers... pointers) {
  constexpr int widest = kAccess / sizeof(T);
  const bool wide = access_of<T>(op.channels_last ? op.c : op.s, pointers...) == widest;
  using True = std::true_type;
  using False = std::false_type;
  const auto with = [&](auto channels_last) {
    if (wide) return run(channels_last, std::integral_constant<int, widest>{});
    return run(channels_last, std::integral_constant<int, 1>{});
  };
  if (op.channels_last) return with(True{});
  return with(False{});
}

int64_t sets_of(const Epilogue& op) { return op.rows_of_stats() * op.stats_groups; }

Sets sets(const Epilogue& op, int splits) {
  return {op.c, op.n, op.stats_groups, op.c / op.stats_groups, splits, op.per_sample};
}

void merge_parts(const Sets& of, bool shared_counts, const float* counts, const float* means, const float* m2s,
                 void* mean, void* var, const Queue& queue) {
  const int64_t rows = of.per_sample ? 1 : of.n, sets = (of.per_sample ? of.n : 1) * of.sets;
  const int team = team_for(of.splits * rows * of.group);
  launch(queue, merge, grid_of_teams(sets, team), kThreads, kThreads / kWarp * int(sizeof(Moments<float>)), of, team,
         shared_counts, counts, means, m2s, static_cast<float*>(mean), static_cast<float*>(var));
}

template <class T>
void moments_of(const Epilogue& op, const void* x, void* mean, void* var, const Queue& queue) {
  in_order<T>(
      op,
      [&](auto channels_last, auto access) {
        constexpr bool last = decltype(channels_last)::value;
        const Cut pass = cut<last>(op, access, queue);
        const int64_t parts = pass.splits * op.n * op.c;
        float* const counts = static_cast<float*>(queue.scratch(3 * parts * sizeof(float)));
        launch(queue, moments<T, last, decltype(access)::value>, grid<last>(pass), kThreads,
               kThreads * int(sizeof(Moments<float>)), pass, op.n, static_cast<const T*>(x), counts, counts + parts,
               counts + 2 * parts);
        merge_parts(sets(op, pass.splits), false, counts, counts + parts, counts + 2 * parts, mean, var, queue);
      },
      x);
}

template <class T>
void apply_of(const Epilogue& op, const void* x, void* out, const Queue& queue) {
  in_order<T>(
      op,
      [&](auto channels_last, auto access) {
        constexpr bool last = decltype(channels_last)::value;
        const Cut pass = cut<last>(op, access, queue);
        launch(queue, apply<T, last, decltype(access)::value>, grid<last>(pass), kThreads, 0, pass, op,
               static_cast<const T*>(x), static_cast<T*>(out));
      },
      x, op.residual, out);
}

template <class T>
void backward_of(const Epilogue& op, const void* grad_out, const void* x, const NormActGrads& grads,
                 const Queue& queue) {
  in_order<T>(
      op,
      [&](auto channels_last, auto access) {
        constexpr bool last = decltype(channels_last)::value;
        constexpr int width = decltype(access)::value;
        const Cut pass = cut<last>(op, access, queue);
        const T *const of_out = static_cast<const T*>(grad_out), *const of_x = static_cast<const T*>(x);
        float *mean_sums = nullptr, *mean_dots = nullptr;
        if (op.normalize) {
          const int64_t parts = pass.splits * op.n * op.c, count = op.batch_stats ? sets_of(op) : 0;
          float* const sums = static_cast<float*>(queue.scratch((2 * parts + 2 * count) * sizeof(float)));
          float* const dots = sums + parts;
          if (op.batch_stats) {
            mean_sums = dots + parts;
            mean_dots = mean_sums + count;
          }
          launch(queue, backward_sums<T, last, width>, grid<last>(pass), kThreads, kThreads * 2 * int(sizeof(float)),
                 pass, op.n, op, of_out, of_x, sums, dots);
          const float values = static_cast<float>(op.n * op.c * op.s / sets_of(op));
          const int team = team_for(pass.splits * op.n);
          launch(queue, merge_sums, grid_of_teams(op.c + count, team), kThreads,
                 kThreads / kWarp * 2 * int(sizeof(float)), sets(op, pass.splits), team, op.c, count, values,
                 static_cast<const float*>(op.norm_weight), sums, dots, static_cast<float*>(grads.bias),
                 static_cast<float*>(grads.weight), mean_sums, mean_dots);
        }
        launch(queue, backward_apply<T, last, width>, grid<last>(pass), kThreads, 0, pass, op, of_out, of_x, mean_sums,
               mean_dots, static_cast<T*>(grads.x), static_cast<T*>(grads.residual));
      },
      grad_out, x, op.residual, grads.x, grads.residual);
}

}  // namespace

void norm_act_moments(const Epilogue& op, const void* x, void* mean, void* var, const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, moments_of, op, x, mean, var, queue)
}

void merge_moments(const Epilogue& op, const float* counts, const float* means, const float* m2s, int64_t parts,
                   void* mean, void* var, const Queue& queue) {
  merge_parts({op.c, 1, op.c, 1, static_cast<int>(parts), false}, true, counts, means, m2s, mean, var, queue);
}

void norm_act_apply(const Epilogue& op, const void* x, void* out, const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, apply_of, op, x, out, queue)
}

void norm_act_backward(const Epilogue& op, const void* grad_out, const void* x, const NormActGrads& grads,
                       const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, backward_of, op, grad_out, x, grads, queue)
}

}  // namespace fastgen::cuda
