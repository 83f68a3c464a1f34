// Teams: a power of 2 of adjacent threads, within a warp or in several whole warps, that compute a sum together.
#pragma once

#include <cuda_runtime.h>

#include "shared/problems.h"

namespace fastgen::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The number of threads for a sum of this many terms: a warp or, for many terms, a block of `threads`.
inline int team_for(int64_t terms, int threads) { return terms > 4 * kWarp ? threads : kWarp; }

inline dim3 grid_of_teams(int64_t teams, int team, int threads) {
  return dim3(static_cast<unsigned>(ceil_div(teams, threads / team)));
}

// The sum over a team of `lanes` threads, in the team's first thread, in an order that depends only on `lanes`.
// `scratch`: shared memory for one value per warp, used if a team has several warps.
template <class T>
__device__ T team_sum(T x, int lanes, T* scratch) {
  for (int step = min(lanes, kWarp) / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (lanes <= kWarp) return x;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[warp] = x;
  __syncthreads();
  if (threadIdx.x % lanes == 0)
    for (int i = 1; i < lanes / kWarp; ++i) x += scratch[warp + i];
  return x;
}

}  // namespace fastgen::cuda
