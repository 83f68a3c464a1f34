// Spectral normalization of one or more weights in common parallel regions: power iteration, sigma, weight / sigma,
// gradient.
#pragma once

#include "cpu/kernel.h"

namespace fastgen::cpu {

// u and v take `iterations` steps u = W v, v = W^T u (v_first: v = W^T u, u = W v), each normalized with norms of at
// least eps; sigma = u^T W v; out = weight / sigma, where out is not null.
void spectral_norm(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                   const ParallelFor& parallel);

// u and v are constants, sigma is u^T W v.
void spectral_norm_backward(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                            const ParallelFor& parallel);

}  // namespace fastgen::cpu
