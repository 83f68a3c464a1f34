// add and mul of two values, the second one broadcast: where its size is 1, it is the same for all channels, rows or
// columns.
#include "plan/step.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/steps/arithmetic.cpp"
#include "cpu/isa.h"

#include "plan/steps/loops.h"

namespace fastgen::plan::FASTGEN_ISA {

template <class Operation>
class Arithmetic final : public Computed<Arithmetic<Operation>, NoFields> {
 public:
  void check(const Check& check) const override {
    const auto is_one_or = [](int64_t size, int64_t all) { return size == 1 || size == all; };
    const Shape& shape = this->shape;
    check(this->inputs.size() == 2 && this->inputs[0].shape == shape, "has inputs whose sizes do not fit each other");
    const Shape& y = this->inputs[1].shape;
    check(is_one_or(y.c, shape.c) && is_one_or(y.h, shape.h) && is_one_or(y.w, shape.w),
          "has inputs whose sizes do not fit each other");
  }

  template <class T>
  void compute(const Run& run) const {
    const Shape shape = this->shape, other_shape = this->inputs[1].shape;
    const T* const x = run.input<T>(0);
    T* const out = run.output<T>();
    const Operation operation;
    over_rows(shape, run, [&](int64_t image, int64_t oy) {
      const T* const others =
          run.input<T>(1) + (image * other_shape.h + (other_shape.h > 1 ? oy : 0)) * other_shape.w * other_shape.c;
      for (int64_t ox = 0; ox < shape.w; ++ox) {
        const int64_t at = ((image * shape.h + oy) * shape.w + ox) * shape.c;
        const T* const other = others + (other_shape.w > 1 ? ox * other_shape.c : 0);
        if (other_shape.c > 1) {
          for (int64_t c = 0; c < shape.c; ++c)
            cpu::store(out + at + c, operation(cpu::load(x + at + c), cpu::load(other + c)));
        } else {
          const float value = cpu::load(other);
          for (int64_t c = 0; c < shape.c; ++c) cpu::store(out + at + c, operation(cpu::load(x + at + c), value));
        }
      }
    });
  }
};

struct Sum {
  float operator()(float a, float b) const { return a + b; }
};
struct Product {
  float operator()(float a, float b) const { return a * b; }
};
using Add = Arithmetic<Sum>;
using Mul = Arithmetic<Product>;

}  // namespace fastgen::plan::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::plan {

FASTGEN_REGISTER_STEP(add, Add)
FASTGEN_REGISTER_STEP(mul, Mul)

}  // namespace fastgen::plan
#endif
