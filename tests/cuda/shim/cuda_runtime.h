// A host compiler's stand-in for CUDA: kernels become functions that are run block by block, each thread a fibre (shim.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 4, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace shim {

struct Place {
  dim3 thread, block, block_size, grid;
};
const Place& here();

// Runs a kernel. Raises std::runtime_error for a race in shared memory, and where threads wait for each other for ever.
void launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);
void* shared_memory();

void sync_block();
void sync_warp();

// Every lane of the warp calls it with its `size` bytes; combine then sees all lanes' and writes all lanes' results.
void with_warp(const void* mine, size_t size, void* result, size_t result_size,
               const std::function<void(const unsigned char* of_lanes, unsigned char* results)>& combine);

template <class T, class Lane>
T shuffle(T x, Lane from) {
  T result;
  with_warp(&x, sizeof(T), &result, sizeof(T), [&](const unsigned char* given, unsigned char* results) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = from(lane);
      memcpy(results + lane * sizeof(T), given + (source >= 0 && source < 32 ? source : lane) * sizeof(T), sizeof(T));
    }
  });
  return result;
}

void copy_async(void* to, const void* from, int bytes, bool valid);
void commit_copies();
void wait_for_copies(int left);
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed);
float to_float(const void* value, bool bfloat16);
void multiply_16_bits(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);
void multiply_tf32(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
uint32_t to_tf32(float x);

}  // namespace shim

#define threadIdx (shim::here().thread)
#define blockIdx (shim::here().block)
#define blockDim (shim::here().block_size)
#define gridDim (shim::here().grid)

inline void __syncthreads() { shim::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::sync_warp(); }

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return shim::shuffle(x, [=](int) { return lane % 32; });
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return shim::shuffle(x, [=](int lane) { return lane ^ mask; });
}
template <class T>
T __shfl_down_sync(unsigned, T x, int step) {
  return shim::shuffle(x, [=](int lane) { return lane + step; });
}
template <class T>
T __shfl_up_sync(unsigned, T x, int step) {
  return shim::shuffle(x, [=](int lane) { return lane - step; });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned votes = 0;
  shim::with_warp(&predicate, sizeof(predicate), &votes, sizeof(votes), [](const unsigned char* given, unsigned char* results) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      int of_lane;
      memcpy(&of_lane, given + lane * sizeof(int), sizeof(int));
      all |= (of_lane != 0 ? 1u : 0u) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) memcpy(results + lane * sizeof(all), &all, sizeof(all));
  });
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T>
T atomicAdd(T* to, T value) {  // threads take turns: nothing comes between
  const T before = *to;
  *to = before + value;
  return before;
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
