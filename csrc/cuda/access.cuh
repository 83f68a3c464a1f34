// Element types, and accesses to memory of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "shared/problems.h"

namespace fastgen::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

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

// `count` values in one access. After loops are unrolled its array is indexed by constants only, so it stays in
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

// The number of values per access: the widest access if all addresses (aligned or null) and rows of `length` elements
// allow it, else one value.
template <class T, class... Pointers>
int access_of(int64_t length, Pointers... pointers) {
  constexpr int widest = kAccess / sizeof(T);
  const bool aligned = (is_aligned(pointers) && ...);
  return aligned && length % widest == 0 ? widest : 1;
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
