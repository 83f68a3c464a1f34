// Tensor-core products of a warp, and the copies from global to shared memory that feed them (sm_80 and later).
#pragma once

#include "cuda/access.cuh"

namespace fastgen::cuda {

// Copies 16 bytes from global to shared memory asynchronously. If not `valid`, it writes zeros and does not read the
// address. A group of copies ends with commit_copies; wait_for_copies<n> waits until at most n of the thread's last
// groups are pending. That covers the thread's own copies only: after a barrier they are visible to all threads of the
// block.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
#if defined(__CUDACC__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  shim::copy_async(to, from, valid);
#endif
}

__device__ inline void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  shim::commit_copies();
#endif
}

template <int left>
__device__ void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#else
  shim::wait_for_copies(left);
#endif
}

// Four 8x8 matrices of 16-bit values from shared memory: lane i gives the address of row i % 8 of matrix i / 8 and
// gets, of each matrix, values 2 (i % 4) and 2 (i % 4) + 1 of row i / 4.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
#if defined(__CUDACC__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
#else
  shim::load_matrices(to, row);
#endif
}

// total (16x8, float32) += a (16x16) b (16x8) of 16-bit values, in the fragments of mma.sync.m16n8k16. With g = lane /
// 4 and t = lane % 4: total is {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}; a is pairs from (g, 2t), (g + 8,
// 2t), (g, 2t + 8), (g + 8, 2t + 8), along a row; b pairs from (2t, g), (2t + 8, g), along a column.
template <class T>
__device__ void multiply(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  shim::multiply<T>(total, a, b);
#endif
}

// total (16x8) += a (16x8) b (8x8) in TF32: a is (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b is (t, g), (t + 4,
// g), each rounded by to_tf32.
__device__ inline void multiply_tf32(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  shim::multiply_tf32(total, a, b);
#endif
}

// The bits of x rounded to TF32: 10 bits of mantissa, ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return shim::to_tf32(x);
#endif
}

}  // namespace fastgen::cuda
