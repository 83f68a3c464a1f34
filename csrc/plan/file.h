// Reading and checking a plan file, before anything is allocated for what it says.
#pragma once

#include "plan/plan.h"

namespace fastgen::plan {

// The header of a file of `size` bytes of which the first sizeof(Header) are given; throws std::runtime_error.
Header check_header(const char* bytes, size_t size);

// The whole file; returns its steps.
std::vector<Step> check_file(const char* bytes, size_t size);

// Writes the checksum into a file.
void seal(std::string& bytes);

// Whether the algorithm can compute the step, on some processor.
bool runs(cpu::Algorithm algorithm, const Step& step, bool bfloat16);

Geometry geometry(const Step& step);
Epilogue describe(const Step& step, DType dtype, int64_t n, bool channels_last);

}  // namespace fastgen::plan
