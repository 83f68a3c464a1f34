#include "cpu/convolution.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/packed_convolution.cpp"
#include "cpu/isa.h"

#include "cpu/block.h"
#include "cpu/tile.h"
#include "cpu/winograd.h"
#include "cpu/implicit_gemm.h"

namespace fastgen::cpu::FASTGEN_ISA {

template <int vectors>
class PackedFloat : public PackedConvolution {
 public:
  PackedFloat(const Convolution& conv, int64_t c, bool transposed, Algorithm algorithm, const float* weight, const float* bias,
              const ParallelFor& parallel)
      : conv(conv), packed(pack<float, vectors>(conv, c, transposed, algorithm, weight, parallel)), bias(bias, bias + (bias ? c : 0)) {}

  void run(const NormAct& op, const float* x, const NormActTensors& given, float* out, const ParallelFor& parallel) const override {
    run_packed<float, vectors>(packed, conv, op, x, bias.empty() ? nullptr : bias.data(), given, nullptr, out, parallel);
  }

 private:
  const Convolution conv;
  const Packed<float, vectors> packed;
  const std::vector<float> bias;
};

inline std::unique_ptr<PackedConvolution> pack_convolution(const Convolution& conv, int64_t c, bool transposed, Algorithm algorithm,
                                                           const float* weight, const float* bias, const ParallelFor& parallel) {
  if (is_narrow<float>(conv, c, algorithm)) return std::make_unique<PackedFloat<1>>(conv, c, transposed, algorithm, weight, bias, parallel);
  return std::make_unique<PackedFloat<2>>(conv, c, transposed, algorithm, weight, bias, parallel);
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

std::unique_ptr<PackedConvolution> pack_convolution(const Convolution& conv, int64_t c, bool transposed, Algorithm algorithm,
                                                    const float* weight, const float* bias, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(pack_convolution, conv, c, transposed, algorithm, weight, bias, parallel)
}

}  // namespace fastgen::cpu
#endif
