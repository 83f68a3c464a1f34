// reshape, as PyTorch's reshape of (c, h, w), and pixel_shuffle: the same elements in another order.
#include "plan/step.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/steps/rearrange.cpp"
#include "cpu/isa.h"

#include "plan/steps/loops.h"

namespace fastgen::plan::FASTGEN_ISA {

class Reshape final : public Computed<Reshape, NoFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1 && inputs[0].shape.elements() == shape.elements(), "changes the number of elements");
  }

  template <class T>
  void compute(const Run& run) const {
    const int64_t size = shape.elements();
    const T* const x = run.input<T>(0);
    T* const out = run.output<T>();
    run.parallel(run.n * size, [&](int64_t begin, int64_t end) {
      Element from(inputs[0].shape, begin % size), to(shape, begin % size);
      int64_t base = begin / size * size;
      for (int64_t i = begin; i < end; ++i) {
        if (i == base + size) base = i;
        out[base + to.offset()] = x[base + from.offset()];
        from.next();
        to.next();
      }
    });
  }

 private:
  // Iterates over an image in the order (c, h, w) and gives each element's position in memory.
  class Element {
   public:
    Element(const Shape& shape, int64_t at)
        : pixels_(shape.pixels()), channels_(shape.c), pixel_(at % pixels_), channel_(at / pixels_ % channels_) {}
    int64_t offset() const { return pixel_ * channels_ + channel_; }
    void next() {
      if (++pixel_ < pixels_) return;
      pixel_ = 0;
      if (++channel_ == channels_) channel_ = 0;
    }

   private:
    int64_t pixels_, channels_, pixel_, channel_;
  };
};

struct PixelShuffleFields {
  int64_t channels_last;  // 1: the channels of x are (dy, dx, c), which copies whole pixels; 0: PyTorch's (c, dy, dx)
};

class PixelShuffle final : public Computed<PixelShuffle, PixelShuffleFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1, "does not have exactly one input");
    check.flag(fields.channels_last);
    const Shape& x = inputs[0].shape;
    const int64_t factor = shape.h / x.h;
    check(factor > 0 && shape.h == factor * x.h && shape.w == factor * x.w && x.c % (factor * factor) == 0 &&
              shape.c == x.c / (factor * factor),
          "has a size that its input cannot be shuffled to");
  }

  template <class T>
  void compute(const Run& run) const {
    const Shape in = inputs[0].shape;
    const int64_t factor = shape.h / in.h,
                  row = factor * shape.c;  // elements of an output row that come from one input pixel
    const bool copies_pixels = fields.channels_last;
    over_rows(shape, run, [&](int64_t image, int64_t oy) {
      const T* const from =
          run.input<T>(0) + (image * in.h + oy / factor) * in.w * in.c + oy % factor * (copies_pixels ? row : factor);
      T* const to = run.output<T>() + (image * shape.h + oy) * shape.w * shape.c;
      for (int64_t ix = 0; ix < in.w; ++ix) {
        if (copies_pixels) {
          memcpy(to + ix * row, from + ix * in.c, static_cast<size_t>(row) * sizeof(T));
          continue;
        }
        for (int64_t dx = 0; dx < factor; ++dx)
          for (int64_t c = 0; c < shape.c; ++c)
            to[ix * row + dx * shape.c + c] = from[ix * in.c + c * factor * factor + dx];
      }
    });
  }
};

}  // namespace fastgen::plan::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::plan {

FASTGEN_REGISTER_STEP(reshape, Reshape)
FASTGEN_REGISTER_STEP(pixel_shuffle, PixelShuffle)

}  // namespace fastgen::plan
#endif
