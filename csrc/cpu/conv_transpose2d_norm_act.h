// y = norm_act(conv_transpose2d(x, weight) + bias)
#pragma once

#include "cpu/norm_act.h"

namespace fastgen::cpu {

struct ConvTranspose2d {
  int64_t ic, ih, iw, oh, ow;    // x is (n, ic, ih, iw), the output (n, c, oh, ow) with n and c of NormAct
  int64_t kh, kw;                // weight is (ic, c / groups, kh, kw)
  int64_t weight_strides[4];
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  bool x_channels_last;          // the output's order is NormAct's
};

// pre: the convolution with its bias, or null. mean, var: written when op.batch_stats, else read. The rest as norm_act_apply.
void conv_transpose2d_norm_act(const ConvTranspose2d& conv, const NormAct& op, const void* x, const void* weight, const void* bias,
                               void* mean, void* var, const void* norm_weight, const void* norm_bias, void* pre, void* out,
                               const ParallelFor& parallel);

}  // namespace fastgen::cpu
