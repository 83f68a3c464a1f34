// The row of a table for each label.
#include "plan/step.h"

namespace fastgen::plan {
namespace {

struct EmbeddingFields {
  int64_t rows;
  Weight weight;  // (rows, c)
};

class Embedding final : public Computed<Embedding, EmbeddingFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1, "does not have exactly one input");
    check(shape.pixels() == 1, "computes more than a vector");
    int64_t weights = fields.rows;
    check(fields.rows > 0 && !__builtin_mul_overflow(weights, shape.c, &weights), "has an impossible number of rows");
    check.weight(fields.weight, weights, true);
  }

  template <class T>
  void compute(const Run& run) const {
    const int64_t* const labels = run.input<int64_t>(0);
    const float* const weight = run.weight(fields.weight);
    for (int64_t image = 0; image < run.n; ++image)
      for (int64_t c = 0; c < shape.c; ++c)
        cpu::store(run.output<T>() + image * shape.c + c, weight[labels[image] * shape.c + c]);
  }

  ValueType reads() const override { return ValueType::labels; }
  int64_t label_count() const override { return fields.rows; }
};

const Registered registered("embedding", Embedding::make);

}  // namespace
}  // namespace fastgen::plan
