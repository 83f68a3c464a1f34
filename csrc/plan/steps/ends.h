// The inputs and outputs of a plan, converted between the caller's order (n, c, h, w) and the order of values, (n, h,
// w, c).
#pragma once

#include "plan/step.h"

namespace fastgen::plan {

struct EndFields {
  int64_t rank;  // 3: images (n, c, h, w); 1: vectors (n, c); 0: labels (n) of an input, numbers (n) of an output
};

// Its value is one of the caller's arrays, run.inputs[0].
class Input final : public Computed<Input, EndFields> {
 public:
  void check(const Check& check) const override;
  ValueType computes() const override { return fields.rank ? ValueType::image : ValueType::labels; }
  template <class T>
  void compute(const Run& run) const;
};

// Writes a value to one of the caller's arrays, run.out. A vector gets the elements of an image in the order (c, h, w).
class Output final : public Computed<Output, EndFields> {
 public:
  void check(const Check& check) const override;
  ValueType computes() const override { return ValueType::nothing; }
  template <class T>
  void compute(const Run& run) const;
};

}  // namespace fastgen::plan
