// What the convolution's epilogue hands to norm_act's kernels.
#pragma once

#include "cuda/common.cuh"

namespace fastgen::cuda {

// mean and var of batch statistics from those of `parts` parts: counts (parts), means and m2s (parts, c).
void merge_moments(const Epilogue& op, const float* counts, const float* means, const float* m2s, int64_t parts,
                   void* mean, void* var, const Queue& queue);

}  // namespace fastgen::cuda
