// upsample_nearest and upsample_bilinear, to any size, as PyTorch's interpolate.
#include "plan/step.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/steps/upsample.cpp"
#include "cpu/isa.h"

#include "plan/steps/loops.h"

namespace fastgen::plan::FASTGEN_ISA {

// The source pixel of each of `out` pixels, in float32 as PyTorch computes it, so that rounding picks the same one.
class Nearest {
 public:
  Nearest(int64_t in, int64_t out, bool exact)
      : in_(in), scale_(static_cast<float>(in) / static_cast<float>(out)), shift_(exact ? 0.5f : 0.0f) {}
  int64_t operator[](int64_t at) const {
    return std::min(static_cast<int64_t>((static_cast<float>(at) + shift_) * scale_), in_ - 1);
  }

 private:
  int64_t in_;
  float scale_, shift_;
};

struct UpsampleNearestFields {
  int64_t exact;  // 1: PyTorch's mode "nearest-exact"
};

class UpsampleNearest final : public Computed<UpsampleNearest, UpsampleNearestFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1 && inputs[0].shape.c == shape.c, "changes the number of channels");
    check.flag(fields.exact);
  }

  template <class T>
  void compute(const Run& run) const {
    const Shape in = inputs[0].shape;
    const int64_t c = shape.c;
    const Nearest rows(in.h, shape.h, fields.exact), columns(in.w, shape.w, fields.exact);
    over_rows(shape, run, [&](int64_t image, int64_t oy) {
      const T* const row = run.input<T>(0) + (image * in.h + rows[oy]) * in.w * c;
      T* const to = run.output<T>() + (image * shape.h + oy) * shape.w * c;
      for (int64_t ox = 0; ox < shape.w; ++ox)
        memcpy(to + ox * c, row + columns[ox] * c, static_cast<size_t>(c) * sizeof(T));
    });
  }
};

struct Interpolation {
  int64_t low, high;
  float low_weight, high_weight;
};

inline Interpolation interpolation(int64_t at, int64_t in, int64_t out, bool align_corners) {
  if (in == out) return {at, at, 1, 0};
  float coordinate;
  if (align_corners) {
    coordinate = out > 1 ? static_cast<float>(at) * (static_cast<float>(in - 1) / static_cast<float>(out - 1)) : 0.0f;
  } else {
    const float scale = static_cast<float>(in) / static_cast<float>(out);
    coordinate = std::max(0.0f, (static_cast<float>(at) + 0.5f) * scale - 0.5f);
  }
  const int64_t low = std::min(static_cast<int64_t>(coordinate), in - 1);
  const float high = std::min(std::max(coordinate - static_cast<float>(low), 0.0f), 1.0f);
  return {low, std::min(low + 1, in - 1), 1 - high, high};
}

struct UpsampleBilinearFields {
  int64_t align_corners;
};

class UpsampleBilinear final : public Computed<UpsampleBilinear, UpsampleBilinearFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1 && inputs[0].shape.c == shape.c, "changes the number of channels");
    check.flag(fields.align_corners);
  }

  template <class T>
  void compute(const Run& run) const {
    const Shape in = inputs[0].shape;
    const int64_t channels = shape.c;
    over_rows(shape, run, [&](int64_t image, int64_t oy) {
      const Interpolation rows = interpolation(oy, in.h, shape.h, fields.align_corners);
      const T* const top = run.input<T>(0) + (image * in.h + rows.low) * in.w * channels;
      const T* const bottom = run.input<T>(0) + (image * in.h + rows.high) * in.w * channels;
      for (int64_t ox = 0; ox < shape.w; ++ox) {
        const Interpolation columns = interpolation(ox, in.w, shape.w, fields.align_corners);
        const int64_t left = columns.low * channels, right = columns.high * channels;
        const float a = rows.low_weight * columns.low_weight, b = rows.low_weight * columns.high_weight;
        const float d = rows.high_weight * columns.low_weight, e = rows.high_weight * columns.high_weight;
        T* const to = run.output<T>() + ((image * shape.h + oy) * shape.w + ox) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          cpu::store(to + c, a * cpu::load(top + left + c) + b * cpu::load(top + right + c) +
                                 d * cpu::load(bottom + left + c) + e * cpu::load(bottom + right + c));
        }
      }
    });
  }
};

}  // namespace fastgen::plan::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::plan {

FASTGEN_REGISTER_STEP(upsample_nearest, UpsampleNearest)
FASTGEN_REGISTER_STEP(upsample_bilinear, UpsampleBilinear)

}  // namespace fastgen::plan
#endif
