// y = act((x - mean) / sqrt(var + eps) * weight + bias) over (n, c, s), or (n, s, c) when channels_last.
#pragma once

#include "cpu/common.h"
#include "shared/welford.h"

namespace fastgen::cpu {

struct NormAct {
  DType dtype;         // of x, out and their gradients; every other buffer has the accumulation type (float, or double for float64)
  int64_t n, c, s;     // samples, channels, pixels
  bool channels_last;  // memory order (n, s, c)
  bool normalize;      // false: activation alone, the other buffers are null
  bool batch_stats;    // mean and var are statistics of x, and the gradient goes through them
  bool per_sample;     // mean and var are (n, c), else (c)
  double eps;
  Activation activation;
  double negative_slope;
};

// mean and (biased) var of x.
void norm_act_moments(const NormAct& op, const void* x, void* mean, void* var, const ParallelFor& parallel);

// The same from moments of parts, (n, chunks, c).
void merge_moments(const NormAct& op, const std::vector<Moments<double>>& parts, int64_t chunks, void* mean, void* var);

// out from x and mean, var; weight and bias are (c) or null. x == out is allowed.
void norm_act_apply(const NormAct& op, const void* x, const void* mean, const void* var, const void* weight, const void* bias,
                    void* out, const ParallelFor& parallel);

// grad_x; grad_weight and grad_bias (c), written when op.normalize.
void norm_act_backward(const NormAct& op, const void* grad_out, const void* x, const void* mean, const void* var,
                       const void* weight, const void* bias, void* grad_x, void* grad_weight, void* grad_bias,
                       const ParallelFor& parallel);

}  // namespace fastgen::cpu
