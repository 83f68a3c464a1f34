// norm_act and its gradients.
#pragma once

#include "ops/epilogue.h"

namespace fastgen {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor mean,
                                            OptionalTensor var, OptionalTensor residual, std::string norm,
                                            int64_t num_groups, double eps, std::string activation,
                                            double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  EpilogueArguments arguments{weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope};
  Epilogue epilogue = arguments.describe(x, !mean, channels_last);
  Tensor out = torch::stable::empty_like(x), new_mean = new_moments(x, epilogue), new_var = new_moments(x, epilogue);
  if (x.numel() == 0) return {out, new_mean, new_var};
  join_samples(epilogue);
  if (epilogue.batch_stats) {
    kernels::norm_act_moments(epilogue, x.const_data_ptr(), new_mean.mutable_data_ptr(), new_var.mutable_data_ptr(),
                              Execution(x));
    arguments.mean = new_mean;
    arguments.var = new_var;
  }
  arguments.prepare(epilogue, x, channels_last);
  kernels::norm_act_apply(epilogue, x.const_data_ptr(), out.mutable_data_ptr(), Execution(x));
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
  EpilogueArguments arguments{weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope};
  Epilogue epilogue = arguments.describe(x, batch_stats, channels_last);
  const std::vector<int64_t> channels{epilogue.normalize ? epilogue.c : 0};
  Tensor grad_x = torch::stable::empty_like(x),
         grad_residual = residual ? torch::stable::empty_like(x) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_weight = new_tensor(x, channels, accumulation(x)), grad_bias = new_tensor(x, channels, accumulation(x));
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }
  join_samples(epilogue);
  arguments.prepare(epilogue, x, channels_last);
  kernels::norm_act_backward(epilogue, grad_out.const_data_ptr(), x.const_data_ptr(),
                             {grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                              residual ? grad_residual.mutable_data_ptr() : nullptr},
                             Execution(x));
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace
}  // namespace fastgen
