#include "cuda/convolution.cuh"

namespace fastgen::cuda {

namespace convolution {
FASTGEN_CONVOLVE(float)
}  // namespace convolution

void convolution_norm_act(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
                          const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(op.dtype, convolution::run, conv, op, tensors, queue)
}

}  // namespace fastgen::cuda
