// concat and narrow, along the channels.
#include "plan/step.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/steps/channels.cpp"
#include "cpu/isa.h"

#include "plan/steps/loops.h"

namespace fastgen::plan::FASTGEN_ISA {

class Concat final : public Computed<Concat, NoFields> {
 public:
  void check(const Check& check) const override {
    int64_t channels = 0;
    for (const Read& part : inputs) {
      check(part.shape.h == shape.h && part.shape.w == shape.w, "has inputs whose sizes do not fit each other");
      channels += part.shape.c;
    }
    check(channels == shape.c, "has inputs whose sizes do not fit each other");
  }

  template <class T>
  void compute(const Run& run) const {
    over_rows(shape, run, [&](int64_t image, int64_t oy) {
      const int64_t first = (image * shape.h + oy) * shape.w;
      for (int64_t pixel = first; pixel < first + shape.w; ++pixel) {
        T* to = run.output<T>() + pixel * shape.c;
        for (size_t part = 0; part < inputs.size(); ++part) {
          const int64_t c = inputs[part].shape.c;
          memcpy(to, run.input<T>(part) + pixel * c, static_cast<size_t>(c) * sizeof(T));
          to += c;
        }
      }
    });
  }
};

struct NarrowFields {
  int64_t start;  // the first channel
};

class Narrow final : public Computed<Narrow, NarrowFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1, "does not have exactly one input");
    const Shape& x = inputs[0].shape;
    check(x.h == shape.h && x.w == shape.w && shape.c <= x.c && within(fields.start, 0, x.c - shape.c),
          "takes channels that do not exist");
  }

  template <class T>
  void compute(const Run& run) const {
    const int64_t from_c = inputs[0].shape.c, c = shape.c;
    over_rows(shape, run, [&](int64_t image, int64_t oy) {
      const int64_t first = (image * shape.h + oy) * shape.w;
      for (int64_t pixel = first; pixel < first + shape.w; ++pixel)
        memcpy(run.output<T>() + pixel * c, run.input<T>(0) + pixel * from_c + fields.start,
               static_cast<size_t>(c) * sizeof(T));
    });
  }
};

}  // namespace fastgen::plan::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::plan {

FASTGEN_REGISTER_STEP(concat, Concat)
FASTGEN_REGISTER_STEP(narrow, Narrow)

}  // namespace fastgen::plan
#endif
