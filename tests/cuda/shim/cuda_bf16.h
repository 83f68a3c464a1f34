// bfloat16 of the shim: round to nearest even, NaN stays NaN.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
}

namespace shim {
template <class T>
void multiply(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_16_bits(total, a, b, std::is_same_v<T, __nv_bfloat16>);
}
}  // namespace shim
