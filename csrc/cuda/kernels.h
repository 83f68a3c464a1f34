// The CUDA tier: launchers of the kernels, over raw pointers and a stream. Their arguments are the structs of
// shared/problems.h, for float32, bfloat16 and float16; parameters, statistics and the divergence are float32. This
// header needs neither torch nor CUDA.
#pragma once

#include <functional>
#include <vector>

#include "shared/problems.h"

namespace fastgen::cuda {

// The stream of the launches, and what a launcher needs of the device.
struct Queue {
  void* stream;                                 // a cudaStream_t
  int multiprocessors;                          // of the device
  std::function<void*(int64_t bytes)> scratch;  // device memory, 256-byte aligned, valid for the launches of this call
};

// For the current device: whether this library has code for it, and the number of its multiprocessors.
bool has_code();
int multiprocessors();

// Writes the mean and the (biased) variance of x.
void norm_act_moments(const Epilogue& op, const void* x, void* mean, void* var, const Queue& queue);

// x == out is allowed.
void norm_act_apply(const Epilogue& op, const void* x, void* out, const Queue& queue);

void norm_act_backward(const Epilogue& op, const void* grad_out, const void* x, const NormActGrads& grads,
                       const Queue& queue);

void convolution_norm_act(const Geometry& geometry, const Epilogue& epilogue, const ConvolutionTensors& tensors,
                          const Queue& queue);

// Writes a standard normal per element, (keys, samples, rows, size), in float32; the keys are on the device.
void noise(const Reparameterize& op, void* out, const Queue& queue);

// kl: (keys, rows), or null.
void reparameterize(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z, void* kl,
                    const Queue& queue);

// grad_z like z, grad_kl like kl; either may be null.
void reparameterize_backward(const Reparameterize& op, const void* grad_z, const void* grad_kl,
                             const ReparameterizeTensors& tensors, const ReparameterizeGrads& grads,
                             const Queue& queue);

// As in cpu/spectral_norm.h; all matrices have one dtype.
void spectral_norm(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                   const Queue& queue);
void spectral_norm_backward(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                            const Queue& queue);

}  // namespace fastgen::cuda
