#include "cpu/convolution.h"

#include <limits>

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/packed_convolution.cpp"
#include "cpu/isa.h"

#include "cpu/execute.h"

namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kAnyPixels = std::numeric_limits<int64_t>::max();  // weights are packed for any number of them

template <int vectors>
class PackedFloat : public PackedConvolution {
 public:
  PackedFloat(const Geometry& conv, Algorithm algorithm, const float* weight, const ParallelFor& parallel)
      : conv(conv), packed(pack<float, vectors>(conv, algorithm, kAnyPixels, weight, parallel)) {}

  void run(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) const override {
    if (epilogue.dtype == DType::bfloat16) run_as<BFloat16>(epilogue, x, out, parallel);
    else run_as<float>(epilogue, x, out, parallel);
  }

 private:
  template <class T>
  void run_as(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) const {
    const auto pixels = packed.pixels(conv, epilogue.n, static_cast<const T*>(x), true, parallel);
    run_packed(packed, conv, epilogue, pixels.get(), static_cast<T*>(nullptr), static_cast<T*>(out), parallel);
  }

  const Geometry conv;
  const Packed<float, vectors> packed;
};

#if FASTGEN_HAS_DOT
// The weights (a, b, kh, kw) rounded to bfloat16; one float holds those of channels 2 i and 2 i + 1 along `axis` (0 or
// 1).
inline std::vector<float> in_pairs(const float* weight, const int64_t* size, int axis) {
  const int64_t inner = (axis ? 1 : size[1]) * size[2] * size[3], pairs = size[axis] / 2, outer = axis ? size[0] : 1;
  std::vector<float> result(static_cast<size_t>(outer * pairs * inner));
  for (int64_t pair = 0; pair < outer * pairs; ++pair)
    for (int64_t i = 0; i < inner; ++i) {
      BFloat16 two[2];
      store(two, weight[2 * pair * inner + i]);
      store(two + 1, weight[(2 * pair + 1) * inner + i]);
      memcpy(&result[pair * inner + i], two, sizeof(float));
    }
  return result;
}

template <int vectors>
class PackedBFloat16 : public PackedConvolution {
 public:
  PackedBFloat16(const Geometry& conv, Algorithm algorithm, const float* weight, const ParallelFor& parallel)
      : conv(with_paired_channels(conv)) {
    const int64_t size[4] = {conv.transposed ? conv.ic : conv.oc, (conv.transposed ? conv.oc : conv.ic) / conv.groups,
                             conv.kh, conv.kw};
    const auto pairs = in_pairs(weight, size, conv.transposed ? 0 : 1);
    packed = pack<float, vectors>(this->conv, algorithm, kAnyPixels, pairs.data(), parallel);
  }

  void run(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) const override {
    const auto pixels = packed.pixels(conv, epilogue.n, static_cast<const float*>(x), true, parallel);
    run_packed<true>(packed, conv, epilogue, pixels.get(), static_cast<BFloat16*>(nullptr), static_cast<BFloat16*>(out),
                     parallel);
  }

 private:
  static Geometry with_paired_channels(Geometry conv) {
    conv.ic /= 2;
    if (!conv.transposed) conv.weight_strides[0] /= 2;
    return conv;
  }

  const Geometry conv;
  Packed<float, vectors> packed;
};
#endif

template <int parts>
class PackedAmx : public PackedConvolution {
 public:
  PackedAmx(const Geometry& conv, const float* weight, const ParallelFor& parallel)
      : how(conv, parts), packed(how.pack(weight, parallel)) {}

  void run(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) const override {
    using T = std::conditional_t<parts == 1, BFloat16, float>;
    run_amx<parts>(how, packed.get(), epilogue, static_cast<const T*>(x), static_cast<T*>(nullptr),
                   static_cast<T*>(out), parallel);
  }

 private:
  const AmxConvolution how;
  const Buffer<uint32_t> packed;
};

template <template <int> class Kind>
std::unique_ptr<PackedConvolution> make(bool narrow, const Geometry& conv, Algorithm algorithm, const float* weight,
                                        const ParallelFor& parallel) {
  if (narrow) return std::make_unique<Kind<1>>(conv, algorithm, weight, parallel);
  return std::make_unique<Kind<2>>(conv, algorithm, weight, parallel);
}

inline std::unique_ptr<PackedConvolution> pack_convolution(const Geometry& conv, Algorithm algorithm,
                                                           const float* weight, const ParallelFor& parallel) {
  switch (algorithm) {
    case Algorithm::amx_bf16: return std::make_unique<PackedAmx<1>>(conv, weight, parallel);
    case Algorithm::amx_bf16x3: return std::make_unique<PackedAmx<2>>(conv, weight, parallel);
    case Algorithm::amx_bf16x6: return std::make_unique<PackedAmx<3>>(conv, weight, parallel);
    default: break;
  }
#if FASTGEN_HAS_DOT
  if (is_bf16_dot(algorithm)) {
    algorithm = without_bf16_dot(algorithm);
    return make<PackedBFloat16>(is_narrow<float>(conv, algorithm), conv, algorithm, weight, parallel);
  }
#endif
  return make<PackedFloat>(is_narrow<float>(conv, algorithm), conv, algorithm, weight, parallel);
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

std::unique_ptr<PackedConvolution> pack_convolution(const Geometry& conv, Algorithm algorithm, const float* weight,
                                                    const ParallelFor& parallel) {
  FASTGEN_DISPATCH(pack_convolution, conv, algorithm, weight, parallel)
}

}  // namespace fastgen::cpu
#endif
