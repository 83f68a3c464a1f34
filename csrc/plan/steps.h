// The steps of a plan that are neither convolutions nor norms: what moves, resizes, pools and combines values.
#pragma once

#include "plan/plan.h"

namespace fastgen::plan {

// One of the kinds behind Kind::concat for `n` images, (n, h, w, c) each; x of an embedding is int64 (n), in range.
// Does nothing for inputs and outputs.
void run_other(const Step& step, DType dtype, int64_t n, const void* x, const void* y, const float* weight, void* out,
               const cpu::ParallelFor& parallel);

// Whether a step of such a kind computes its size from what it reads, so that it stays within its memory; `y`: the
// elements of the second value.
bool other_fits(const Step& step, int64_t y);

}  // namespace fastgen::plan
