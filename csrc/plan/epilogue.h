// What convolutions end with and norm_act consists of, as the file holds it: out = act(norm(x) + residual).
#pragma once

#include "plan/step.h"

namespace fastgen::plan {

// affine: by the mean and var of the file; batch, instance, group: by statistics of x
enum class Norm : int64_t { none, affine, batch, instance, group };

struct Epilogue {
  Norm norm;
  int64_t num_groups;   // of group norm
  Weight mean, var;     // (c) each, of an affine norm
  Weight weight, bias;  // (c) each, of any norm
  double eps;
  int64_t activation;     // of fastgen::Activation
  double negative_slope;  // of leaky_relu

  bool has_statistics() const { return norm != Norm::none && norm != Norm::affine; }
  void check(const Check& check, const Step& step) const;  // of a step that reads x and at most one residual
  NormAct describe(const Shape& shape, DType dtype, int64_t n, bool channels_last) const;
};

// The arrays of an epilogue in one run.
struct EpilogueArrays {
  EpilogueArrays(const Epilogue& epilogue, const NormAct& op, const Run& run, const void* residual);

  std::vector<float> statistics;
  NormActTensors tensors;
};

}  // namespace fastgen::plan
