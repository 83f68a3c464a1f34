#include "cpu/convolution.h"

#include <limits>

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/packed_convolution.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"
#include "cpu/block.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"
#include "cpu/implicit_gemm.h"

namespace fastgen::cpu::FASTGEN_ISA {

template <int vectors>
class PackedFloat : public PackedConvolution {
 public:
  PackedFloat(const Convolution& conv, int64_t c, bool transposed, Algorithm algorithm, const float* weight,
              const float* bias, const ParallelFor& parallel)
      : conv(conv),
        packed(pack<float, vectors>(conv, c, transposed, algorithm, std::numeric_limits<int64_t>::max(), weight,
                                    parallel)),
        bias(bias, bias + (bias ? c : 0)) {}

  void run(const NormAct& op, const void* x, const NormActTensors& given, void* out,
           const ParallelFor& parallel) const override {
    if (op.dtype == DType::bfloat16) run_as<BFloat16>(op, x, given, out, parallel);
    else run_as<float>(op, x, given, out, parallel);
  }

 private:
  template <class T>
  void run_as(const NormAct& op, const void* x, const NormActTensors& given, void* out,
              const ParallelFor& parallel) const {
    const auto pixels = packed.pixels(conv, op.n, static_cast<const T*>(x), true, parallel);
    const float* b = bias.empty() ? nullptr : bias.data();
    run_packed<T, vectors>(packed, conv, op, pixels.get(), b, given, nullptr, static_cast<T*>(out), parallel);
  }

  const Convolution conv;
  const Packed<float, vectors> packed;
  const std::vector<float> bias;
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
  PackedBFloat16(const Convolution& conv, int64_t c, bool transposed, Algorithm algorithm, const float* weight,
                 const float* bias, const ParallelFor& parallel)
      : conv(in_pairs(conv, transposed)), bias(bias, bias + (bias ? c : 0)) {
    const int64_t size[4] = {transposed ? conv.ic : c, (transposed ? c : conv.ic) / conv.groups, conv.kh, conv.kw};
    const auto pairs = paired(weight, size, transposed ? 0 : 1);
    packed = pack<float, vectors>(this->conv, c, transposed, algorithm, std::numeric_limits<int64_t>::max(),
                                  pairs.data(), parallel);
  }

  void run(const NormAct& op, const void* x, const NormActTensors& given, void* out,
           const ParallelFor& parallel) const override {
    const float* b = bias.empty() ? nullptr : bias.data();
    const auto pixels = packed.pixels(conv, op.n, static_cast<const float*>(x), true, parallel);
    run_packed<BFloat16, vectors, true>(packed, conv, op, pixels.get(), b, given, nullptr, static_cast<BFloat16*>(out),
                                        parallel);
  }

 private:
  static Convolution in_pairs(Convolution conv, bool transposed) {
    conv.ic /= 2;
    if (!transposed) conv.weight_strides[0] /= 2;
    return conv;
  }

  const Convolution conv;
  Packed<float, vectors> packed;
  const std::vector<float> bias;
};
#endif

template <template <int> class Kind>
std::unique_ptr<PackedConvolution> make(bool narrow, const Convolution& conv, int64_t c, bool transposed,
                                        Algorithm algorithm, const float* weight, const float* bias,
                                        const ParallelFor& parallel) {
  if (narrow) return std::make_unique<Kind<1>>(conv, c, transposed, algorithm, weight, bias, parallel);
  return std::make_unique<Kind<2>>(conv, c, transposed, algorithm, weight, bias, parallel);
}

inline std::unique_ptr<PackedConvolution> pack_convolution(const Convolution& conv, int64_t c, bool transposed,
                                                           Algorithm algorithm, const float* weight, const float* bias,
                                                           const ParallelFor& parallel) {
#if FASTGEN_HAS_DOT
  if (algorithm == Algorithm::direct_bf16 || algorithm == Algorithm::rows_bf16) {
    const Algorithm same = algorithm == Algorithm::direct_bf16 ? Algorithm::direct : Algorithm::rows;
    return make<PackedBFloat16>(is_narrow<float>(conv, c, same), conv, c, transposed, same, weight, bias, parallel);
  }
#endif
  return make<PackedFloat>(is_narrow<float>(conv, c, algorithm), conv, c, transposed, algorithm, weight, bias,
                           parallel);
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

std::unique_ptr<PackedConvolution> pack_convolution(const Convolution& conv, int64_t c, bool transposed,
                                                    Algorithm algorithm, const float* weight, const float* bias,
                                                    const ParallelFor& parallel) {
  FASTGEN_DISPATCH(pack_convolution, conv, c, transposed, algorithm, weight, bias, parallel)
}

}  // namespace fastgen::cpu
#endif
