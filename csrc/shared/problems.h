// The arguments of the kernels of every device: plain structs, raw pointers, no torch.
#pragma once

#include "shared/activation.h"

namespace fastgen {

enum class DType { float32, float64, bfloat16, float16 };

FASTGEN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which elements of x and of the weight a convolution multiplies and adds up. A prologue (scale, shift and activation
// of x, per channel or per sample and channel) will be a struct of its own.
struct Geometry {
  int64_t ic, ih, iw, oc, oh, ow;  // x is (n, ic, ih, iw), the output (n, oc, oh, ow)
  int64_t kh, kw;
  int64_t weight_strides[4];  // of (oc, ic / groups, kh, kw), or when transposed of (ic, oc / groups, kh, kw)
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  bool transposed;
  bool reflect;          // the padding mirrors x instead of being zero; not when transposed
  bool x_channels_last;  // memory order of x; the output's is Epilogue's
  bool tf32;             // float32 may be multiplied in TF32 (GPU)
};

// What is done to each value z of a convolution, or of an input tensor (norm_act), before it is written:
//
//   activation((z + bias - mean) / sqrt(var + eps) * norm_weight + norm_bias + residual)
//
// Noise, gain and clamp, demodulation and statistics of the written values will be fields of this struct.
struct Epilogue {
  DType dtype;         // of x, the output and all tensors of its size; other buffers have the accumulation type
                       // (float, or double)
  int64_t n, c, s;     // samples, channels, pixels of the output
  bool channels_last;  // its memory order is (n, s, c)
  const void* bias;    // (c) or null; only convolutions add it

  bool normalize;        // false: there is no norm, and its buffers are null
  bool batch_stats;      // mean and var are statistics of z: they are written, and the gradient flows through them
  bool per_sample;       // mean and var are (n, stats_groups), else (c)
  int64_t stats_groups;  // groups of channels that share statistics: c for batch and instance norm
  double eps;
  void *mean, *var;
  const void *norm_weight, *norm_bias;  // (c) or null

  const void* residual;  // of the output's dtype and memory order, or null
  Activation activation;
  double negative_slope;

  int64_t rows_of_stats() const { return per_sample ? n : 1; }
  int64_t stats_index(int64_t row, int64_t channel) const { return row * stats_groups + channel / (c / stats_groups); }
};

// The gradients of norm_act.
struct NormActGrads {
  void* x;
  void* weight;    // (c), written when there is a norm
  void* bias;      // the same
  void* residual;  // like x, or null
};

struct ConvolutionTensors {
  const void* x;
  const void* weight;
  void* pre;  // the convolution with its bias, or null
  void* out;
};

// mu is (keys, rows, size), z is (keys, samples, rows, size), both contiguous. The elements of the noise are numbered
// within each key of z.
struct Reparameterize {
  DType dtype;  // of all tensors except the divergence and its gradient, which have the accumulation type
  int64_t keys, samples, rows, size;
  const int64_t* key;                  // (keys, 2): seed and offset
  int64_t mean_period, logvar_period;  // element i uses the prior's element i % period
  double logvar_min, logvar_max;       // infinite: no bound
  double free_bits;                    // lower bound of an element's divergence; -infinity: none
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

// A weight as a matrix for spectral norm. In memory it is (outer, rows, inner), the matrix is (rows, outer * inner): u
// has an element per row, v is (outer, inner). Kernels walk over `lines`, each of `line_size` contiguous elements: the
// matrix's rows where outer == 1, else the blocks (rows, inner). A `chunk` is some consecutive lines, the unit of
// parallel work. Of the two products W v and W^T u, the `line` product has separate elements for each line, which are
// complete once the line is read; the `summed` product is summed over all chunks. Vectors have the accumulation type
// (float, or double).
struct SpectralMatrix {
  DType dtype;  // of weight, out and their gradients
  int64_t outer, rows, inner;
  const void* weight;
  const void *input_u, *input_v;
  void *u, *v;  // u and v after the iterations
  void* sigma;  // one value
  void* out;    // weight / sigma, like weight; null: not computed

  int64_t columns() const { return outer * inner; }
  int64_t size() const { return outer * rows * inner; }
  int64_t lines() const { return outer == 1 ? rows : outer; }
  int64_t line_size() const { return outer == 1 ? inner : rows * inner; }
};

struct SpectralMatrixGrad {
  const void* grad_out;    // like weight
  const void* grad_sigma;  // one value
  void* grad_weight;       // like weight
};

}  // namespace fastgen
