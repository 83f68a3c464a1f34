#include "cpu/convolution.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/convolution.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"
#include "cpu/block.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"
#include "cpu/implicit_gemm.h"

namespace fastgen::cpu::FASTGEN_ISA {

inline void convolution_norm_act(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
                                 const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, convolve_norm_act, conv, op, tensors, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void convolution_norm_act(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
                          const ParallelFor& parallel) {
  FASTGEN_DISPATCH(convolution_norm_act, conv, op, tensors, parallel)
}

}  // namespace fastgen::cpu
#endif
