// The activations of shared/activation.h, chosen when the kernel runs.
#pragma once

#include <cuda_runtime.h>

#include "shared/activation.h"

namespace fastgen::cuda {

// body(the activation as a constant)
template <class Body>
__device__ auto with_activation(Activation activation, const Body& body) {
  switch (activation) {
    FASTGEN_ACTIVATIONS(FASTGEN_ACTIVATION_CASE)
    default: return body(std::integral_constant<Activation, Activation::identity>());
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
