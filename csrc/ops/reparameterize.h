// The sampler, its noise alone, and its gradients.
#pragma once

#include "ops/execution.h"

namespace fastgen {
namespace {

// Sizes and keys of reparameterize: mu is (keys, rows, size), key (*, 2) with the leading dimensions of mu.
Reparameterize describe_sampler(const Tensor& mu, const Tensor& key, int64_t num_samples) {
  Reparameterize op{};
  op.dtype = dtype_of(mu);
  op.keys = key.numel() / 2;
  op.samples = std::max<int64_t>(1, num_samples);
  op.rows = mu.size(key.dim() - 1);
  op.size = op.keys * op.rows > 0 ? mu.numel() / (op.keys * op.rows) : 0;
  op.key = static_cast<const int64_t*>(key.const_data_ptr());
  op.mean_period = op.logvar_period = std::max<int64_t>(1, mu.numel());
  return op;
}

// The number of elements after which a tensor that is expanded along its first dimensions repeats; 0 for any other
// memory layout.
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

  ReparameterizeTensors prepare(Reparameterize& op, const Tensor& mu, const Tensor& logvar, bool channels_last) {
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

// In float64, or in float32 and then rounded.
Tensor philox_normal(Tensor key, std::vector<int64_t> size, ScalarType dtype) {
  key = torch::stable::contiguous(key);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < key.dim(); ++i) shape.push_back(key.size(i));
  shape.insert(shape.end(), size.begin(), size.end());
  Tensor out = new_tensor(key, shape, dtype == ScalarType::Double ? dtype : ScalarType::Float);
  Reparameterize op{};
  op.dtype = dtype_of(out);
  op.keys = key.numel() / 2;
  op.samples = op.rows = 1;
  op.size = op.keys ? out.numel() / op.keys : 0;
  op.key = static_cast<const int64_t*>(key.const_data_ptr());
  kernels::noise(op, out.mutable_data_ptr(), Execution(out));
  return out.scalar_type() == dtype ? out : torch::stable::to(out, dtype);
}

std::tuple<Tensor, Tensor> reparameterize(Tensor mu, Tensor logvar, Tensor key, OptionalTensor prior_mean,
                                          OptionalTensor prior_logvar, int64_t num_samples, bool with_kl,
                                          std::optional<double> logvar_min, std::optional<double> logvar_max,
                                          double free_bits, double beta) {
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
  Reparameterize op = describe_sampler(mu, key, num_samples);
  SamplerOptions options{prior_mean, prior_logvar, logvar_min, logvar_max, free_bits, beta};
  kernels::reparameterize(op, options.prepare(op, mu, logvar, channels_last), z.mutable_data_ptr(),
                          with_kl ? kl.mutable_data_ptr() : nullptr, Execution(mu));
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reparameterize_backward(
    OptionalTensor grad_z, OptionalTensor grad_kl, Tensor mu, Tensor logvar, Tensor key, OptionalTensor prior_mean,
    OptionalTensor prior_logvar, int64_t num_samples, std::optional<double> logvar_min,
    std::optional<double> logvar_max, double free_bits, double beta) {
  const bool channels_last = counts_channels_last(mu, key, num_samples);
  mu = in_format(mu, channels_last);
  logvar = in_format(logvar, channels_last);
  key = torch::stable::contiguous(key);
  if (grad_z) grad_z = in_format(*grad_z, channels_last);
  if (grad_kl) grad_kl = torch::stable::contiguous(*grad_kl);
  const auto like_mu = [&](bool needed) {
    return needed ? torch::stable::empty_like(mu) : new_tensor(mu, {0}, mu.scalar_type());
  };
  Tensor grad_mu = like_mu(true), grad_logvar = like_mu(true);
  Tensor grad_mean = like_mu(prior_mean.has_value()), grad_prior_logvar = like_mu(prior_mean.has_value());
  if (mu.numel() == 0) return {grad_mu, grad_logvar, grad_mean, grad_prior_logvar};
  Reparameterize op = describe_sampler(mu, key, num_samples);
  SamplerOptions options{prior_mean, prior_logvar, logvar_min, logvar_max, free_bits, beta};
  kernels::reparameterize_backward(op, data(grad_z), data(grad_kl), options.prepare(op, mu, logvar, channels_last),
                                   {grad_mu.mutable_data_ptr(), grad_logvar.mutable_data_ptr(),
                                    grad_mean.mutable_data_ptr(), grad_prior_logvar.mutable_data_ptr()},
                                   Execution(mu));
  return {grad_mu, grad_logvar, grad_mean, grad_prior_logvar};
}

}  // namespace
}  // namespace fastgen
