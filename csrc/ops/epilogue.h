// The epilogue that every op ends with: norm, residual, activation.
#pragma once

#include "ops/execution.h"

namespace fastgen {
namespace {

// The arguments that every op shares, as its schema has them.
struct EpilogueArguments {
  OptionalTensor norm_weight, norm_bias, mean, var, residual;  // after `prepare` in the kernel's dtype and layout
  std::string norm;
  int64_t num_groups;
  double eps;
  std::string activation;
  double negative_slope;

  // Sizes and options for x, without pointers. batch_stats: mean and var are the statistics of x.
  Epilogue describe(const Tensor& x, bool batch_stats, bool channels_last) const {
    Epilogue epilogue{};
    epilogue.dtype = dtype_of(x);
    epilogue.n = x.size(0);
    epilogue.c = x.size(1);
    epilogue.s = 1;
    for (int64_t i = 2; i < x.dim(); ++i) epilogue.s *= x.size(i);
    epilogue.channels_last = channels_last || epilogue.s == 1;
    epilogue.normalize = norm != "none";
    epilogue.batch_stats = epilogue.normalize && batch_stats;
    epilogue.per_sample = epilogue.batch_stats && norm != "batch";
    epilogue.stats_groups = epilogue.per_sample && norm == "group" ? num_groups : epilogue.c;
    epilogue.eps = eps;
    epilogue.activation = activation_of(activation);
    epilogue.negative_slope = negative_slope;
    return epilogue;
  }

  // The tensors as the kernel reads them; they stay alive as long as the arguments do.
  void prepare(Epilogue& epilogue, const Tensor& x, bool channels_last) {
    for (OptionalTensor* t : {&norm_weight, &norm_bias, &mean, &var}) *t = accumulated(*t, accumulation(x));
    if (residual) residual = in_format(*residual, channels_last);
    epilogue.mean = data(mean);
    epilogue.var = data(var);
    epilogue.norm_weight = data(norm_weight);
    epilogue.norm_bias = data(norm_bias);
    epilogue.residual = data(residual);
  }
};

// Treats samples as one long sample if their pixels are contiguous and share statistics.
[[maybe_unused]] void join_samples(Epilogue& epilogue) {
  if (!epilogue.channels_last || epilogue.per_sample) return;
  epilogue.s *= epilogue.n;
  epilogue.n = 1;
}

[[maybe_unused]] Tensor new_moments(const Tensor& x, const Epilogue& epilogue) {
  if (!epilogue.batch_stats) return new_tensor(x, {0}, accumulation(x));
  return new_tensor(
      x,
      epilogue.per_sample ? std::vector<int64_t>{epilogue.n, epilogue.stats_groups} : std::vector<int64_t>{epilogue.c},
      accumulation(x));
}

}  // namespace
}  // namespace fastgen
