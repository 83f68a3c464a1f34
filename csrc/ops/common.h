// What the ops of csrc/ops share: tensors of the libtorch stable ABI as the kernels' plain structs.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(FASTGEN_CUDA)
#include "cuda/kernels.h"
#else
#include "cpu/convolution.h"
#include "cpu/reparameterize.h"
#include "cpu/spectral_norm.h"
#endif

namespace fastgen {
namespace {

using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where the kernels run that a call's tensors are given to, for the duration of the expression that it stands in.
#if defined(FASTGEN_CUDA)
namespace kernels = cuda;

class Execution {
 public:
  explicit Execution(const Tensor& x) : x_(x) {
    queue_.scratch = [this](int64_t bytes) {
      scratch_.push_back(torch::stable::empty({bytes}, ScalarType::Byte, Layout::Strided, x_.device()));
      return scratch_.back().mutable_data_ptr();
    };
#if defined(USE_CUDA)
    guard_.emplace(x.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &queue_.stream));
#endif
    queue_.multiprocessors = cuda::multiprocessors();
  }
  Execution(const Execution&) = delete;
  operator const cuda::Queue&() const { return queue_; }

 private:
  const Tensor& x_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::vector<Tensor> scratch_;
  cuda::Queue queue_{};
};

// Whether this library has code for a device.
[[maybe_unused]] bool has_code(int64_t device) {
#if defined(USE_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(static_cast<torch::stable::accelerator::DeviceIndex>(device));
#endif
  return device >= 0 && cuda::has_code();
}
#else
namespace kernels = cpu;

class Execution {
 public:
  explicit Execution(const Tensor&) {}
  operator const cpu::ParallelFor&() const { return parallel_; }

 private:
  const cpu::ParallelFor parallel_{static_cast<int>(torch::stable::get_num_threads()),
                                   [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
                                     torch::stable::parallel_for(0, count, 1, body);
                                   }};
};
#endif

[[maybe_unused]] DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "fastgen: x must be float32, float64, bfloat16 or float16");
  }
}

[[maybe_unused]] Activation activation_of(const std::string& name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu" || name == "leaky_relu_") return Activation::leaky_relu;
  if (name == "tanh") return Activation::tanh;
  if (name == "sigmoid") return Activation::sigmoid;
  STD_TORCH_CHECK(name == "silu", "fastgen: unknown activation ", name);
  return Activation::silu;
}

// fastgen/ops/_layout.py has the same rule.
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
