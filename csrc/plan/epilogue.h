// The epilogue of convolutions and of norm_act: its fields in the file, and the Epilogue of a run.
#pragma once

#include "plan/step.h"

namespace fastgen::plan {

// affine: with the file's mean and var; batch, instance, group: with statistics of x
enum class Norm : int64_t { none, affine, batch, instance, group };

struct EpilogueFields {
  Norm norm;
  int64_t num_groups;   // of group norm
  Weight mean, var;     // (c) each, of an affine norm
  Weight weight, bias;  // (c) each, of any norm
  double eps;
  int64_t activation;     // of fastgen::Activation
  double negative_slope;  // of leaky_relu

  bool has_statistics() const { return norm != Norm::none && norm != Norm::affine; }
  void check(const Check& check, const Step& step) const;  // of a step that reads x and at most one residual

  // The Epilogue without its buffers.
  Epilogue describe(const Shape& shape, DType dtype, int64_t n, bool channels_last) const;
};

// The epilogue of one run of a step, with memory for its statistics.
class EpilogueOfRun {
 public:
  EpilogueOfRun(const EpilogueFields& fields, const Step& step, const Run& run, const float* bias);
  EpilogueOfRun(const EpilogueOfRun&) = delete;

  const Epilogue& operator*() const { return epilogue_; }

 private:
  std::vector<float> statistics_;
  Epilogue epilogue_;
};

}  // namespace fastgen::plan
