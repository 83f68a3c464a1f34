// z = mu + exp(logvar / 2) * noise and the divergence from the prior in one pass over memory, their gradients in
// another. The noise is drawn in registers, from the key on the device (docs/random.md). Sums are float32, in an order
// that depends only on the shape.
//
// A pass treats mu as lines: the rows if their divergence is summed, else one line with all elements of a key. A thread
// processes a group of adjacent elements of a line: one access of 16 bytes, and one or two Philox counters. A block has
// kThreads threads, `lanes` of them side by side along a line: short lines share a block, a long line has several
// blocks.
#include <algorithm>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/team.cuh"
#include "shared/philox.h"

namespace fastgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCounter = 4;  // normals per counter
template <class T>
constexpr int kGroup = kAccess / sizeof(T);
// Blocks per multiprocessor for elements of type T, given the number for float.
template <class T>
constexpr int blocks_of(int blocks_of_float) {
  return blocks_of_float * kCounter / kGroup<T>;
}

struct Tiling {
  int64_t lines, length;
  int splits, lanes_log2;  // blocks and threads that share a line
  bool aligned;            // every line of every sample starts at a 16-byte boundary

  int deep() const { return kThreads >> lanes_log2; }  // lines that share a block
  dim3 grid() const { return dim3(static_cast<unsigned>(ceil_div(lines, deep()) * splits)); }
};

template <class T, class... Pointers>
Tiling tile(int64_t lines, int64_t length, int64_t samples, Pointers... pointers) {
  Tiling tiling{lines, length, 1, 0, false};
  const int64_t groups = ceil_div(length, kGroup<T>);
  while (tiling.deep() > 1 && (1 << tiling.lanes_log2) < groups) ++tiling.lanes_log2;
  tiling.splits = static_cast<int>(ceil_div(groups, 1 << tiling.lanes_log2));
  const bool aligned = (is_aligned(pointers) && ...);
  tiling.aligned = aligned && (lines * samples == 1 || length % kGroup<T> == 0);
  return tiling;
}

// The group of a thread: `count` elements, at most N, from element `at` of the whole tensor on.
template <int N>
struct Group {
  int lane, split;
  int64_t line, at;
  int count;
  bool full;  // the group is one access

  __device__ explicit Group(const Tiling& tiling) {
    const int lanes = 1 << tiling.lanes_log2;
    const unsigned tile = tiling.splits == 1 ? blockIdx.x : blockIdx.x / tiling.splits;
    split = blockIdx.x - tile * tiling.splits;
    lane = threadIdx.x & (lanes - 1);
    line = static_cast<int64_t>(tile) * (kThreads >> tiling.lanes_log2) + (threadIdx.x >> tiling.lanes_log2);
    const int64_t first = (static_cast<int64_t>(split) * lanes + lane) * N;
    at = line * tiling.length + first;
    count = line < tiling.lines ? static_cast<int>(max(int64_t{0}, min(tiling.length - first, int64_t{N}))) : 0;
    full = tiling.aligned && count == N;
  }
};

template <int N, class T>
__device__ void load_group(const T* from, const Group<N>& group, float (&to)[N]) {
  if (group.full) return load<N>(from, to);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = i < group.count ? to_float(from[i]) : 0.f;
}

template <int N, class T>
__device__ void store_group(T* to, const Group<N>& group, const float (&from)[N]) {
  if (group.full) return store<N>(to, from);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < group.count) to[i] = from_float<T>(from[i]);
}

// Elements of a prior that repeats after `period` elements.
template <int N, class T>
__device__ void load_periodic(const T* from, int64_t period, const Group<N>& group, float (&to)[N]) {
  const bool narrow = (group.at | period) >> 32 == 0;
  int64_t at = group.at;
  if (at >= period) at = narrow ? static_cast<uint32_t>(at) % static_cast<uint32_t>(period) : at % period;
  if (group.full && period % N == 0) return load<N>(from + at, to);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = i < group.count ? to_float(from[at]) : 0.f;
    if (++at == period) at = 0;
  }
}

// The op's options; lines: per key.
struct Sampler {
  const int64_t* keys;
  int64_t key_count, lines, samples;
  int64_t mean_period, logvar_period;
  float low, high, free_bits;
};

// The key of a line, and the position of the key's first element.
struct Key {
  uint64_t seed, offset;
  int64_t index, size, begin;

