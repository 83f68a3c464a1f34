// z = mu + exp(logvar / 2) * noise, the Kullback-Leibler divergence of each row, and their gradients.
#pragma once

#include "cpu/kernel.h"

namespace fastgen::cpu {

// Writes a standard normal per element, (keys, samples, rows, size), in float32 or float64.
void noise(const Reparameterize& op, void* out, const ParallelFor& parallel);

// kl: (keys, rows), or null.
void reparameterize(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z, void* kl,
                    const ParallelFor& parallel);

// grad_z like z, grad_kl like kl; either may be null.
void reparameterize_backward(const Reparameterize& op, const void* grad_z, const void* grad_kl,
                             const ReparameterizeTensors& tensors, const ReparameterizeGrads& grads,
                             const ParallelFor& parallel);

}  // namespace fastgen::cpu
