// Activations and their derivatives, one formula for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTGEN_HD __host__ __device__ __forceinline__
#else
#define FASTGEN_HD inline __attribute__((always_inline))
#endif

namespace fastgen {

// All except identity, which comes first. Plan files store their positions, so a new one is added at the end.
#define FASTGEN_ACTIVATIONS(X) X(relu) X(leaky_relu) X(tanh) X(sigmoid) X(silu)

#define FASTGEN_ENUMERATOR(name) , name
enum class Activation { identity FASTGEN_ACTIVATIONS(FASTGEN_ENUMERATOR) };
#undef FASTGEN_ENUMERATOR

#define FASTGEN_STRING(name) , #name
inline constexpr const char* kActivationNames[] = {"identity" FASTGEN_ACTIVATIONS(FASTGEN_STRING)};
#undef FASTGEN_STRING
constexpr int kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

// A case of a switch: it returns body(the activation as a constant).
#define FASTGEN_ACTIVATION_CASE(name) \
  case Activation::name: return body(std::integral_constant<Activation, Activation::name>());

FASTGEN_HD float float_of_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTGEN_HD int32_t bits_of_float(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// 2^n, -127 < n < 128
FASTGEN_HD float float_of_exponent(int32_t n) {
  return float_of_bits(static_cast<int32_t>(static_cast<uint32_t>(n + 127) << 23));
}

// exp, tanh without branches or calls, so that a loop over them becomes SIMD code; within 2 ulp of libm.
// Range reduction exp(x) = 2^n exp(r), |r| <= ln2/2; polynomials of the Cephes library (Moshier, expf.c and tanhf.c).
FASTGEN_HD float exp_(float x) {
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which the sum's low bits hold
  const int32_t zero = 0x4b400000, sum = bits_of_float(x * 1.44269504088896341f + shift);
  const int32_t raised = sum < zero - 200 ? zero - 200 : sum;  // clamps integers: GCC does not vectorize a clamp of x
  const int32_t bits = raised > zero + 200 ? zero + 200 : raised;
  const float n = float_of_bits(bits) - shift;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  r = r < -1.f ? -1.f : r;     // where n is clamped from below; NaN stays NaN
  const float square = r * r;  // in pairs: short chains of dependent products
  const float p =
      ((1.9875691500e-4f * r + 1.3981999507e-3f) * square + (8.3334519073e-3f * r + 4.1665795894e-2f)) * square +
      (1.6666665459e-1f * r + 5.0000001201e-1f);
  const float power = p * square + (r + 1.f);
  const int32_t whole = bits - zero, half = whole >> 1, rest = whole - half;
  return power * float_of_exponent(half) * float_of_exponent(rest);  // two factors: 2^n itself may overflow
}
FASTGEN_HD double exp_(double x) { return exp(x); }

FASTGEN_HD float tanh_(float x) {
  const float z = x * x;
  float small = -5.70498872745e-3f;
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * x + x;
  const float magnitude = x < 0 ? -x : x;
  const float large = 1.f - 2.f / (exp_(2.f * magnitude) + 1.f);
  return magnitude < 0.625f ? small : (x < 0 ? -large : large);
}
FASTGEN_HD double tanh_(double x) { return tanh(x); }

template <class A>
FASTGEN_HD A sigmoid_(A x) {
  return A(1) / (A(1) + exp_(-x));
}

// act(z)
template <Activation act, class A>
FASTGEN_HD A activate(A z, A slope) {
  if constexpr (act == Activation::relu) return z <= 0 ? A(0) : z;  // NaN stays NaN
  if constexpr (act == Activation::leaky_relu) return z > 0 ? z : z * slope;
  if constexpr (act == Activation::tanh) return tanh_(z);
  if constexpr (act == Activation::sigmoid) return sigmoid_(z);
  if constexpr (act == Activation::silu) return z / (A(1) + exp_(-z));
  return z;
}

// grad * act'(z)
template <Activation act, class A>
FASTGEN_HD A activate_grad(A grad, A z, A slope) {
  if constexpr (act == Activation::relu) return z <= 0 ? A(0) : grad;
  if constexpr (act == Activation::leaky_relu) return z > 0 ? grad : grad * slope;
  if constexpr (act == Activation::tanh) {
    const A y = tanh_(z);
    return grad * (A(1) - y * y);
  }
  if constexpr (act == Activation::sigmoid) {
    const A y = sigmoid_(z);
    return grad * y * (A(1) - y);
  }
  if constexpr (act == Activation::silu) {
    const A y = sigmoid_(z);
    return grad * y * (A(1) + z * (A(1) - y));
  }
  return grad;
}

}  // namespace fastgen
