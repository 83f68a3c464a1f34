// z = mu + exp(logvar / 2) * noise, the Kullback-Leibler divergence of each row, and their gradients.
#pragma once

#include "cpu/common.h"

namespace fastgen::cpu {

// mu is (keys, rows, size), z (keys, samples, rows, size), each in this order: noise elements are counted within a key of z.
struct Reparameterize {
  DType dtype;  // of all but the divergence and its gradient, which have the accumulation type (float, or double)
  int64_t keys, samples, rows, size;
  const int64_t* key;                // (keys, 2): seed and offset
  int64_t mean_period, logvar_period;  // the prior's element of element i is i % period
  double logvar_min, logvar_max;     // infinite: no bound
  double free_bits;                  // what the divergence of an element is raised to; -infinite: nothing
  double beta;
};

struct ReparameterizeTensors {
  const void* mu;
  const void* logvar;
  const void* prior_mean;    // both or neither
  const void* prior_logvar;
};

struct ReparameterizeGrads {
  void* mu;
  void* logvar;
  void* prior_mean;  // like mu, with a prior
  void* prior_logvar;
};

// Each element's normal, (keys, samples, rows, size); float32 or float64.
void noise(const Reparameterize& op, void* out, const ParallelFor& parallel);

// kl: (keys, rows), or null.
void reparameterize(const Reparameterize& op, const ReparameterizeTensors& given, void* z, void* kl, const ParallelFor& parallel);

// grad_z like z, grad_kl like kl; either may be null.
void reparameterize_backward(const Reparameterize& op, const void* grad_z, const void* grad_kl, const ReparameterizeTensors& given,
                             const ReparameterizeGrads& grads, const ParallelFor& parallel);

}  // namespace fastgen::cpu
