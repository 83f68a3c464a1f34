// What the ops compute, as the kernels of every device are told: plain structs, raw pointers, no torch.
#pragma once

#include "shared/activation.h"

namespace fastgen {

enum class DType { float32, float64, bfloat16, float16 };

FASTGEN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct NormAct {
  DType dtype;      // of x, residual, out and their gradients; every other buffer has the accumulation type (float, or
                    // double)
  int64_t n, c, s;  // samples, channels, pixels
  bool channels_last;  // memory order (n, s, c)
  bool normalize;      // false: no norm, its buffers are null
  bool batch_stats;    // mean and var are statistics of x, and the gradient goes through them
  bool per_sample;     // mean and var are (n, sets), else (c)
  int64_t sets;        // of channels that share statistics: c for batch and instance norm, the groups of group norm
  double eps;
  Activation activation;
  double negative_slope;

  int64_t rows_of_stats() const { return per_sample ? n : 1; }
  int64_t set(int64_t row, int64_t channel) const { return row * sets + channel / (c / sets); }
};

struct NormActTensors {
  const void* mean;
  const void* var;
  const void* weight;    // (c) or null
  const void* bias;      // (c) or null
  const void* residual;  // like x, or null
};

struct NormActGrads {
  void* x;
  void* weight;    // (c), written when op.normalize
  void* bias;      // the same
  void* residual;  // like x, or null
};

struct Convolution {
  int64_t ic, ih, iw, oh, ow;  // x is (n, ic, ih, iw), the output (n, c, oh, ow) with n and c of NormAct
  int64_t kh, kw;
  int64_t weight_strides[4];  // of (oc, ic / groups, kh, kw), or when transposed of (ic, oc / groups, kh, kw)
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  bool reflect;          // the padding mirrors x instead of being zero; not when transposed
  bool x_channels_last;  // the output's order is NormAct's
  bool tf32;             // float32 may be multiplied in TF32 (GPU)
};

struct ConvolutionTensors {
  const void* x;
  const void* weight;
  const void* bias;  // (c) in the accumulation type, or null
  void* pre;         // the convolution with its bias, or null
  void* out;
};

// mu is (keys, rows, size), z (keys, samples, rows, size), each in this order: noise elements are counted within a key
// of z.
struct Reparameterize {
  DType dtype;  // of all but the divergence and its gradient, which have the accumulation type (float, or double)
  int64_t keys, samples, rows, size;
  const int64_t* key;                  // (keys, 2): seed and offset
  int64_t mean_period, logvar_period;  // the prior's element of element i is i % period
  double logvar_min, logvar_max;       // infinite: no bound
  double free_bits;                    // what the divergence of an element is raised to; -infinite: nothing
  double beta;
};

struct ReparameterizeTensors {
  const void* mu;
  const void* logvar;
  const void* prior_mean;  // both or neither
  const void* prior_logvar;
};

struct ReparameterizeGrads {
  void* mu;
  void* logvar;
  void* prior_mean;  // like mu, with a prior
  void* prior_logvar;
};

// The matrix (d, a * b) of a weight that lies as (a, d, b). Vectors have the accumulation type (float, or double).
struct SpectralMatrix {
  DType dtype;  // of weight, out and their gradients
  int64_t a, d, b;
  const void* weight;
  const void *given_u, *given_v;  // (d) and (a, b)
  void *u, *v;                    // they after the iterations
  void* sigma;                    // one value
  void* out;                      // like weight; null: weight / sigma is not wanted

  int64_t size() const { return a * d * b; }
};

struct SpectralMatrixGrad {
  const void* grad_out;    // like weight
  const void* grad_sigma;  // one value
  void* grad_weight;       // like weight
};

}  // namespace fastgen
