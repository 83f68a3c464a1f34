#include "cuda/convolution.cuh"

namespace fastgen::cuda {

void conv2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors,
                     const NormActTensors& given, const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, convolution::run, conv, op, false, tensors, given, queue)
}

void conv_transpose2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors,
                               const NormActTensors& given, const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, convolution::run, conv, op, true, tensors, given, queue)
}

}  // namespace fastgen::cuda
