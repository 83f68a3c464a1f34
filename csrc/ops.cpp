// Dispatcher registrations of the native kernels, on the libtorch stable ABI. Schemas, fake kernels and gradients: fastgen/ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/reparameterize.h"
#include "cpu/spectral_norm.h"

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

// Sizes and keys of reparameterize: mu is (keys, rows, size), key (*, 2) with the leading dimensions of mu.
fastgen::cpu::Reparameterize describe_sampler(const Tensor& mu, const Tensor& key, int64_t num_samples) {
  fastgen::cpu::Reparameterize op{};
  op.dtype = dtype_of(mu);
  op.keys = key.numel() / 2;
  op.samples = std::max<int64_t>(1, num_samples);
  op.rows = mu.size(key.dim() - 1);
  op.size = op.keys * op.rows ? mu.numel() / (op.keys * op.rows) : 0;
  op.key = static_cast<const int64_t*>(key.const_data_ptr());
  op.mean_period = op.logvar_period = std::max<int64_t>(1, mu.numel());
  return op;
}

// After how many elements a tensor that is expanded along its first dimensions repeats itself; 0 if it lies otherwise.
int64_t period_of(const Tensor& x) {
  int64_t period = 1, dim = x.dim() - 1;
  for (; dim >= 0 && (x.size(dim) == 1 || x.stride(dim) == period); --dim) period *= x.size(dim);
  for (; dim >= 0; --dim)
    if (x.size(dim) != 1 && x.stride(dim) != 0) return 0;
  return period;
}

// The arguments of the sampler after mu and logvar, in the kernel's form.
struct SamplerOptions {
  OptionalTensor prior_mean, prior_logvar;
  std::optional<double> logvar_min, logvar_max;
  double free_bits, beta;

  fastgen::cpu::ReparameterizeTensors prepare(fastgen::cpu::Reparameterize& op, const Tensor& mu, const Tensor& logvar, bool channels_last) {
    const double infinity = std::numeric_limits<double>::infinity();
    op.logvar_min = logvar_min.value_or(-infinity);
    op.logvar_max = logvar_max.value_or(infinity);
    op.free_bits = free_bits > 0 ? free_bits : -infinity;
    op.beta = beta;
    if (prior_mean) {
      op.mean_period = make_periodic(*prior_mean, channels_last);
      op.logvar_period = make_periodic(*prior_logvar, channels_last);
    }
    return {mu.const_data_ptr(), logvar.const_data_ptr(), data(prior_mean), data(prior_logvar)};
  }

  static int64_t make_periodic(Tensor& x, bool channels_last) {
    if (const int64_t period = channels_last ? 0 : period_of(x)) return period;
    x = in_format(x, channels_last);
    return x.numel();
  }
};

bool counts_channels_last(const Tensor& mu, const Tensor& key, int64_t num_samples) {
  return is_channels_last(mu) && key.dim() == 1 && num_samples == 0;
}

