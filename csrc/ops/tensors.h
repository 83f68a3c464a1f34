// Tensors of the libtorch stable ABI, as the kernels take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "shared/problems.h"

namespace fastgen {
namespace {

using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

[[maybe_unused]] DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "fastgen: the dtype must be float32, float64, bfloat16 or float16");
  }
}
[[maybe_unused]] DType dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

[[maybe_unused]] Activation activation_of(const std::string& name) {
  for (int i = 0; i < kActivations; ++i)
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(name == "leaky_relu_", "fastgen: unknown activation ", name);
  return Activation::leaky_relu;
}

// The same rule as in fastgen/ops/_layout.py.
[[maybe_unused]] bool is_channels_last(const Tensor& x) {
  return x.dim() == 4 && x.stride(1) == 1 && !x.is_contiguous();
}

[[maybe_unused]] Tensor in_format(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

[[maybe_unused]] Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype,
                                   bool channels_last = false) {
  return torch::stable::empty(size, dtype, Layout::Strided, like.device(), false,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Parameters and statistics enter a kernel in the accumulation type.
[[maybe_unused]] ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

[[maybe_unused]] OptionalTensor accumulated(const OptionalTensor& x, ScalarType dtype) {
  if (!x) return std::nullopt;
  return torch::stable::contiguous(x->scalar_type() == dtype ? *x : torch::stable::to(*x, dtype));
}

[[maybe_unused]] void* data(const OptionalTensor& x) { return x ? x->mutable_data_ptr() : nullptr; }

}  // namespace
}  // namespace fastgen
