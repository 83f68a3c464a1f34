// The epilogue of a convolution's sums, and its computation for adjacent elements.
#pragma once

#include "cuda/access.cuh"
#include "cuda/activation.cuh"

namespace fastgen::cuda::convolution {

// Writes the sum plus bias to `pre`, and the same after norm, residual and activation to `out`. Either may be null.
template <class T>
struct TileEpilogue {
  const float *bias, *mean, *var, *weight, *shift;  // (c), each or null
  float eps, slope;
  Activation activation;
  const T* residual;
  T *pre, *out;
};

// (z + bias - center) * gain + shift for `count` adjacent elements.
template <int count>
struct Affine {
  float bias[count], center[count], gain[count], shift[count];
};

// `step`: the distance from one element's channel to the next one's, 0 or 1.
template <int count, class T>
__device__ Affine<count> affine_of(const TileEpilogue<T>& e, int64_t channel, int step) {
  Affine<count> affine;
#pragma unroll
  for (int i = 0; i < count; ++i, channel += step) {
    affine.bias[i] = e.bias ? e.bias[channel] : 0.f;
    affine.center[i] = e.mean ? e.mean[channel] : 0.f;
    affine.gain[i] = e.mean ? (e.weight ? e.weight[channel] : 1.f) / sqrtf(e.var[channel] + e.eps) : 1.f;
    affine.shift[i] = e.shift ? e.shift[channel] : 0.f;
  }
  return affine;
}

// Writes the results of `count` sums z, the elements from `at` on.
template <int count, class T>
__device__ void finish(const TileEpilogue<T>& e, int64_t at, float (&z)[count], const Affine<count>& affine) {
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] += affine.bias[i];
  if (e.pre) store<count>(e.pre + at, z);
  if (!e.out) return;
  float added[count] = {};
  if (e.residual) load<count>(e.residual + at, added);
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = (z[i] - affine.center[i]) * affine.gain[i] + affine.shift[i] + added[i];
  activate(e.activation, z, e.slope);
  store<count>(e.out + at, z);
}

}  // namespace fastgen::cuda::convolution
