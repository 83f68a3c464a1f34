// The element types of tensors, and the accumulation type of each.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/problems.h"

namespace fastgen::cpu {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

// The type of arithmetic and reductions over elements of type T.
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

// Two numbers as the instructions for bfloat16 read them.
inline __attribute__((always_inline)) uint32_t pair_of(BFloat16 low, BFloat16 high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// return function<T>(...) for the T of dtype
#define FASTGEN_FOR_DTYPE(dtype, function, ...)                   \
  switch (dtype) {                                                \
    case DType::float32: return function<float>(__VA_ARGS__);     \
    case DType::float64: return function<double>(__VA_ARGS__);    \
    case DType::bfloat16: return function<BFloat16>(__VA_ARGS__); \
    case DType::float16: return function<Float16>(__VA_ARGS__);   \
  }

}  // namespace fastgen::cpu
