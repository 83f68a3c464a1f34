// y = norm_act(convolution(x, weight) + bias), the convolution strided or transposed.
#pragma once

#include "cpu/norm_act.h"

namespace fastgen::cpu {

struct Convolution {
  int64_t ic, ih, iw, oh, ow;  // x is (n, ic, ih, iw), the output (n, c, oh, ow) with n and c of NormAct
  int64_t kh, kw;
  int64_t weight_strides[4];   // of (oc, ic / groups, kh, kw), or when transposed of (ic, oc / groups, kh, kw)
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  bool reflect;                // the padding mirrors x instead of being zero; not when transposed
  bool x_channels_last;        // the output's order is NormAct's
};

struct ConvolutionTensors {
  const void* x;
  const void* weight;
  const void* bias;  // (c) in the accumulation type, or null
  void* pre;         // the convolution with its bias, or null
  void* out;
};

// mean and var of `given` are written when op.batch_stats, else read.
void conv2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors, const NormActTensors& given,
                     const ParallelFor& parallel);
void conv_transpose2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors,
                               const NormActTensors& given, const ParallelFor& parallel);

}  // namespace fastgen::cpu
