// y = activation((x - mean) / sqrt(var + eps) * norm_weight + norm_bias + residual) over (n, c, s), or (n, s, c) when
// channels_last.
#pragma once

#include "cpu/kernel.h"
#include "shared/welford.h"

namespace fastgen::cpu {

// Writes the mean and the (biased) variance of x.
void norm_act_moments(const Epilogue& epilogue, const void* x, void* mean, void* var, const ParallelFor& parallel);

// The same from the moments of parts, (n, chunks, c).
void merge_moments(const Epilogue& epilogue, const std::vector<Moments<double>>& parts, int64_t chunks, void* mean,
                   void* var);

// x == out is allowed.
void norm_act_apply(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel);

void norm_act_backward(const Epilogue& epilogue, const void* grad_out, const void* x, const NormActGrads& grads,
                       const ParallelFor& parallel);

}  // namespace fastgen::cpu
