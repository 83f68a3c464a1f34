// Kernels that each have one fault, which the shim must find, and kernels without a fault.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"
#include "cuda/team.cuh"

using namespace fastgen::cuda;

namespace {

__global__ void reverse(int* data, bool wait) {
  int* const shared = shared_memory<int>();
  shared[threadIdx.x] = data[threadIdx.x];
  if (wait) __syncthreads();
  data[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void neighbours(int* data, bool wait) {  // of one warp
  int* const shared = shared_memory<int>();
  shared[threadIdx.x] = data[threadIdx.x];
  if (wait) __syncwarp();
  data[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void half_a_barrier(int* data) {
  if (threadIdx.x < 32) __syncthreads();
  data[threadIdx.x] = 0;
}

__global__ void half_a_warp(int* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_xor_sync(kAllLanes, data[threadIdx.x], 1);
}

__global__ void copies(const int* from, int* to, bool wait) {
  int* const shared = shared_memory<int>();
  copy_async(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, true);
  commit_copies();
  if (wait) wait_for_copies<0>();
  for (int i = 0; i < 4; ++i) to[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}

__global__ void copies_twice(const int* from, int* to,
                             bool wait) {  // the second copy overwrites what a neighbour reads
  int* const shared = shared_memory<int>();
  copy_async(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, true);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  to[threadIdx.x] = shared[4 * (threadIdx.x ^ 1)];
  if (wait) __syncthreads();
  copy_async(shared + 4 * threadIdx.x, from, true);
  commit_copies();
  __syncthreads();
  wait_for_copies<0>();
}

__global__ void block_after_block(int* data) { data[blockIdx.x + 1] = data[blockIdx.x] + 1; }

__global__ void beyond(int* data, int size) { data[threadIdx.x + size] = 1; }

__global__ void write_64_bits(int* data, int from) { *reinterpret_cast<int64_t*>(data + 2 * threadIdx.x + from) = 1; }

__global__ void product(const BFloat16* a, const BFloat16* b, float* out) {  // out (16, 8) = a (16, 16) b (8, 16)^T
  const int group = threadIdx.x / 4, column = threadIdx.x % 4;
  BFloat16* const shared = shared_memory<BFloat16>();
  for (int i = threadIdx.x; i < 256; i += kWarp) shared[i] = a[i];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  load_matrices(fragment_a, shared + (threadIdx.x % 16) * 16 + threadIdx.x / 16 * 8);
  memcpy(&fragment_b[0], b + group * 16 + 2 * column, 4);
  memcpy(&fragment_b[1], b + group * 16 + 2 * column + 8, 4);
  float total[4] = {};
  multiply<BFloat16>(total, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * column + i % 2] = total[i];
}

__global__ void product_tf32(const float* a, const float* b, float* out) {  // out (16, 8) = a (16, 8) b (8, 8)^T
  const int group = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t fragment_a[4] = {to_tf32(a[group * 8 + column]), to_tf32(a[(group + 8) * 8 + column]),
                                  to_tf32(a[group * 8 + column + 4]), to_tf32(a[(group + 8) * 8 + column + 4])};
  const uint32_t fragment_b[2] = {to_tf32(b[group * 8 + column]), to_tf32(b[group * 8 + column + 4])};
  float total[4] = {};
  multiply_tf32(total, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * column + i % 2] = total[i];
}

void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

}  // namespace

int main(int, char** arguments) {
  const Queue queue{};
  const std::string fault = arguments[1];
  std::vector<int> data(64), more(256);
  for (int i = 0; i < 256; ++i) more[i] = i + 1, data[i % 64] = i % 64;
  try {
    if (fault == "no barrier") launch(queue, reverse, dim3(1), 64, 256, data.data(), false);
    if (fault == "no warp barrier") launch(queue, neighbours, dim3(1), 32, 128, data.data(), false);
    if (fault == "half a barrier") launch(queue, half_a_barrier, dim3(1), 64, 0, data.data());
    if (fault == "half a warp") launch(queue, half_a_warp, dim3(1), 32, 0, data.data());
    if (fault == "beyond the end") launch(queue, beyond, dim3(1), 32, 0, data.data(), 40);
    if (fault == "a copy beyond the end") launch(queue, copies, dim3(1), 32, 512, more.data() + 160, more.data(), true);
    if (fault == "not aligned") launch(queue, write_64_bits, dim3(1), 32, 0, more.data(), 1);
    if (fault == "too much shared memory") launch(queue, reverse, dim3(1), 64, 100 << 10, data.data(), true);
    if (fault == "no wait") {
      std::vector<int> out(128);
      launch(queue, copies, dim3(1), 32, 512, more.data(), out.data(), false);
      check(out[0] == 1, "the data was read before it arrived");
    }
    if (fault == "a copy too early") launch(queue, copies_twice, dim3(1), 32, 512, more.data(), data.data(), false);
    if (fault == "block after block") {
      std::vector<int> out(4);
      launch(queue, block_after_block, dim3(3), 32, 0, out.data());
      check(out[3] == 3, "blocks run in any order");
    }
    if (fault == "none") {
      std::vector<int> out(128);
      launch(queue, copies_twice, dim3(1), 32, 512, more.data(), out.data(), true);
      check(out[0] == 5 && out[1] == 1, "copies_twice");
      launch(queue, reverse, dim3(1), 64, 256, data.data(), true);
      check(data[0] == 63 && data[63] == 0, "reverse");
      launch(queue, neighbours, dim3(1), 32, 128, data.data(), true);
      check(data[0] == 62 && data[1] == 63, "neighbours");
      launch(queue, write_64_bits, dim3(1), 32, 0, data.data(), 0);
      launch(queue, copies, dim3(1), 32, 512, more.data(), out.data(), true);
      check(out[0] == 1 && out[127] == 128, "copies");
      std::vector<float> a(256), b(128), products(128);
      std::vector<BFloat16> a16(256), b16(128);
      for (int i = 0; i < 256; ++i) a16[i] = __float2bfloat16(a[i] = static_cast<float>(i % 13 - 6));
      for (int i = 0; i < 128; ++i) b16[i] = __float2bfloat16(b[i] = static_cast<float>(i % 7 - 3));
      const auto compare = [&](int depth) {
        for (int i = 0; i < 16; ++i)
          for (int j = 0; j < 8; ++j) {
            float sum = 0;
            for (int k = 0; k < depth; ++k) sum += a[i * depth + k] * b[j * depth + k];
            check(products[i * 8 + j] == sum, "product of matrices");
          }
      };
      launch(queue, product, dim3(1), 32, 512, a16.data(), b16.data(), products.data());
      compare(16);
      launch(queue, product_tf32, dim3(1), 32, 0, a.data(), b.data(), products.data());
      compare(8);
    }
  } catch (const std::runtime_error& error) {
    puts(error.what());
    return 1;
  }
  return 0;
}
