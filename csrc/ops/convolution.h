// The fused convolutions, and the weight's gradient.
#pragma once

#include <atomic>

#include "ops/epilogue.h"

namespace fastgen {
namespace {

// Whether float32 may be multiplied in TF32: torch.backends.cudnn.conv.fp32_precision as of the last call. Ignored on
// the CPU.
std::atomic<bool> tf32_allowed{false};

[[maybe_unused]] void allow_tf32(bool allowed) { tf32_allowed = allowed; }

Geometry geometry(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  Geometry conv{};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> convolve(const Geometry& conv, Tensor x, const Tensor& weight,
                                                    OptionalTensor bias, EpilogueArguments arguments, bool save) {
  const bool x_channels_last = is_channels_last(x), channels_last = x_channels_last || is_channels_last(weight);
  x = in_format(x, x_channels_last);
  Tensor out = new_tensor(x, {x.size(0), conv.oc, conv.oh, conv.ow}, x.scalar_type(), channels_last);
  Epilogue epilogue = arguments.describe(out, !arguments.mean, channels_last);
  Tensor pre = save ? torch::stable::empty_like(out) : new_tensor(x, {0}, x.scalar_type());
  Tensor new_mean = new_moments(x, epilogue), new_var = new_moments(x, epilogue);
  if (out.numel() == 0) return {out, pre, new_mean, new_var};
  bias = accumulated(bias, accumulation(x));
  if (epilogue.batch_stats) {
    arguments.mean = new_mean;
    arguments.var = new_var;
  }
  arguments.prepare(epilogue, out, channels_last);
  epilogue.bias = data(bias);
  kernels::convolution_norm_act(
      conv, epilogue,
      {x.const_data_ptr(), weight.const_data_ptr(), save ? pre.mutable_data_ptr() : nullptr, out.mutable_data_ptr()},
      Execution(x));
  return {out, pre, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_transpose2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor mean, OptionalTensor var, OptionalTensor residual, std::string norm, int64_t num_groups, double eps,
    std::string activation, double negative_slope, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> output_padding, int64_t groups, std::vector<int64_t> dilation, bool save) {
  Geometry conv = geometry(x, weight, stride, padding, dilation, groups);
  conv.transposed = true;
  conv.oc = weight.size(1) * groups;
  conv.oh = (conv.ih - 1) * stride[0] - 2 * padding[0] + dilation[0] * (conv.kh - 1) + output_padding[0] + 1;
  conv.ow = (conv.iw - 1) * stride[1] - 2 * padding[1] + dilation[1] * (conv.kw - 1) + output_padding[1] + 1;
  return convolve(conv, x, weight, bias,
                  {norm_weight, norm_bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope},
                  save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    OptionalTensor mean, OptionalTensor var, OptionalTensor residual, std::string norm, int64_t num_groups, double eps,
    std::string activation, double negative_slope, std::vector<int64_t> stride, std::vector<int64_t> padding,
    bool reflect, int64_t groups, std::vector<int64_t> dilation, bool save) {
  Geometry conv = geometry(x, weight, stride, padding, dilation, groups);
  conv.oc = weight.size(0);
  conv.oh = (conv.ih + 2 * padding[0] - dilation[0] * (conv.kh - 1) - 1) / stride[0] + 1;
  conv.ow = (conv.iw + 2 * padding[1] - dilation[1] * (conv.kw - 1) - 1) / stride[1] + 1;
  conv.reflect = reflect;
  return convolve(conv, x, weight, bias,
                  {norm_weight, norm_bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope},
                  save);
}

#if !defined(FASTGEN_CUDA)
// The number of the cpu::Amx that bfloat16 convolutions use.
int64_t amx() { return static_cast<int64_t>(cpu::amx()); }

// The number of the fastest cpu::Algorithm for a convolution of these sizes, or for the gradient of its weight. It
// ignores the processor's instruction set and the environment.
int64_t algorithm(int64_t n, int64_t in_channels, int64_t in_height, int64_t in_width, int64_t out_channels,
                  int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width,
                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  int64_t groups, bool transposed, ScalarType dtype, bool batch_stats, bool weight_gradient) {
  Geometry conv{};
  conv.ic = in_channels;
  conv.ih = in_height;
  conv.iw = in_width;
  conv.oc = out_channels;
  conv.oh = out_height;
  conv.ow = out_width;
  conv.kh = kernel_height;
  conv.kw = kernel_width;
  std::copy_n(stride.begin(), 2, conv.stride);
  std::copy_n(padding.begin(), 2, conv.padding);
  std::copy_n(dilation.begin(), 2, conv.dilation);
  conv.groups = groups;
  conv.transposed = transposed;
  Epilogue epilogue{};
  epilogue.dtype = dtype_of(dtype);
  epilogue.n = n;
  epilogue.batch_stats = batch_stats;
  const auto use = cpu::UseWinograd::where_fastest;
  return static_cast<int64_t>(weight_gradient ? cpu::choose_for_weight_grad(conv, epilogue, use)
                                              : cpu::choose(conv, epilogue, use));
}

Tensor convolution_weight_grad(Tensor grad, Tensor x, Tensor weight, std::vector<int64_t> stride,
                               std::vector<int64_t> padding, std::vector<int64_t> output_padding, int64_t groups,
                               std::vector<int64_t> dilation, bool reflect) {
  Tensor out = torch::stable::empty_like(weight);
  if (grad.numel() == 0) return torch::stable::zero_(out);
  Geometry conv = geometry(x, out, stride, padding, dilation, groups);
  conv.transposed = !output_padding.empty();
  conv.oc = grad.size(1);
  conv.oh = grad.size(2);
  conv.ow = grad.size(3);
  conv.reflect = reflect;
  x = in_format(x, is_channels_last(x));
  grad = in_format(grad, is_channels_last(grad));
  EpilogueArguments plain{};
  plain.norm = "none";
  plain.activation = "identity";
  kernels::convolution_weight_grad(conv, plain.describe(grad, false, is_channels_last(grad)), grad.const_data_ptr(),
                                   x.const_data_ptr(), out.mutable_data_ptr(), Execution(x));
  return out;
}
#endif

}  // namespace
}  // namespace fastgen
