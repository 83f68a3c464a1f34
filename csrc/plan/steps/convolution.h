// A convolution, strided or transposed, with its epilogue, whose weights are packed once for the algorithm that it
// uses.
#pragma once

#include <mutex>

#include "cpu/convolution.h"
#include "plan/epilogue.h"

namespace fastgen::plan {

constexpr int64_t kFew = 8;  // images; from this number on, a convolution uses its algorithm for many images

struct ConvolutionFields {
  int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
  int64_t reflect;  // 1: the padding mirrors the image instead of being zero
  int64_t transposed;
  Weight weight;            // (oc, ic / groups, kh, kw), or transposed (ic, oc / groups, kh, kw)
  Weight bias;              // (oc)
  int64_t algorithm[2];     // of cpu::Algorithm, for few images and for many; -1: chosen by the sizes
  EpilogueFields epilogue;  // its residual is the second value that the step reads
};

class Convolution final : public Typed<Convolution, ConvolutionFields> {
 public:
  struct Timed {
    int64_t algorithm;
    double seconds;
  };

  void check(const Check& check) const override;
  void run(const Run& run) const override;
  bool needs_whole_batch() const override { return fields.epilogue.norm == Norm::batch; }
  bool can_write_channels_first() const override { return inputs.size() == 1 && !fields.epilogue.has_statistics(); }

  // Whether the other convolution takes the same time: equal sizes and options.
  bool is_alike(const Convolution& other) const;

  // Times each algorithm with an input of zeros; returns the fastest first.
  std::vector<Timed> time_algorithms(int64_t n, DType dtype, const char* weights, const cpu::ParallelFor& parallel,
                                     bool split) const;
  int64_t algorithm_for(int64_t n) const { return fields.algorithm[n >= kFew]; }
  void use(int64_t algorithm, int64_t n);
  int64_t packed_bytes(int64_t algorithm) const;

 private:
  struct Packed {
    std::once_flag once;
    std::unique_ptr<cpu::PackedConvolution> weights;
  };

  mutable std::unique_ptr<Packed> few_ = std::make_unique<Packed>(), many_ = std::make_unique<Packed>();

  Geometry geometry() const;
  bool can_run(cpu::Algorithm algorithm, bool bfloat16) const;
  cpu::Algorithm choose(int64_t n, DType dtype) const;
  std::unique_ptr<cpu::PackedConvolution> pack(cpu::Algorithm algorithm, const Run& run) const;
  void run_packed(const cpu::PackedConvolution& packed, const Run& run) const;
};

}  // namespace fastgen::plan
