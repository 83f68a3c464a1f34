// norm_act and its gradients.
#pragma once

#include "ops/tail.h"

namespace fastgen {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor mean,
                                            OptionalTensor var, OptionalTensor residual, std::string norm,
                                            int64_t num_groups, double eps, std::string activation,
                                            double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  Tail tail{weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope};
  NormAct op = tail.describe(x, !mean, channels_last);
  Tensor out = torch::stable::empty_like(x), new_mean = new_moments(x, op), new_var = new_moments(x, op);
  if (x.numel() == 0) return {out, new_mean, new_var};
  join_samples(op);
  if (op.batch_stats) {
    kernels::norm_act_moments(op, x.const_data_ptr(), new_mean.mutable_data_ptr(), new_var.mutable_data_ptr(),
                              Execution(x));
    tail.mean = new_mean;
    tail.var = new_var;
  }
  kernels::norm_act_apply(op, x.const_data_ptr(), tail.prepare(x, channels_last), out.mutable_data_ptr(), Execution(x));
  return {out, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(Tensor grad_out, Tensor x, OptionalTensor weight,
                                                             OptionalTensor bias, OptionalTensor mean,
                                                             OptionalTensor var, OptionalTensor residual,
                                                             bool batch_stats, std::string norm, int64_t num_groups,
                                                             double eps, std::string activation,
                                                             double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  grad_out = in_format(grad_out, channels_last);
  Tail tail{weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope};
  NormAct op = tail.describe(x, batch_stats, channels_last);
  const std::vector<int64_t> channels{op.normalize ? op.c : 0};
  Tensor grad_x = torch::stable::empty_like(x),
         grad_residual = residual ? torch::stable::empty_like(x) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_weight = new_tensor(x, channels, accumulation(x)), grad_bias = new_tensor(x, channels, accumulation(x));
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }
  join_samples(op);
  kernels::norm_act_backward(op, grad_out.const_data_ptr(), x.const_data_ptr(), tail.prepare(x, channels_last),
                             {grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                              residual ? grad_residual.mutable_data_ptr() : nullptr},
                             Execution(x));
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace
}  // namespace fastgen
