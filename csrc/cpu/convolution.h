// y = norm_act(convolution(x, weight) + bias), the convolution strided or transposed.
#pragma once

#include <cstdlib>
#include <cstring>

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

// Winograd's tiles in use: m x m outputs of r x r taps. FASTGEN_WINOGRAD: 0 turns it off, "always" uses it wherever it can be
// used, whatever it costs (for tests); else it runs where it was measured to be faster (benchmarks/NOTES.md).
enum class WinogradTile { none, f4x2, f4x3 };

inline WinogradTile winograd_tile(const Convolution& conv, const NormAct& op) {
  const char* asked = getenv("FASTGEN_WINOGRAD");
  if (asked && !strcmp(asked, "0")) return WinogradTile::none;
  const bool always = asked && !strcmp(asked, "always");
  const bool square = conv.kh == conv.kw && conv.stride[0] == conv.stride[1];
  if (!square || conv.groups != 1 || conv.dilation[0] != 1 || conv.dilation[1] != 1) return WinogradTile::none;
  const bool wide = conv.ic >= 16 && op.c >= 16, large = op.n * conv.oh * conv.ow >= 1024;
  if (conv.kh == 4 && conv.stride[0] == 2 && (always || (wide && large))) return WinogradTile::f4x2;
  if (conv.kh == 3 && conv.stride[0] == 1 && (always || (wide && op.n * conv.oh * conv.ow >= 256 && conv.oh >= 8))) return WinogradTile::f4x3;
  return WinogradTile::none;
}

// Whether the transformed weights are too many to be kept: each band then transforms them anew.
inline bool transforms_in_bands(const Convolution& conv, int64_t c) {
  return conv.ic * c * (conv.kh == 4 ? 100 : 36) * int64_t(sizeof(float)) > (16 << 20);
}

// mean and var of `given` are written when op.batch_stats, else read.
void conv2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors, const NormActTensors& given,
                     const ParallelFor& parallel);
void conv_transpose2d_norm_act(const Convolution& conv, const NormAct& op, const ConvolutionTensors& tensors,
                               const NormActTensors& given, const ParallelFor& parallel);

// The gradient of the weight, `out` with conv.weight_strides, from the gradient of the output (no norm), which `op` describes.
void convolution_weight_grad(const Convolution& conv, const NormAct& op, bool transposed, const void* grad, const void* x, void* out,
                             const ParallelFor& parallel);

}  // namespace fastgen::cpu
