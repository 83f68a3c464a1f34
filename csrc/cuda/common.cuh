// What the CUDA kernels share: element types, 16-byte accesses, reductions, the launch.
//
// Everything that is not C++ stands here and in matrix.cuh, so that a host compiler can build and run the kernels
// (tests/cuda): shared memory is dynamic alone, every lane of a warp takes part in a warp's operation, and a kernel is
// launched by `launch`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "shared/welford.h"

namespace fastgen::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kAccess = 16;  // bytes of the widest access

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Float16 x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return __float2half(x);
}

// So many values in one access. Its arrays are indexed by constants alone, once loops are unrolled: they stay in
// registers.
template <class T, int count>
struct alignas(sizeof(T) * count) Vector {
  T value[count];
};

template <int count, class T>
__device__ void load(const T* from, float (&to)[count]) {
  const Vector<T, count> read = *reinterpret_cast<const Vector<T, count>*>(from);
#pragma unroll
  for (int i = 0; i < count; ++i) to[i] = to_float(read.value[i]);
}

template <int count, class T>
__device__ void store(T* to, const float (&from)[count]) {
  Vector<T, count> written;
#pragma unroll
  for (int i = 0; i < count; ++i) written.value[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, count>*>(to) = written;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAccess == 0; }

// Values of an access to all these addresses, each null or so far aligned, in rows of `length` elements.
template <class T, class... Pointers>
int access_of(int64_t length, Pointers... pointers) {
  constexpr int widest = kAccess / sizeof(T);
  const bool aligned = (is_aligned(pointers) && ...);
  return aligned && length % widest == 0 ? widest : 1;
}

template <Activation activation, int count>
__device__ void activate_by(float (&z)[count], float slope) {
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = fastgen::activate<activation>(z[i], slope);
}

// act(z), and grad * act'(z), by an activation that is known when the kernel runs: one decision for all of z.
template <int count>
__device__ void activate(Activation activation, float (&z)[count], float slope) {
  switch (activation) {
    case Activation::relu: return activate_by<Activation::relu>(z, slope);
    case Activation::leaky_relu: return activate_by<Activation::leaky_relu>(z, slope);
    case Activation::tanh: return activate_by<Activation::tanh>(z, slope);
    case Activation::sigmoid: return activate_by<Activation::sigmoid>(z, slope);
    case Activation::silu: return activate_by<Activation::silu>(z, slope);
    default: return;
  }
}

__device__ inline float activate_grad(Activation activation, float grad, float z, float slope) {
  switch (activation) {
    case Activation::relu: return fastgen::activate_grad<Activation::relu>(grad, z, slope);
    case Activation::leaky_relu: return fastgen::activate_grad<Activation::leaky_relu>(grad, z, slope);
    case Activation::tanh: return fastgen::activate_grad<Activation::tanh>(grad, z, slope);
    case Activation::sigmoid: return fastgen::activate_grad<Activation::sigmoid>(grad, z, slope);
    case Activation::silu: return fastgen::activate_grad<Activation::silu>(grad, z, slope);
    default: return grad;
  }
}

// The sum over a team of `lanes` threads, a power of 2, in its first one, in an order that `lanes` alone decides.
// `scratch` is shared memory for a value of each warp, written where a team has several.
template <class T>
__device__ T team_sum(T x, int lanes, T* scratch) {
  for (int step = min(lanes, kWarp) / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (lanes <= kWarp) return x;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[warp] = x;
  __syncthreads();
  if (threadIdx.x % lanes == 0)
    for (int i = 1; i < lanes / kWarp; ++i) x += scratch[warp + i];
  return x;
}

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

// Says in the PTX, for tests/cuda/compiled.py, with how many bytes of shared memory a kernel is launched that takes
// much.
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

// return function<T>(...) for the T of dtype
#define FASTGEN_FOR_GPU_DTYPE(dtype, function, ...)                                                       \
  switch (dtype) {                                                                                        \
    case DType::float32: return function<float>(__VA_ARGS__);                                             \
    case DType::bfloat16: return function<BFloat16>(__VA_ARGS__);                                         \
    case DType::float16: return function<Float16>(__VA_ARGS__);                                           \
    default: throw std::runtime_error("fastgen: the CUDA kernels compute float32, bfloat16 and float16"); \
  }

}  // namespace fastgen::cuda
