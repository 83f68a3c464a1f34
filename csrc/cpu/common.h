// Types shared by the CPU kernels. No torch: raw pointers, plain structs, and the parallel-for that the caller hands in.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace fastgen::cpu {

// Runs body(begin, end) over a partition of [0, count), on so many threads at most.
struct ParallelFor {
  int threads;
  std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)> run;

  void operator()(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body) const { run(count, body); }
};

enum class DType { float32, float64, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

// Reductions and arithmetic of a type run in this one.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateIn<T>::type;

inline __attribute__((always_inline)) float load(const float* p) { return *p; }
inline __attribute__((always_inline)) double load(const double* p) { return *p; }
inline __attribute__((always_inline)) float load(const Float16* p) { return static_cast<float>(*p); }
inline __attribute__((always_inline)) float load(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __attribute__((always_inline)) void store(float* p, float value) { *p = value; }
inline __attribute__((always_inline)) void store(double* p, double value) { *p = value; }
inline __attribute__((always_inline)) void store(Float16* p, float value) { *p = static_cast<Float16>(value); }
inline __attribute__((always_inline)) void store(BFloat16* p, float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// return function<T>(...) for the T of dtype
#define FASTGEN_FOR_DTYPE(dtype, function, ...)                                    \
  switch (dtype) {                                                                 \
    case DType::float32: return function<float>(__VA_ARGS__);                      \
    case DType::float64: return function<double>(__VA_ARGS__);                     \
    case DType::bfloat16: return function<BFloat16>(__VA_ARGS__);                  \
    case DType::float16: return function<Float16>(__VA_ARGS__);                    \
  }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory, not zeroed.
template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory that begins at a line of the cache, not zeroed.
template <class T>
Buffer<T> aligned(int64_t count) {
  void* const memory = std::aligned_alloc(64, static_cast<size_t>(ceil_div(std::max<int64_t>(count, 1) * sizeof(T), 64) * 64));
  if (!memory) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// Scratch memory of the calling thread; the next call for the same type hands out the same.
template <class T>
T* thread_scratch(int64_t count) {
  thread_local Buffer<T> buffer;
  thread_local int64_t size = 0;
  if (size < count) {
    buffer.reset();
    size = 0;
    buffer = aligned<T>(count);
    size = count;
  }
  return buffer.get();
}

}  // namespace fastgen::cpu
