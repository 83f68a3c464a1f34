// Where the kernels run: PyTorch's threads, or the current stream of a tensor's device.
#pragma once

#include "ops/tensors.h"

#if defined(FASTGEN_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#else
#include "cpu/convolution.h"
#include "cpu/reparameterize.h"
#include "cpu/spectral_norm.h"
#endif

namespace fastgen {
namespace {

// Where a call's kernels run. It lives until the end of the full expression that creates it.
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

}  // namespace
}  // namespace fastgen
