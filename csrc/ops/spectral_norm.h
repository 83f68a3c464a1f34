// Spectral normalization of a list of weights, and its gradient.
#pragma once

#include "ops/execution.h"

namespace fastgen {
namespace {

// A weight as a matrix: dimension `dim` by all others, in the weight's memory order; the vectors have the same order.
struct SpectralWeight {
  Tensor weight, input_u, input_v;
  Tensor u, v, sigma;       // see `add_results`
  ScalarType vector_dtype;  // of the caller's u and v
  int64_t swapped = 0;      // channels of a channels_last weight whose v counts them first, and the matrix's last

  SpectralWeight(const Tensor& tensor, const Tensor& u_, const Tensor& v_, int64_t dim)
      : weight(in_format(tensor, channels_last(tensor, dim))),
        input_u(*accumulated(u_, accumulation(weight))),
        input_v(*accumulated(v_, accumulation(weight))),
        vector_dtype(u_.scalar_type()) {
    if (channels_last(tensor, dim) && dim == 0) swapped = tensor.size(1);
    if (swapped) input_v = transposed(input_v, swapped);
    matrix.dtype = dtype_of(weight);
    matrix.rows = weight.size(dim);
    matrix.outer = matrix.inner = 1;
    for (int64_t i = 0; i < weight.dim(); ++i)
      if (i != dim)
        (i < dim || (dim == 1 && channels_last(tensor, dim)) ? matrix.outer : matrix.inner) *= weight.size(i);
    matrix.weight = weight.const_data_ptr();
    matrix.input_u = input_u.const_data_ptr();
    matrix.input_v = input_v.const_data_ptr();
  }

  // Allocates the results of the iterations.
  void add_results() {
    u = torch::stable::empty_like(input_u);
    v = torch::stable::empty_like(input_v);
    sigma = new_tensor(weight, {}, accumulation(weight));
    matrix.u = u.mutable_data_ptr();
    matrix.v = v.mutable_data_ptr();
    matrix.sigma = sigma.mutable_data_ptr();
  }

  Tensor returned_u() const { return torch::stable::to(u, vector_dtype); }
  Tensor returned_v() const {
    return torch::stable::to(swapped ? transposed(v, v.numel() / std::max<int64_t>(1, swapped)) : v, vector_dtype);
  }

  SpectralMatrix matrix{};

 private:
  static bool channels_last(const Tensor& weight, int64_t dim) { return is_channels_last(weight) && dim < 2; }

  static Tensor transposed(const Tensor& x, int64_t rows) {
    if (x.numel() == 0) return x;
    return torch::stable::reshape(
        torch::stable::contiguous(torch::stable::transpose(torch::stable::reshape(x, {rows, x.numel() / rows}), 0, 1)),
        {x.numel()});
  }
};

const DType all_dtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

using Tensors = std::vector<Tensor>;

std::tuple<Tensors, Tensors, Tensors, Tensors> spectral_norm(Tensors weights, Tensors us, Tensors vs,
                                                             std::vector<int64_t> dims, int64_t iterations, double eps,
                                                             bool v_first, bool divide) {
  std::vector<SpectralWeight> items;
  Tensors outs, sigmas, new_us, new_vs;
  for (size_t i = 0; i < weights.size(); ++i) {
    items.emplace_back(weights[i], us[i], vs[i], dims[i]);
    items[i].add_results();
    outs.push_back(divide ? torch::stable::empty_like(items[i].weight)
                          : new_tensor(items[i].weight, {0}, weights[i].scalar_type()));
    if (divide) items[i].matrix.out = outs[i].mutable_data_ptr();
  }
  for (DType dtype : all_dtypes) {
    std::vector<SpectralMatrix> matrices;
    for (const SpectralWeight& item : items)
      if (item.matrix.dtype == dtype) matrices.push_back(item.matrix);
    if (!matrices.empty()) kernels::spectral_norm(matrices, iterations, eps, v_first, Execution(weights[0]));
  }
  for (const SpectralWeight& item : items) {
    sigmas.push_back(item.sigma);
    new_us.push_back(item.returned_u());
    new_vs.push_back(item.returned_v());
  }
  return {outs, sigmas, new_us, new_vs};
}

Tensors spectral_norm_backward(Tensors grad_outs, Tensors grad_sigmas, Tensors weights, Tensors sigmas, Tensors us,
                               Tensors vs, std::vector<int64_t> dims) {
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
    std::vector<SpectralMatrix> matrices;
    std::vector<SpectralMatrixGrad> matrix_grads;
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].matrix.dtype != dtype) continue;
      matrices.push_back(items[i].matrix);
      matrix_grads.push_back(
          {grad_outs[i].const_data_ptr(), grad_sigmas[i].const_data_ptr(), grads[i].mutable_data_ptr()});
    }
    if (!matrices.empty()) kernels::spectral_norm_backward(matrices, matrix_grads, Execution(weights[0]));
  }
  return grads;
}

}  // namespace
}  // namespace fastgen
