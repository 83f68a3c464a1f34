// How the passes of norm_act over x are divided among blocks and threads, and the normalization of a thread's values.
//
// A pass treats x as n samples of c channels of s pixels. The values of one channel of one sample are a line; in
// channels_last order they are c apart. Each line is split into `splits` chunks of `chunk` accesses, so that even few
// lines fill the chip. A block has kThreads threads: `lanes` of them side by side along memory, in kThreads / lanes
// rows. channels_last: the lanes access adjacent channels; else they make adjacent accesses to one line, and the block
// has several lines.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/team.cuh"

namespace fastgen::cuda::norm_act {

constexpr int kThreads = 256;
constexpr int kMaxSplits = 64;
constexpr int kWave = 4;  // blocks per multiprocessor that a pass should have

// The blocks of a pass over x: along channels (channels_last) or lines, times samples, times splits.
struct Tiling {
  int64_t c, s;
  int64_t lines;      // channels_last: accesses to channels, c / access; else lines, n * c
  int64_t length;     // accesses per line: s, or s / access
  int64_t chunk;      // accesses per line and block
  int splits, lanes;  // lanes: a power of 2, kThreads at most
  int64_t samples;    // n in channels_last order, else 1
};

template <bool channels_last>
Tiling tile(const Epilogue& op, int access, const Queue& queue) {
  Tiling tiling{op.c,
                op.s,
                channels_last ? op.c / access : op.n * op.c,
                channels_last ? op.s : op.s / access,
                0,
                1,
                1,
                channels_last ? op.n : 1};
  const int64_t wide = channels_last ? tiling.lines : tiling.length;
  while (tiling.lanes < (channels_last ? kWarp : kThreads) && tiling.lanes < wide) tiling.lanes *= 2;
  const int64_t deep = kThreads / tiling.lanes;  // threads that share a line, or lines per block
  const int64_t blocks = ceil_div(tiling.lines, channels_last ? tiling.lanes : deep) * tiling.samples;
  const int64_t min_accesses =
      channels_last ? 4 * deep : 4 * tiling.lanes;  // the fewest accesses for which a block pays
  const int64_t chunks = std::min<int64_t>(
      {kMaxSplits, ceil_div(kWave * queue.multiprocessors, blocks), ceil_div(tiling.length, min_accesses)});
  tiling.chunk = ceil_div(tiling.length, std::max<int64_t>(1, chunks));
  tiling.splits = static_cast<int>(ceil_div(tiling.length, tiling.chunk));
  return tiling;
}

template <bool channels_last>
dim3 grid(const Tiling& tiling) {
  const int64_t deep = kThreads / tiling.lanes,
                blocks = ceil_div(tiling.lines, channels_last ? tiling.lanes : deep) * tiling.samples;
  return dim3(static_cast<unsigned>(blocks), tiling.splits);
}

// What one thread reads: `count` accesses, the first at element `at`, `advance` elements apart.
template <bool channels_last, int access>
struct Slice {
  bool valid;
  int lane, depth, deep;    // position in the block, which has `deep` threads along the reduced dimension
  int64_t sample, channel;  // of the first value
  int64_t at, advance, count;

  __device__ explicit Slice(const Tiling& tiling) {
    const int column = threadIdx.x % tiling.lanes, row = threadIdx.x / tiling.lanes, rows = kThreads / tiling.lanes;
    const int64_t per_block = channels_last ? tiling.lanes : rows, blocks = (tiling.lines + per_block - 1) / per_block;
    const int64_t line = blockIdx.x % blocks * per_block + (channels_last ? column : row);
    lane = channels_last ? column : row;
    depth = channels_last ? row : column;
    deep = channels_last ? rows : tiling.lanes;
    valid = line < tiling.lines;
    sample = channels_last ? blockIdx.x / blocks : line / tiling.c;
    channel = channels_last ? line * access : line % tiling.c;
    const int64_t first = blockIdx.y * tiling.chunk + depth, stop = min((blockIdx.y + 1) * tiling.chunk, tiling.length);
    const int64_t step = channels_last ? tiling.c : access;
    at = (channels_last ? sample * tiling.s * tiling.c + channel : line * tiling.s) + first * step;
    advance = deep * step;
    count = valid && first < stop ? (stop - first + deep - 1) / deep : 0;
  }
};

// The number of channels of an access: several adjacent ones in channels_last order, else one.
template <bool channels_last, int access>
constexpr int kChannels = channels_last ? access : 1;

// The position at which this block stores its partial result of a channel: partial results are (splits, n, c).
__device__ inline int64_t part_at(const Tiling& tiling, int64_t samples, int64_t sample, int64_t channel) {
  return (blockIdx.y * samples + sample) * tiling.c + channel;
}

// The partial results (splits, n, c) that make up the statistics of a group: those of `channels` adjacent channels of
// one sample or of all samples.
struct StatGroups {
  int64_t c, n, groups, channels;
  int splits;
  bool per_sample;

  StatGroups(const Epilogue& op, int splits)
      : c(op.c),
        n(op.n),
        groups(op.stats_groups),
        channels(op.c / op.stats_groups),
        splits(splits),
        per_sample(op.per_sample) {}
  FASTGEN_HD int64_t count() const { return (per_sample ? n : 1) * groups; }
  FASTGEN_HD int64_t samples() const { return per_sample ? 1 : n; }  // that share statistics
};

// The normalization of a thread's channels: z = (x - center) * rstd * gain + shift.
template <int channels>
struct Scales {
  float center[channels], rstd[channels], gain[channels], shift[channels];

  __device__ Scales(const Epilogue& op, int64_t sample, int64_t channel) {
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int64_t group = (op.per_sample ? sample * op.stats_groups : 0) + (channel + i) / (op.c / op.stats_groups);
      center[i] = op.normalize ? static_cast<const float*>(op.mean)[group] : 0.f;
      rstd[i] = op.normalize ? 1 / sqrtf(static_cast<const float*>(op.var)[group] + static_cast<float>(op.eps)) : 1.f;
      gain[i] = op.normalize && op.norm_weight ? static_cast<const float*>(op.norm_weight)[channel + i] : 1.f;
      shift[i] = op.normalize && op.norm_bias ? static_cast<const float*>(op.norm_bias)[channel + i] : 0.f;
    }
  }
};

// Calls run(channels_last, access), both compile-time constants, for the memory order of x and the widest access that
// all pointers allow.
template <class T, class Run, class... Pointers>
void with_layout(const Epilogue& op, const Run& run, Pointers... pointers) {
  constexpr int widest = kAccess / sizeof(T);
  const bool wide = access_of<T>(op.channels_last ? op.c : op.s, pointers...) == widest;
  const auto with = [&](auto channels_last) {
    if (wide) return run(channels_last, std::integral_constant<int, widest>{});
    return run(channels_last, std::integral_constant<int, 1>{});
  };
  if (op.channels_last) return with(std::true_type{});
  return with(std::false_type{});
}

}  // namespace fastgen::cuda::norm_act
