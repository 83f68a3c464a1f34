// Dispatcher registrations of the native kernels, on the libtorch stable ABI. Schemas, fake kernels and gradients: fastgen/ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/convolution.h"

namespace {

using fastgen::Activation;
using fastgen::cpu::Convolution;
using fastgen::cpu::ConvolutionTensors;
using fastgen::cpu::DType;
using fastgen::cpu::NormAct;
using fastgen::cpu::NormActTensors;
using fastgen::cpu::ParallelFor;
using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

ParallelFor torch_parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
            torch::stable::parallel_for(0, count, 1, body);
          }};
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "fastgen: x must be float32, float64, bfloat16 or float16");
  }
}

Activation activation_of(const std::string& name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu" || name == "leaky_relu_") return Activation::leaky_relu;
  if (name == "tanh") return Activation::tanh;
  if (name == "sigmoid") return Activation::sigmoid;
  STD_TORCH_CHECK(name == "silu", "fastgen: unknown activation ", name);
  return Activation::silu;
}

// fastgen/ops/_layout.py has the same rule.
bool is_channels_last(const Tensor& x) { return x.dim() == 4 && x.stride(1) == 1 && !x.is_contiguous(); }

Tensor in_format(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype, bool channels_last = false) {
  return torch::stable::empty(size, dtype, Layout::Strided, like.device(), false,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Parameters and statistics enter a kernel in the accumulation type.
ScalarType accumulation(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

OptionalTensor accumulated(const OptionalTensor& x, ScalarType dtype) {
  if (!x) return std::nullopt;
  return torch::stable::contiguous(x->scalar_type() == dtype ? *x : torch::stable::to(*x, dtype));
}

void* data(const OptionalTensor& x) { return x ? x->mutable_data_ptr() : nullptr; }

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
void join_samples(NormAct& op) {
  if (!op.channels_last || op.per_sample) return;
  op.s *= op.n;
  op.n = 1;
}

Tensor new_moments(const Tensor& x, const NormAct& op) {
  if (!op.batch_stats) return new_tensor(x, {0}, accumulation(x));
  return new_tensor(x, op.per_sample ? std::vector<int64_t>{op.n, op.sets} : std::vector<int64_t>{op.c}, accumulation(x));
}

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor mean, OptionalTensor var,
                                            OptionalTensor residual, std::string norm, int64_t num_groups, double eps,
                                            std::string activation, double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  Tail tail{weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope};
  NormAct op = tail.describe(x, !mean, channels_last);
  Tensor out = torch::stable::empty_like(x), new_mean = new_moments(x, op), new_var = new_moments(x, op);
  if (x.numel() == 0) return {out, new_mean, new_var};
  join_samples(op);
  if (op.batch_stats) {
    fastgen::cpu::norm_act_moments(op, x.const_data_ptr(), new_mean.mutable_data_ptr(), new_var.mutable_data_ptr(), torch_parallel());
    tail.mean = new_mean;
    tail.var = new_var;
  }
  fastgen::cpu::norm_act_apply(op, x.const_data_ptr(), tail.prepare(x, channels_last), out.mutable_data_ptr(), torch_parallel());
  return {out, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(Tensor grad_out, Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                             OptionalTensor mean, OptionalTensor var, OptionalTensor residual,
                                                             bool batch_stats, std::string norm, int64_t num_groups, double eps,
                                                             std::string activation, double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  grad_out = in_format(grad_out, channels_last);
  Tail tail{weight, bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope};
  NormAct op = tail.describe(x, batch_stats, channels_last);
  const std::vector<int64_t> channels{op.normalize ? op.c : 0};
  Tensor grad_x = torch::stable::empty_like(x), grad_residual = residual ? torch::stable::empty_like(x) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_weight = new_tensor(x, channels, accumulation(x)), grad_bias = new_tensor(x, channels, accumulation(x));
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }
  join_samples(op);
  fastgen::cpu::norm_act_backward(op, grad_out.const_data_ptr(), x.const_data_ptr(), tail.prepare(x, channels_last),
                                  {grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                                   residual ? grad_residual.mutable_data_ptr() : nullptr},
                                  torch_parallel());
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

using ConvolutionKernel = decltype(fastgen::cpu::conv2d_norm_act);

Convolution geometry(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, int64_t groups) {
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
  conv.x_channels_last = is_channels_last(x) || conv.ih * conv.iw == 1;
  return conv;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convolve(const Convolution& conv, int64_t out_channels, ConvolutionKernel* kernel, Tensor x,
                                                    const Tensor& weight, OptionalTensor bias, Tail tail, bool save) {
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
  kernel(conv, op, {x.const_data_ptr(), weight.const_data_ptr(), data(bias), save ? pre.mutable_data_ptr() : nullptr, out.mutable_data_ptr()},
         tail.prepare(out, channels_last), torch_parallel());
  return {out, pre, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_transpose2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor mean,
    OptionalTensor var, OptionalTensor residual, std::string norm, int64_t num_groups, double eps, std::string activation,
    double negative_slope, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_padding, int64_t groups,
    std::vector<int64_t> dilation, bool save) {
  Convolution conv = geometry(x, weight, stride, padding, dilation, groups);
  conv.oh = (conv.ih - 1) * stride[0] - 2 * padding[0] + dilation[0] * (conv.kh - 1) + output_padding[0] + 1;
  conv.ow = (conv.iw - 1) * stride[1] - 2 * padding[1] + dilation[1] * (conv.kw - 1) + output_padding[1] + 1;
  return convolve(conv, weight.size(1) * groups, fastgen::cpu::conv_transpose2d_norm_act, x, weight, bias,
                  {norm_weight, norm_bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope}, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor mean,
    OptionalTensor var, OptionalTensor residual, std::string norm, int64_t num_groups, double eps, std::string activation,
    double negative_slope, std::vector<int64_t> stride, std::vector<int64_t> padding, bool reflect, int64_t groups,
    std::vector<int64_t> dilation, bool save) {
  Convolution conv = geometry(x, weight, stride, padding, dilation, groups);
  conv.oh = (conv.ih + 2 * padding[0] - dilation[0] * (conv.kh - 1) - 1) / stride[0] + 1;
  conv.ow = (conv.iw + 2 * padding[1] - dilation[1] * (conv.kw - 1) - 1) / stride[1] + 1;
  conv.reflect = reflect;
  return convolve(conv, weight.size(0), fastgen::cpu::conv2d_norm_act, x, weight, bias,
                  {norm_weight, norm_bias, mean, var, residual, norm, num_groups, eps, activation, negative_slope}, save);
}

Tensor convolution_weight_grad(Tensor grad, Tensor x, Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                               std::vector<int64_t> output_padding, int64_t groups, std::vector<int64_t> dilation, bool reflect) {
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
  fastgen::cpu::convolution_weight_grad(conv, plain.describe(grad, false, is_channels_last(grad)), !output_padding.empty(), grad.const_data_ptr(),
                                        x.const_data_ptr(), out.mutable_data_ptr(), torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("conv2d_norm_act", TORCH_BOX(&conv2d_norm_act));
  m.impl("conv_transpose2d_norm_act", TORCH_BOX(&conv_transpose2d_norm_act));
  m.impl("convolution_weight_grad", TORCH_BOX(&convolution_weight_grad));
}
