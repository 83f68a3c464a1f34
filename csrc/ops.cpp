// Dispatcher registrations of the native kernels, on the libtorch stable ABI. Schemas, fake kernels and gradients: fastgen/ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/conv_transpose2d_norm_act.h"
#include "cpu/norm_act.h"

namespace {

using fastgen::Activation;
using fastgen::cpu::ConvTranspose2d;
using fastgen::cpu::DType;
using fastgen::cpu::NormAct;
using fastgen::cpu::ParallelFor;
using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const ParallelFor torch_parallel = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
};

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
  if (name == "leaky_relu") return Activation::leaky_relu;
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

const void* data(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

NormAct norm_act_of(const Tensor& x, const std::string& norm, bool batch_stats, double eps, const std::string& activation,
                    double negative_slope, bool channels_last) {
  NormAct op{};
  op.dtype = dtype_of(x);
  op.n = x.size(0);
  op.c = x.size(1);
  op.s = 1;
  for (int64_t i = 2; i < x.dim(); ++i) op.s *= x.size(i);
  op.channels_last = channels_last || op.s == 1;
  op.normalize = norm != "none";
  op.batch_stats = op.normalize && batch_stats;
  op.per_sample = op.batch_stats && norm == "instance";
  if (op.channels_last && !op.per_sample) {  // one run of rows
    op.s *= op.n;
    op.n = 1;
  }
  op.eps = eps;
  op.activation = activation_of(activation);
  op.negative_slope = negative_slope;
  return op;
}

std::vector<int64_t> moments_size(const NormAct& op, int64_t samples) {
  if (!op.batch_stats) return {0};
  return op.per_sample ? std::vector<int64_t>{samples, op.c} : std::vector<int64_t>{op.c};
}

std::tuple<Tensor, Tensor, Tensor> norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor mean, OptionalTensor var,
                                            std::string norm, double eps, std::string activation, double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  const NormAct op = norm_act_of(x, norm, !mean, eps, activation, negative_slope, channels_last);
  const ScalarType acc = accumulation(x);
  Tensor out = torch::stable::empty_like(x);
  Tensor new_mean = new_tensor(x, moments_size(op, x.size(0)), acc), new_var = new_tensor(x, moments_size(op, x.size(0)), acc);
  if (x.numel() == 0) return {out, new_mean, new_var};
  if (op.batch_stats) {
    fastgen::cpu::norm_act_moments(op, x.const_data_ptr(), new_mean.mutable_data_ptr(), new_var.mutable_data_ptr(), torch_parallel);
    mean = new_mean;
    var = new_var;
  }
  mean = accumulated(mean, acc);
  var = accumulated(var, acc);
  weight = accumulated(weight, acc);
  bias = accumulated(bias, acc);
  fastgen::cpu::norm_act_apply(op, x.const_data_ptr(), data(mean), data(var), data(weight), data(bias), out.mutable_data_ptr(),
                               torch_parallel);
  return {out, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(Tensor grad_out, Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                     OptionalTensor mean, OptionalTensor var, bool batch_stats, std::string norm,
                                                     double eps, std::string activation, double negative_slope) {
  const bool channels_last = is_channels_last(x);
  x = in_format(x, channels_last);
  grad_out = in_format(grad_out, channels_last);
  const NormAct op = norm_act_of(x, norm, batch_stats, eps, activation, negative_slope, channels_last);
  const ScalarType acc = accumulation(x);
  const std::vector<int64_t> channels{op.normalize ? op.c : 0};
  Tensor grad_x = torch::stable::empty_like(x), grad_weight = new_tensor(x, channels, acc), grad_bias = new_tensor(x, channels, acc);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }
  mean = accumulated(mean, acc);
  var = accumulated(var, acc);
  weight = accumulated(weight, acc);
  bias = accumulated(bias, acc);
  fastgen::cpu::norm_act_backward(op, grad_out.const_data_ptr(), x.const_data_ptr(), data(mean), data(var), data(weight), data(bias),
                                  grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                                  torch_parallel);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_transpose2d_norm_act(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor mean,
    OptionalTensor var, std::string norm, double eps, std::string activation, double negative_slope, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> output_padding, int64_t groups, std::vector<int64_t> dilation, bool save) {
  const bool x_channels_last = is_channels_last(x), channels_last = x_channels_last || is_channels_last(weight);
  x = in_format(x, x_channels_last);
  ConvTranspose2d conv{};
  int64_t out_size[2];
  for (int i = 0; i < 2; ++i) {
    out_size[i] = (x.size(2 + i) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.size(2 + i) - 1) + output_padding[i] + 1;
    conv.stride[i] = stride[i];
    conv.padding[i] = padding[i];
    conv.dilation[i] = dilation[i];
  }
  for (int i = 0; i < 4; ++i) conv.weight_strides[i] = weight.stride(i);
  conv.ic = x.size(1);
  conv.ih = x.size(2);
  conv.iw = x.size(3);
  conv.oh = out_size[0];
  conv.ow = out_size[1];
  conv.kh = weight.size(2);
  conv.kw = weight.size(3);
  conv.groups = groups;
  conv.x_channels_last = x_channels_last || conv.ih * conv.iw == 1;

  Tensor out = new_tensor(x, {x.size(0), weight.size(1) * groups, conv.oh, conv.ow}, x.scalar_type(), channels_last);
  NormAct op = norm_act_of(out, norm, !mean, eps, activation, negative_slope, channels_last);
  op.n = x.size(0);  // the convolution works image by image
  op.s = conv.oh * conv.ow;
  Tensor pre = save ? torch::stable::empty_like(out) : new_tensor(x, {0}, x.scalar_type());
  const ScalarType acc = accumulation(x);
  Tensor new_mean = new_tensor(x, moments_size(op, op.n), acc), new_var = new_tensor(x, moments_size(op, op.n), acc);
  if (out.numel() == 0) return {out, pre, new_mean, new_var};
  bias = accumulated(bias, acc);
  norm_weight = accumulated(norm_weight, acc);
  norm_bias = accumulated(norm_bias, acc);
  if (op.batch_stats) {
    mean = new_mean;
    var = new_var;
  }
  mean = accumulated(mean, acc);
  var = accumulated(var, acc);
  fastgen::cpu::conv_transpose2d_norm_act(conv, op, x.const_data_ptr(), weight.const_data_ptr(), data(bias),
                                          mean ? mean->mutable_data_ptr() : nullptr, var ? var->mutable_data_ptr() : nullptr,
                                          data(norm_weight), data(norm_bias), save ? pre.mutable_data_ptr() : nullptr,
                                          out.mutable_data_ptr(), torch_parallel);
  return {out, pre, new_mean, new_var};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("conv_transpose2d_norm_act", TORCH_BOX(&conv_transpose2d_norm_act));
}
