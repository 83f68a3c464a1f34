// Convolutions, strided or transposed, with their epilogue, and the gradient of their weight.
#pragma once

#include "cpu/algorithm.h"
#include "cpu/norm_act.h"

namespace fastgen::cpu {

// If epilogue.batch_stats, the statistics of the output are written to epilogue.mean and .var.
void convolution_norm_act(const Geometry& conv, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                          const ParallelFor& parallel);

// Writes the gradient of the weight to `out`, with conv.weight_strides. `grad` is the gradient of the convolution's
// output; `output` has its sizes, dtype and memory order.
void convolution_weight_grad(const Geometry& conv, const Epilogue& output, const void* grad, const void* x, void* out,
                             const ParallelFor& parallel);

// A convolution of float32 or bfloat16 whose weights are packed once, for any number of images.
class PackedConvolution {
 public:
  virtual ~PackedConvolution() = default;
  // x is (n, ih, iw, ic). x and out have epilogue.dtype, which must be bfloat16 for the algorithms that need it.
  virtual void run(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) const = 0;
};
std::unique_ptr<PackedConvolution> pack_convolution(const Geometry& conv, Algorithm algorithm, const float* weight,
                                                    const ParallelFor& parallel);

}  // namespace fastgen::cpu