  __device__ Key(const Sampler& op, const Tiling& tiling, int64_t line)
      : index(op.key_count == 1 ? 0 : line / op.lines), size(op.lines * tiling.length), begin(index * size) {
    seed = static_cast<uint64_t>(op.keys[2 * index]);
    offset = static_cast<uint64_t>(op.keys[2 * index + 1]);
  }
};

// The normals of a counter.
__device__ void draw(const Key& key, uint64_t counter, float* out) {
  const Philox words = philox(key.seed, key.offset, counter);
  const Normals even = box_muller(words.word[0], words.word[1]), odd = box_muller(words.word[2], words.word[3]);
  out[0] = even.first;
  out[1] = even.second;
  out[2] = odd.first;
  out[3] = odd.second;
}

// `plain`, here and below, is a compile-time constant for the frequent case, which then needs half the registers: every
// group starts at a counter's first normal, there is one sample, and the prior is the standard normal.

// The normals of the key's elements from `element` on. If `element` is not a counter's first, one more counter is
// drawn.
template <bool plain, int N>
__device__ void noise_of(const Key& key, int64_t element, float (&out)[N]) {
  const uint64_t counter = static_cast<uint64_t>(element) / kCounter;
  float all[N + kCounter];
#pragma unroll
  for (int i = 0; i < N; i += kCounter) draw(key, counter + i / kCounter, all + i);
  const int skip = plain ? 0 : static_cast<int>(element % kCounter);
  if (skip) draw(key, counter + N / kCounter, all + N);
#pragma unroll
  for (int i = 0; i < N; ++i)
    out[i] = skip == 0 ? all[i] : skip == 1 ? all[i + 1] : skip == 2 ? all[i + 2] : all[i + 3];
}

// mu, logvar before and after clamping, and exp(logvar / 2) of a group.
template <class T>
struct Gaussian {
  static constexpr int N = kGroup<T>;
  float mu[N], unclamped[N], logvar[N], sd[N];

  __device__ Gaussian(const Sampler& op, const ReparameterizeTensors& tensors, const Group<N>& group) {
    load_group(static_cast<const T*>(tensors.mu) + group.at, group, mu);
    load_group(static_cast<const T*>(tensors.logvar) + group.at, group, unclamped);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float raised = unclamped[i] < op.low ? op.low : unclamped[i];  // NaN stays NaN
      logvar[i] = raised > op.high ? op.high : raised;
      sd[i] = exp_(0.5f * logvar[i]);
    }
  }
};

// value = (ratio - 1 - log_ratio + shift * slope) / 2, where slope = (mu - prior mean) / prior variance
struct Divergence {
  float shift, slope, ratio, value;

  __device__ Divergence(float mu, float logvar, float sd) : shift(mu), slope(mu), ratio(sd * sd) { set(logvar); }
  __device__ Divergence(float mu, float logvar, float mean, float prior_logvar)
      : shift(mu - mean), slope(shift * exp_(-prior_logvar)), ratio(exp_(logvar - prior_logvar)) {
    set(logvar - prior_logvar);
  }

 private:
  __device__ void set(float log_ratio) { value = 0.5f * (shift * slope + (ratio - 1 - log_ratio)); }
};

template <class T, bool plain>
struct Prior {
  static constexpr int N = kGroup<T>;
  bool exists;
  float mean[N] = {}, logvar[N] = {};

  __device__ Prior(const Sampler& op, const ReparameterizeTensors& tensors, const Group<N>& group)
      : exists(!plain && tensors.prior_mean) {
    if (!exists) return;
    load_periodic(static_cast<const T*>(tensors.prior_mean), op.mean_period, group, mean);
    load_periodic(static_cast<const T*>(tensors.prior_logvar), op.logvar_period, group, logvar);
  }

  // The divergence of element i of the group from q.
  __device__ Divergence divergence(const Gaussian<T>& q, int i) const {
    return exists ? Divergence(q.mu[i], q.logvar[i], mean[i], logvar[i]) : Divergence(q.mu[i], q.logvar[i], q.sd[i]);
  }
};

// Writes the normals only. Grid: `Tiling::grid`.
template <bool plain>
__global__ void __launch_bounds__(kThreads, plain ? 6 : 2) draw_noise(Tiling tiling, Sampler op, float* out) {
  constexpr int N = kGroup<float>;
  const Group<N> group(tiling);
  if (!group.count) return;
  const Key key(op, tiling, group.line);
  float eps[N];
  noise_of<plain>(key, group.at - key.begin, eps);
  store_group(out + group.at, group, eps);
}

