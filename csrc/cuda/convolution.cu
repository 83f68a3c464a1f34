#include "cuda/convolution.cuh"

namespace fastgen::cuda {

void convolution_norm_act(const Geometry& geometry, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                          const Queue& queue) {
  FASTGEN_FOR_GPU_DTYPE(epilogue.dtype, convolution::run, geometry, epilogue, tensors, queue)
}

}  // namespace fastgen::cuda
