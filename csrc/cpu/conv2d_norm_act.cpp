#include "cpu/convolution.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/conv2d_norm_act.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"
#include "cpu/block.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"
#include "cpu/implicit_gemm.h"

namespace fastgen::cpu::FASTGEN_ISA {

inline void conv2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors,
                            const NormActTensors& given, const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, convolve_norm_act, conv, op, false, tensors, given, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void conv2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors,
                     const NormActTensors& given, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(conv2d_norm_act, conv, op, tensors, given, parallel)
}

}  // namespace fastgen::cpu
#endif