// Writes z and, if `sums` is not null, each block's sum of the divergences of a line, (lines, splits), times `scale`.
// Grid: `Tiling::grid`.
template <class T, bool plain>
__global__ void __launch_bounds__(kThreads, blocks_of<T>(plain ? 6 : 2))
    sample(Tiling tiling, Sampler op, ReparameterizeTensors tensors, T* z, float* sums, float scale) {
  constexpr int N = kGroup<T>;
  const Group<N> group(tiling);
  float sum = 0;
  if (group.count) {
    const Key key(op, tiling, group.line);
    const Gaussian<T> q(op, tensors, group);
    T* to = z + group.at + (plain ? 0 : key.begin * (op.samples - 1));
    int64_t element = group.at - key.begin;
    for (int64_t s = 0; s < (plain ? 1 : op.samples); ++s, element += key.size, to += key.size) {
      float values[N];
      noise_of<plain>(key, element, values);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = q.mu[i] + q.sd[i] * values[i];
      store_group(to, group, values);
    }
    if (sums) {
      const Prior<T, plain> prior(op, tensors, group);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float value = prior.divergence(q, i).value;
        if (i < group.count) sum += value < op.free_bits ? op.free_bits : value;
      }
    }
  }
  if (!sums) return;
  sum = team_sum(sum, 1 << tiling.lanes_log2, shared_memory<float>());
  if (group.line < tiling.lines && group.lane == 0) sums[group.line * tiling.splits + group.split] = scale * sum;
}

// kl = beta * the sum of a line's partial sums. Grid: one team (a warp or a block) per line.
__global__ void __launch_bounds__(kThreads)
    add_parts(int64_t lines, int team, int splits, float beta, const float* parts, float* kl) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  float sum = 0;
  for (int i = threadIdx.x % team; line < lines && i < splits; i += team) sum += parts[line * splits + i];
  sum = team_sum(sum, team, shared_memory<float>());
  if (line < lines && threadIdx.x % team == 0) kl[line] = beta * sum;
}

// The gradients, from those of z and of the divergence, either of which may be null. Grid: `Tiling::grid`.
template <class T, bool plain>
__global__ void __launch_bounds__(kThreads, blocks_of<T>(plain ? 5 : 2))
    differentiate(Tiling tiling, Sampler op, float beta, const T* grad_z, const float* grad_kl,
                  ReparameterizeTensors tensors, ReparameterizeGrads grads) {
  constexpr int N = kGroup<T>;
  const Group<N> group(tiling);
  if (!group.count) return;
  const Key key(op, tiling, group.line);
  const Gaussian<T> q(op, tensors, group);
  float mu_grad[N] = {}, logvar_grad[N] = {};  // first the sums of grad_z and of grad_z * noise over the samples
  if (grad_z) {
    const T* from = grad_z + group.at + (plain ? 0 : key.begin * (op.samples - 1));
    int64_t element = group.at - key.begin;
    for (int64_t s = 0; s < (plain ? 1 : op.samples); ++s, element += key.size, from += key.size) {
      float g[N], eps[N];
      load_group(from, group, g);
      noise_of<plain>(key, element, eps);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        mu_grad[i] += g[i];
        logvar_grad[i] += g[i] * eps[i];
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) logvar_grad[i] *= 0.5f * q.sd[i];
  }
  const Prior<T, plain> prior(op, tensors, group);
  const float kl_grad = grad_kl ? beta * grad_kl[group.line] : 0.f;
  float prior_mean_grad[N] = {}, prior_logvar_grad[N] = {};
  if (grad_kl) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Divergence d = prior.divergence(q, i);
      const float g = d.value < op.free_bits ? 0.f : kl_grad;  // none where free_bits apply
      mu_grad[i] += g * d.slope;
      logvar_grad[i] += 0.5f * g * (d.ratio - 1);
      prior_mean_grad[i] = -g * d.slope;
      prior_logvar_grad[i] = 0.5f * g * (1 - d.ratio - d.shift * d.slope);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (q.unclamped[i] < op.low || q.unclamped[i] > op.high) logvar_grad[i] = 0;  // no gradient through a bound
  store_group(static_cast<T*>(grads.mu) + group.at, group, mu_grad);
  store_group(static_cast<T*>(grads.logvar) + group.at, group, logvar_grad);
  if (!prior.exists) return;
  store_group(static_cast<T*>(grads.prior_mean) + group.at, group, prior_mean_grad);
  store_group(static_cast<T*>(grads.prior_logvar) + group.at, group, prior_logvar_grad);
}

