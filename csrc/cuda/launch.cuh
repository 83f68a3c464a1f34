// The launch of a kernel, and its shared memory.
//
// All code that is not standard C++ is here and in matrix.cuh, so that a host compiler can build and run the kernels
// (tests/cuda): shared memory is always dynamic, every lane of a warp takes part in a warp's operation, and a kernel is
// launched by `launch`.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace fastgen::cuda {

// The block's dynamic shared memory, 128-byte aligned.
template <class T>
__device__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char fastgen_shared[];
  return reinterpret_cast<T*>(fastgen_shared);
#else
  return static_cast<T*>(shim::shared_memory());
#endif
}

// Records in the PTX how much dynamic shared memory a kernel is launched with, for tests/cuda/compiled.py.
template <int bytes>
__device__ void takes_shared_memory() {
#if defined(__CUDACC__)
  asm volatile("// shared memory: %0" ::"n"(bytes));
#endif
}

// Runs the kernel on the queue's stream. Raises std::runtime_error with CUDA's reason.
template <class... Parameters, class... Arguments>
void launch(const Queue& queue, void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
            Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
#if defined(__CUDACC__)
  if (shared_bytes > (48 << 10))
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(queue.stream)>>>(
      static_cast<Parameters>(arguments)...);
#else
  shim::launch(blocks, threads, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string("fastgen: a CUDA kernel did not start: ") + cudaGetErrorString(error));
}

}  // namespace fastgen::cuda