Tensor philox_normal(Tensor key, std::vector<int64_t> size, ScalarType dtype) {
  key = torch::stable::contiguous(key);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < key.dim(); ++i) shape.push_back(key.size(i));
  shape.insert(shape.end(), size.begin(), size.end());
  Tensor out = new_tensor(key, shape, dtype);
  fastgen::cpu::Reparameterize op{};
  op.dtype = dtype_of(out);
  op.keys = key.numel() / 2;
  op.samples = op.rows = 1;
  op.size = op.keys ? out.numel() / op.keys : 0;
  op.key = static_cast<const int64_t*>(key.const_data_ptr());
  fastgen::cpu::noise(op, out.mutable_data_ptr(), torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> reparameterize(Tensor mu, Tensor logvar, Tensor key, OptionalTensor prior_mean, OptionalTensor prior_logvar,
                                          int64_t num_samples, bool with_kl, std::optional<double> logvar_min,
                                          std::optional<double> logvar_max, double free_bits, double beta) {
  const bool channels_last = counts_channels_last(mu, key, num_samples);
  mu = in_format(mu, channels_last);
  logvar = in_format(logvar, channels_last);
  key = torch::stable::contiguous(key);
  std::vector<int64_t> shape, rows;
  for (int64_t i = 0; i < mu.dim(); ++i) {
    if (i == key.dim() - 1 && num_samples) shape.push_back(num_samples);
    shape.push_back(mu.size(i));
    if (i < key.dim()) rows.push_back(mu.size(i));
  }
  Tensor z = new_tensor(mu, shape, mu.scalar_type(), channels_last);
  Tensor kl = new_tensor(mu, with_kl ? rows : std::vector<int64_t>{0}, accumulation(mu));
  if (mu.numel() == 0) {
    torch::stable::zero_(kl);
    return {z, kl};
  }
  fastgen::cpu::Reparameterize op = describe_sampler(mu, key, num_samples);
  SamplerOptions options{prior_mean, prior_logvar, logvar_min, logvar_max, free_bits, beta};
  fastgen::cpu::reparameterize(op, options.prepare(op, mu, logvar, channels_last), z.mutable_data_ptr(),
                               with_kl ? kl.mutable_data_ptr() : nullptr, torch_parallel());
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reparameterize_backward(OptionalTensor grad_z, OptionalTensor grad_kl, Tensor mu, Tensor logvar,
                                                                   Tensor key, OptionalTensor prior_mean, OptionalTensor prior_logvar,
                                                                   int64_t num_samples, std::optional<double> logvar_min,
                                                                   std::optional<double> logvar_max, double free_bits, double beta) {
  const bool channels_last = counts_channels_last(mu, key, num_samples);
  mu = in_format(mu, channels_last);
  logvar = in_format(logvar, channels_last);
  key = torch::stable::contiguous(key);
  if (grad_z) grad_z = in_format(*grad_z, channels_last);
  if (grad_kl) grad_kl = torch::stable::contiguous(*grad_kl);
  const auto like_mu = [&](bool wanted) { return wanted ? torch::stable::empty_like(mu) : new_tensor(mu, {0}, mu.scalar_type()); };
  Tensor grad_mu = like_mu(true), grad_logvar = like_mu(true);
  Tensor grad_mean = like_mu(prior_mean.has_value()), grad_prior_logvar = like_mu(prior_mean.has_value());
  if (mu.numel() == 0) return {grad_mu, grad_logvar, grad_mean, grad_prior_logvar};
  fastgen::cpu::Reparameterize op = describe_sampler(mu, key, num_samples);
  SamplerOptions options{prior_mean, prior_logvar, logvar_min, logvar_max, free_bits, beta};
  fastgen::cpu::reparameterize_backward(op, data(grad_z), data(grad_kl), options.prepare(op, mu, logvar, channels_last),
                                        {grad_mu.mutable_data_ptr(), grad_logvar.mutable_data_ptr(), grad_mean.mutable_data_ptr(),
                                         grad_prior_logvar.mutable_data_ptr()},
                                        torch_parallel());
  return {grad_mu, grad_logvar, grad_mean, grad_prior_logvar};
}

// A weight as the matrix of its dimension `dim` against all others, in its own memory order, and the vectors in that order.
struct SpectralWeight {
  Tensor weight, u, v, sigma;
  ScalarType vector_dtype;  // of the caller's u and v
  int64_t swapped = 0;      // channels of a channels_last weight whose v counts them first, and the matrix's last

  SpectralWeight(const Tensor& given, const Tensor& given_u, const Tensor& given_v, int64_t dim)
      : weight(in_format(given, channels_last(given, dim))), u(own(given_u, weight)), v(own(given_v, weight)),
        sigma(new_tensor(weight, {}, accumulation(weight))), vector_dtype(given_u.scalar_type()) {
    if (channels_last(given, dim) && dim == 0) swapped = given.size(1);
    if (swapped) v = transposed(v, swapped);
    matrix.dtype = dtype_of(weight);
    matrix.d = weight.size(dim);
    matrix.a = matrix.b = 1;
    for (int64_t i = 0; i < weight.dim(); ++i)
      if (i != dim) (i < dim || (dim == 1 && channels_last(given, dim)) ? matrix.a : matrix.b) *= weight.size(i);
    matrix.weight = weight.const_data_ptr();
    matrix.u = u.mutable_data_ptr();
    matrix.v = v.mutable_data_ptr();
    matrix.sigma = sigma.mutable_data_ptr();
  }

  Tensor returned_u() const { return torch::stable::to(u, vector_dtype); }
  Tensor returned_v() const { return torch::stable::to(swapped ? transposed(v, v.numel() / std::max<int64_t>(1, swapped)) : v, vector_dtype); }

  fastgen::cpu::SpectralMatrix matrix{};

 private:
  static bool channels_last(const Tensor& weight, int64_t dim) { return is_channels_last(weight) && dim < 2; }

  static Tensor own(const Tensor& x, const Tensor& weight) {
    return x.scalar_type() == accumulation(weight) ? torch::stable::contiguous(torch::stable::clone(x)) : torch::stable::to(x, accumulation(weight));
  }

  static Tensor transposed(const Tensor& x, int64_t rows) {
    if (x.numel() == 0) return x;
    return torch::stable::reshape(torch::stable::contiguous(torch::stable::transpose(torch::stable::reshape(x, {rows, x.numel() / rows}), 0, 1)),
                                  {x.numel()});
  }
};

const DType all_dtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

using Tensors = std::vector<Tensor>;

std::tuple<Tensors, Tensors, Tensors, Tensors> spectral_norm(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> dims,
                                                             int64_t iterations, double eps, bool v_first) {
  std::vector<SpectralWeight> items;
  Tensors outs, sigmas, new_us, new_vs;
  for (size_t i = 0; i < weights.size(); ++i) {
    items.emplace_back(weights[i], us[i], vs[i], dims[i]);
    outs.push_back(torch::stable::empty_like(items[i].weight));
    items[i].matrix.out = outs[i].mutable_data_ptr();
  }
  for (DType dtype : all_dtypes) {
    std::vector<fastgen::cpu::SpectralMatrix> matrices;
    for (const SpectralWeight& item : items)
      if (item.matrix.dtype == dtype) matrices.push_back(item.matrix);
    if (!matrices.empty()) fastgen::cpu::spectral_norm(matrices, iterations, eps, v_first, torch_parallel());
  }
  for (const SpectralWeight& item : items) {
    sigmas.push_back(item.sigma);
    new_us.push_back(item.returned_u());
    new_vs.push_back(item.returned_v());
  }
  return {outs, sigmas, new_us, new_vs};
}

Tensors spectral_norm_backward(Tensors grad_outs, Tensors grad_sigmas, Tensors weights, Tensors sigmas, Tensors us, Tensors vs,
                               std::vector<int64_t> dims) {
  std::vector<SpectralWeight> items;
  Tensors grads;
  for (size_t i = 0; i < weights.size(); ++i) {
    items.emplace_back(weights[i], us[i], vs[i], dims[i]);
    grads.push_back(torch::stable::empty_like(items[i].weight));
    grad_outs[i] = in_format(grad_outs[i], is_channels_last(items[i].weight));
    for (Tensor* t : {&sigmas[i], &grad_sigmas[i]})
      if (t->scalar_type() != accumulation(weights[i])) *t = torch::stable::to(*t, accumulation(weights[i]));
    items[i].matrix.sigma = sigmas[i].mutable_data_ptr();
  }
  for (DType dtype : all_dtypes) {
    std::vector<fastgen::cpu::SpectralMatrix> matrices;
    std::vector<fastgen::cpu::SpectralMatrixGrad> of;
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].matrix.dtype != dtype) continue;
      matrices.push_back(items[i].matrix);
      of.push_back({grad_outs[i].const_data_ptr(), grad_sigmas[i].const_data_ptr(), grads[i].mutable_data_ptr()});
    }
    if (!matrices.empty()) fastgen::cpu::spectral_norm_backward(matrices, of, torch_parallel());
  }
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("conv2d_norm_act", TORCH_BOX(&conv2d_norm_act));
  m.impl("conv_transpose2d_norm_act", TORCH_BOX(&conv_transpose2d_norm_act));
  m.impl("convolution_weight_grad", TORCH_BOX(&convolution_weight_grad));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("reparameterize", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward));
}
