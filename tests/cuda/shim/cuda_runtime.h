// CUDA for a host compiler: kernels become functions that run block by block, each thread as a fibre (shim.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
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
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace shim {

struct Position {
  dim3 thread, block, block_size;
};
const Position& here();

// Runs a kernel. Raises std::runtime_error for a race in shared memory or a deadlock of threads.
void launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);
void* shared_memory();

void sync_block();
void sync_warp();

// Every lane of the warp calls it with its `size` bytes at `value`; `combine` reads the bytes of all lanes and writes
// all results.
void with_warp(const void* value, size_t size, void* result, size_t result_size,
               const std::function<void(const unsigned char* inputs, unsigned char* results)>& combine);

void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int left);
void load_matrices(uint32_t (&to)[4], const void* row);
void multiply_16_bits(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);
void multiply_tf32(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
uint32_t to_tf32(float x);

}  // namespace shim

#define threadIdx (shim::here().thread)
#define blockIdx (shim::here().block)
#define blockDim (shim::here().block_size)

inline void __syncthreads() { shim::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::sync_warp(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  T result;
  shim::with_warp(&x, sizeof(T), &result, sizeof(T), [=](const unsigned char* inputs, unsigned char* results) {
    for (int lane = 0; lane < 32; ++lane)
      memcpy(results + lane * sizeof(T), inputs + (lane ^ mask) * sizeof(T), sizeof(T));
  });
  return result;
}

using std::max;
using std::min;
