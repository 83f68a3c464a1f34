// Convolutions, strided or transposed, with their epilogue, and the gradient of their weight.
#pragma once

#include "cpu/algorithm.h"
#include "cpu/norm_act.h"

namespace fastgen::cpu {

// The statistics of the output are written to epilogue.mean and .var when epilogue.batch_stats.
void convolution_norm_act(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                          const ParallelFor& parallel);

// The gradient of the weight, `out` with conv.weight_strides, from `grad`, that of the convolution, whose sizes, dtype
// and memory order `output` gives.
void convolution_weight_grad(const Geometry& conv, const Epilogue& output, const void* grad, const void* x, void* out,
                             const ParallelFor& parallel);

// A convolution of float32 or bfloat16 whose weights are packed once, for any number of images.
class PackedConvolution {
 public:
  virtual ~PackedConvolution() = default;
  // x (n, ih, iw, ic) and out of epilogue.dtype, bfloat16 if the algorithm asks for it.
  virtual void run(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) const = 0;
};
std::unique_ptr<PackedConvolution> pack_convolution(const Geometry& conv, Algorithm algorithm, const float* weight,
                                                    const ParallelFor& parallel);

}  // namespace fastgen::cpu