bool is_plain(const Reparameterize& op, const Tiling& tiling, bool prior) {
  return op.samples == 1 && !prior && (tiling.length % kCounter == 0 || tiling.lines == op.keys);
}

// `by_row`: lines are rows.
Sampler sampler(const Reparameterize& op, bool by_row) {
  return {op.key,
          op.keys,
          by_row ? op.rows : 1,
          op.samples,
          op.mean_period,
          op.logvar_period,
          static_cast<float>(op.logvar_min),
          static_cast<float>(op.logvar_max),
          static_cast<float>(op.free_bits)};
}

template <class T>
void launch_sample(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z, void* kl,
                   const Queue& queue) {
  const int64_t lines = op.keys * (kl ? op.rows : 1), length = op.keys * op.rows * op.size / lines;
  const Tiling tiling =
      tile<T>(lines, length, op.samples, tensors.mu, tensors.logvar, tensors.prior_mean, tensors.prior_logvar, z);
  const float beta = static_cast<float>(op.beta);
  const int shared = kThreads / kWarp * int(sizeof(float));
  const bool in_parts = kl && tiling.splits > 1;
  float* const sums = static_cast<float*>(in_parts ? queue.scratch(lines * tiling.splits * sizeof(float)) : kl);
  const auto kernel = is_plain(op, tiling, tensors.prior_mean) ? sample<T, true> : sample<T, false>;
  launch(queue, kernel, tiling.grid(), kThreads, shared, tiling, sampler(op, kl != nullptr), tensors,
         static_cast<T*>(z), sums, in_parts ? 1.f : beta);
  if (!in_parts) return;
  const int team = team_for(tiling.splits, kThreads);
  launch(queue, add_parts, grid_of_teams(lines, team, kThreads), kThreads, shared, lines, team, tiling.splits, beta,
         sums, static_cast<float*>(kl));
}

template <class T>
void launch_differentiate(const Reparameterize& op, const void* grad_z, const void* grad_kl,
                          const ReparameterizeTensors& tensors, const ReparameterizeGrads& grads, const Queue& queue) {
  const int64_t lines = op.keys * (grad_kl ? op.rows : 1), length = op.keys * op.rows * op.size / lines;
  const void* const mean = tensors.prior_mean ? grads.prior_mean : nullptr;
  const void* const logvar = tensors.prior_mean ? grads.prior_logvar : nullptr;
  const Tiling tiling = tile<T>(lines, length, op.samples, tensors.mu, tensors.logvar, tensors.prior_mean,
                                tensors.prior_logvar, grad_z, grads.mu, grads.logvar, mean, logvar);
  const auto kernel = is_plain(op, tiling, tensors.prior_mean) ? differentiate<T, true> : differentiate<T, false>;
  launch(queue, kernel, tiling.grid(), kThreads, 0, tiling, sampler(op, grad_kl != nullptr),
         static_cast<float>(op.beta), static_cast<const T*>(grad_z), static_cast<const float*>(grad_kl), tensors,
         grads);
}

}  // namespace

void noise(const Reparameterize& op, void* out, const Queue& queue) {
  Reparameterize flat = op;  // the noise does not distinguish samples and rows
  flat.samples = flat.rows = 1;
  const Tiling tiling = tile<float>(op.keys, op.samples * op.rows * op.size, 1, out);
  const auto kernel = is_plain(flat, tiling, false) ? draw_noise<true> : draw_noise<false>;
  launch(queue, kernel, tiling.grid(), kThreads, 0, tiling, sampler(flat, false), static_cast<float*>(out));
}

void reparameterize(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z, void* kl,
                    const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, launch_sample, op, tensors, z, kl, queue)
}

void reparameterize_backward(const Reparameterize& op, const void* grad_z, const void* grad_kl,
                             const ReparameterizeTensors& tensors, const ReparameterizeGrads& grads,
                             const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, launch_differentiate, op, grad_z, grad_kl, tensors, grads, queue)
}

}  // namespace fastgen::cuda
