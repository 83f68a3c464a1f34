// The fused convolutions, and the weight's gradient.
#pragma once

#include <atomic>

#include "ops/tail.h"

namespace fastgen {
namespace {

// Whether float32 may be multiplied in TF32: torch.backends.cudnn.conv.fp32_precision, as of the last call. The CPU has
// none.
std::atomic<bool> tf32_allowed{false};

[[maybe_unused]] void allow_tf32(bool allowed) { tf32_allowed = allowed; }

using ConvolutionKernel = decltype(kernels::conv2d_norm_act);

Convolution geometry(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  Convolution conv{};
  conv.ic = x.size(1);
  conv.ih = x.size(2);
  conv.iw = x.size(3);
  conv.kh = weight.size(2);
  conv.kw = weight.size(3);
  for (int i = 0; i < 4; ++i) conv.weight_strides[i] = weight.stride(i);
  std::copy_n(stride.begin(), 2, conv.stride);
  std::copy_n(padding.begin(), 2, conv.padding);
  std::copy_n(dilation.begin(), 2, conv.dilation);
  conv.groups = groups;
  conv.tf32 = tf32_allowed;
  conv.x_channels_last = is_channels_last(x) || conv.ih * conv.iw == 1;
  return conv;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convolve(const Convolution& conv, int64_t out_channels,
                                                    ConvolutionKernel* kernel, Tensor x, const Tensor& weight,
                                                    OptionalTensor bias, Tail tail, bool save) {
  const bool x_channels_last = is_channels_last(x), channels_last = x_channels_last || is_channels_last(weight);
  x = in_format(x, x_channels_last);
  Tensor out = new_tensor(x, {x.size(0), out_channels, conv.oh, conv.ow}, x.scalar_type(), channels_last);
  const NormAct op = tail.describe(out, !tail.mean, channels_last);
  Tensor pre = save ? torch::stable::empty_like(out) : new_tensor(x, {0}, x.scalar_type());
  Tensor new_mean = new_moments(x, op), new_var = new_moments(x, op);
  if (out.numel() == 0) return {out, pre, new_mean, new_var};
  bias = accumulated(bias, accumulation(x));
  if (op.batch_stats) {
    tail.mean = new_mean;
    tail.var = new_var;
  }
  kernel(conv, op,
         {x.const_data_ptr(), weight.const_data_ptr(), data(bias), save ? pre.mutable_data_ptr() : nullptr,
          out.mutable_data_ptr()},
         tail.prepare(out, channels_last), Execution(x));
  return {out, pre, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_transpose2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor mean, OptionalTensor var, OptionalTensor residual, std::string norm, int64_t num_groups, double eps,
    std::string activation, double negative_slope, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> output_padding, int64_t groups, std::vector<int64_t> dilation, bool save) {
  Convolution conv = geometry(x, weight, stride, padding, dilation, groups);
  conv.oh = (conv.ih - 1) * stride[0] - 2 * padding[0] + dilation[0] * (conv.kh - 1) + output_padding[0] + 1;
  conv.ow = (conv.iw - 1) * stride[1] - 2 * padding[1] + dilation[1] * (conv.kw - 1) + output_padding[1] + 1;
  return convolve(conv, weight.size(1) * groups, kernels::conv_transpose2d_norm_act, x, weight, bias,
                  {norm_weight, norm_bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope},
                  save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor mean, OptionalTensor var, OptionalTensor residual, std::string norm, int64_t num_groups, double eps,
    std::string activation, double negative_slope, std::vector<int64_t> stride, std::vector<int64_t> padding,
    bool reflect, int64_t groups, std::vector<int64_t> dilation, bool save) {
  Convolution conv = geometry(x, weight, stride, padding, dilation, groups);
  conv.oh = (conv.ih + 2 * padding[0] - dilation[0] * (conv.kh - 1) - 1) / stride[0] + 1;
  conv.ow = (conv.iw + 2 * padding[1] - dilation[1] * (conv.kw - 1) - 1) / stride[1] + 1;
  conv.reflect = reflect;
  return convolve(conv, weight.size(0), kernels::conv2d_norm_act, x, weight, bias,
                  {norm_weight, norm_bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope},
                  save);
}

#if !defined(FASTGEN_CUDA)
Tensor convolution_weight_grad(Tensor grad, Tensor x, Tensor weight, std::vector<int64_t> stride,
                               std::vector<int64_t> padding, std::vector<int64_t> output_padding, int64_t groups,
                               std::vector<int64_t> dilation, bool reflect) {
  Tensor out = torch::stable::empty_like(weight);
  if (grad.numel() == 0) return torch::stable::zero_(out);
  Convolution conv = geometry(x, out, stride, padding, dilation, groups);
  conv.oh = grad.size(2);
  conv.ow = grad.size(3);
  conv.reflect = reflect;
  x = in_format(x, is_channels_last(x));
  grad = in_format(grad, is_channels_last(grad));
  Tail plain{};
  plain.norm = "none";
  plain.activation = "identity";
  kernels::convolution_weight_grad(conv, plain.describe(grad, false, is_channels_last(grad)), !output_padding.empty(),
                                   grad.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr(), Execution(x));
  return out;
}
#endif

}  // namespace
}  // namespace fastgen
