// y = act((x - mean) / sqrt(var + eps) * weight + bias + residual) over (n, c, s), or (n, s, c) when channels_last.
#pragma once

#include "cpu/common.h"
#include "shared/welford.h"

namespace fastgen::cpu {

struct NormAct {
  DType dtype;         // of x, residual, out and their gradients; every other buffer has the accumulation type (float, or double)
  int64_t n, c, s;     // samples, channels, pixels
  bool channels_last;  // memory order (n, s, c)
  bool normalize;      // false: no norm, its buffers are null
  bool batch_stats;    // mean and var are statistics of x, and the gradient goes through them
  bool per_sample;     // mean and var are (n, sets), else (c)
  int64_t sets;        // of channels that share statistics: c for batch and instance norm, the groups of group norm
  double eps;
  Activation activation;
  double negative_slope;

  int64_t rows_of_stats() const { return per_sample ? n : 1; }
  int64_t set(int64_t row, int64_t channel) const { return row * sets + channel / (c / sets); }
};

struct NormActTensors {
  const void* mean;
  const void* var;
  const void* weight;    // (c) or null
  const void* bias;      // (c) or null
  const void* residual;  // like x, or null
};

struct NormActGrads {
  void* x;
  void* weight;    // (c), written when op.normalize
  void* bias;      // the same
  void* residual;  // like x, or null
};

// mean and (biased) var of x.
void norm_act_moments(const NormAct& op, const void* x, void* mean, void* var, const ParallelFor& parallel);

// The same from moments of parts, (n, chunks, c).
void merge_moments(const NormAct& op, const std::vector<Moments<double>>& parts, int64_t chunks, void* mean, void* var);

// x == out is allowed.
void norm_act_apply(const NormAct& op, const void* x, const NormActTensors& given, void* out, const ParallelFor& parallel);

void norm_act_backward(const NormAct& op, const void* grad_out, const void* x, const NormActTensors& given, const NormActGrads& grads,
                       const ParallelFor& parallel);

}  // namespace fastgen::cpu
