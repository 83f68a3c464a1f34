// The norm and activation that every op ends with.
#pragma once

#include "ops/common.h"

namespace fastgen {
namespace {

// The tail that every op shares, as its schema has it.
struct Tail {
  OptionalTensor weight, bias, mean, var, residual;  // after `prepare` in the kernel's dtype and layout
  std::string norm;
  int64_t num_groups;
  double eps;
  std::string activation;
  double negative_slope;

  // For x of these sizes; batch_stats: mean and var are those of x.
  NormAct describe(const Tensor& x, bool batch_stats, bool channels_last) const {
    NormAct op{};
    op.dtype = dtype_of(x);
    op.n = x.size(0);
    op.c = x.size(1);
    op.s = 1;
    for (int64_t i = 2; i < x.dim(); ++i) op.s *= x.size(i);
    op.channels_last = channels_last || op.s == 1;
    op.normalize = norm != "none";
    op.batch_stats = op.normalize && batch_stats;
    op.per_sample = op.batch_stats && norm != "batch";
    op.sets = op.per_sample && norm == "group" ? num_groups : op.c;
    op.eps = eps;
    op.activation = activation_of(activation);
    op.negative_slope = negative_slope;
    return op;
  }

  NormActTensors prepare(const Tensor& x, bool channels_last) {
    for (OptionalTensor* t : {&weight, &bias, &mean, &var}) *t = accumulated(*t, accumulation(x));
    if (residual) residual = in_format(*residual, channels_last);
    return {data(mean), data(var), data(weight), data(bias), data(residual)};
  }
};

// Samples whose pixels lie one after another and share their statistics are one long sample.
[[maybe_unused]] void join_samples(NormAct& op) {
  if (!op.channels_last || op.per_sample) return;
  op.s *= op.n;
  op.n = 1;
}

[[maybe_unused]] Tensor new_moments(const Tensor& x, const NormAct& op) {
  if (!op.batch_stats) return new_tensor(x, {0}, accumulation(x));
  return new_tensor(x, op.per_sample ? std::vector<int64_t>{op.n, op.sets} : std::vector<int64_t>{op.c},
                    accumulation(x));
}

}  // namespace
}  // namespace fastgen
