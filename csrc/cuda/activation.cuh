// The activations of shared/activation.h, chosen when the kernel runs.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "shared/activation.h"

namespace fastgen::cuda {

// run(the activation as a constant)
template <class Run>
__device__ auto with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::relu: return run(std::integral_constant<Activation, Activation::relu>{});
    case Activation::leaky_relu: return run(std::integral_constant<Activation, Activation::leaky_relu>{});
    case Activation::tanh: return run(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::sigmoid: return run(std::integral_constant<Activation, Activation::sigmoid>{});
    case Activation::silu: return run(std::integral_constant<Activation, Activation::silu>{});
    default: return run(std::integral_constant<Activation, Activation::identity>{});
  }
}

// z = activation(z), with one branch for all values
template <int count>
__device__ void activate(Activation activation, float (&z)[count], float slope) {
  with_activation(activation, [&](auto constant) {
#pragma unroll
    for (int i = 0; i < count; ++i) z[i] = fastgen::activate<decltype(constant)::value>(z[i], slope);
  });
}

// grad * activation'(z)
__device__ inline float activate_grad(Activation activation, float grad, float z, float slope) {
  return with_activation(
      activation, [&](auto constant) { return fastgen::activate_grad<decltype(constant)::value>(grad, z, slope); });
}

}  // namespace fastgen::cuda
