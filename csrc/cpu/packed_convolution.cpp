#include "cpu/convolution.h"

#include <limits>

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/packed_convolution.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"
#include "cpu/block.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"
#include "cpu/implicit_gemm.h"

namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kAnyNumber = std::numeric_limits<int64_t>::max();  // of pixels

template <int vectors>
class PackedFloat : public PackedConvolution {
 public:
  PackedFloat(const Geometry& conv, Algorithm algorithm, const float* weight, const ParallelFor& parallel)
      : conv(conv), packed(pack<float, vectors>(conv, algorithm, kAnyNumber, weight, parallel)) {}

  void run(const Epilogue& op, const void* x, void* out, const ParallelFor& parallel) const override {
    if (op.dtype == DType::bfloat16) run_as<BFloat16>(op, x, out, parallel);
    else run_as<float>(op, x, out, parallel);
  }

 private:
  template <class T>
  void run_as(const Epilogue& op, const void* x, void* out, const ParallelFor& parallel) const {
    const auto pixels = packed.pixels(conv, op.n, static_cast<const T*>(x), true, parallel);
    run_packed<T, vectors>(packed, conv, op, pixels.get(), nullptr, static_cast<T*>(out), parallel);
  }

  const Geometry conv;
  const Packed<float, vectors> packed;
};

#if FASTGEN_HAS_DOT
// The weights (a, b, kh, kw), those of channels 2 i and 2 i + 1 along `axis` (0 or 1) rounded and put into one float.
inline std::vector<float> paired(const float* weight, const int64_t* size, int axis) {
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
    const auto pairs = paired(weight, size, conv.transposed ? 0 : 1);
    packed = pack<float, vectors>(this->conv, algorithm, kAnyNumber, pairs.data(), parallel);
  }

  void run(const Epilogue& op, const void* x, void* out, const ParallelFor& parallel) const override {
    const auto pixels = packed.pixels(conv, op.n, static_cast<const float*>(x), true, parallel);
    run_packed<BFloat16, vectors, true>(packed, conv, op, pixels.get(), nullptr, static_cast<BFloat16*>(out), parallel);
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

template <template <int> class Kind>
std::unique_ptr<PackedConvolution> make(bool narrow, const Geometry& conv, Algorithm algorithm, const float* weight,
                                        const ParallelFor& parallel) {
  if (narrow) return std::make_unique<Kind<1>>(conv, algorithm, weight, parallel);
  return std::make_unique<Kind<2>>(conv, algorithm, weight, parallel);
}

inline std::unique_ptr<PackedConvolution> pack_convolution(const Geometry& conv, Algorithm algorithm,
                                                           const float* weight, const ParallelFor& parallel) {
#if FASTGEN_HAS_DOT
  if (algorithm == Algorithm::direct_bf16 || algorithm == Algorithm::rows_bf16) {
    const Algorithm same = algorithm == Algorithm::direct_bf16 ? Algorithm::direct : Algorithm::rows;
    return make<PackedBFloat16>(is_narrow<float>(conv, same), conv, same, weight, parallel);
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
