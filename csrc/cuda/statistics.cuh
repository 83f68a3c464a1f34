// The merge of partial statistics, for norm_act's first pass and for the epilogue of convolutions.
#pragma once

#include "cuda/kernels.h"

namespace fastgen::cuda {

// Writes mean and var of the batch, merged from `parts` parts: counts (parts), means and m2s (parts, c).
void merge_moments(const Epilogue& op, const float* counts, const float* means, const float* m2s, int64_t parts,
                   void* mean, void* var, const Queue& queue);

}  // namespace fastgen::cuda
