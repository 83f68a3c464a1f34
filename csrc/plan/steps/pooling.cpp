// avg_pool and max_pool, as PyTorch's AvgPool2d and MaxPool2d.
#include "plan/step.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/steps/pooling.cpp"
#include "cpu/isa.h"

#include "plan/steps/loops.h"

namespace fastgen::plan::FASTGEN_ISA {

// Whether every window has a pixel within the image, including windows that ceil_mode adds.
inline bool windows_fit(const Shape& x, const Shape& shape, const int64_t* kernel, const int64_t* stride,
                        const int64_t* padding, const int64_t* dilation) {
  constexpr int64_t kMax = 1 << 14;
  const int64_t in[2] = {x.h, x.w}, out[2] = {shape.h, shape.w};
  for (int i = 0; i < 2; ++i) {
    if (!within(kernel[i], 1, kMax) || !within(stride[i], 1, kMax) || !within(dilation[i], 1, kMax)) return false;
    const int64_t reach = dilation[i] * (kernel[i] - 1) + 1, last = (out[i] - 1) * stride[i];
    if (!within(padding[i], 0, reach / 2) || last >= in[i] + padding[i] ||
        last > in[i] + 2 * padding[i] - reach + stride[i] - 1)
      return false;
  }
  return x.c == shape.c;
}

struct AvgPoolFields {
  int64_t kernel[2], stride[2], padding[2];
  int64_t count_include_pad;
};

class AvgPool final : public Computed<AvgPool, AvgPoolFields> {
 public:
  void check(const Check& check) const override {
    constexpr int64_t dilation[2] = {1, 1};
    check(inputs.size() == 1, "does not have exactly one input");
    check.flag(fields.count_include_pad);
    check(windows_fit(inputs[0].shape, shape, fields.kernel, fields.stride, fields.padding, dilation),
          "has windows that do not fit");
  }

  // Sums in float32: each row of the window, then the rows.
  template <class T>
  void compute(const Run& run) const {
    const Shape in = inputs[0].shape;
    over_blocks(shape, run, [&](int64_t image, int64_t oy, int64_t first, int64_t count) {
      const Window rows = window(0, oy, in.h);
      for (int64_t ox = 0; ox < shape.w; ++ox) {
        const Window columns = window(1, ox, in.w);
        float sum[kBlock] = {};
        for (int64_t y = rows.begin; y < rows.end; ++y) {
          float row[kBlock] = {};
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            const T* const from = run.input<T>(0) + ((image * in.h + y) * in.w + x) * in.c + first;
            for (int64_t c = 0; c < count; ++c) row[c] += cpu::load(from + c);
          }
          for (int64_t c = 0; c < count; ++c) sum[c] += row[c];
        }
        const int64_t pixels = fields.count_include_pad ? rows.padded * columns.padded
                                                        : (rows.end - rows.begin) * (columns.end - columns.begin);
        T* const to = run.output<T>() + ((image * shape.h + oy) * shape.w + ox) * shape.c + first;
        for (int64_t c = 0; c < count; ++c) cpu::store(to + c, sum[c] / static_cast<float>(pixels));
      }
    });
  }

 private:
  struct Window {
    int64_t begin, end;  // within the image
    int64_t padded;      // its length including the padding, but nothing beyond it
  };

  Window window(int axis, int64_t at, int64_t size) const {
    const int64_t padding = fields.padding[axis], begin = at * fields.stride[axis] - padding;
    const int64_t end = std::min(begin + fields.kernel[axis], size + padding);
    return {std::max<int64_t>(begin, 0), std::min(end, size), end - begin};
  }
};

struct MaxPoolFields {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

class MaxPool final : public Computed<MaxPool, MaxPoolFields> {
 public:
  void check(const Check& check) const override {
    check(inputs.size() == 1, "does not have exactly one input");
    check(windows_fit(inputs[0].shape, shape, fields.kernel, fields.stride, fields.padding, fields.dilation),
          "has windows that do not fit");
  }

  template <class T>
  void compute(const Run& run) const {
    const Shape in = inputs[0].shape;
    const int64_t row_step = fields.dilation[0], column_step = fields.dilation[1];
    over_blocks(shape, run, [&](int64_t image, int64_t oy, int64_t first, int64_t count) {
      const auto [top, bottom] = taps(0, oy, in.h);
      for (int64_t ox = 0; ox < shape.w; ++ox) {
        const auto [left, end] = taps(1, ox, in.w);
        float maximum[kBlock];
        std::fill_n(maximum, kBlock, -std::numeric_limits<float>::infinity());
        for (int64_t y = top; y < bottom; y += row_step)
          for (int64_t x = left; x < end; x += column_step) {
            const T* const from = run.input<T>(0) + ((image * in.h + y) * in.w + x) * in.c + first;
            for (int64_t c = 0; c < count; ++c) {
              const float value = cpu::load(from + c);
              maximum[c] = value > maximum[c] || value != value ? value : maximum[c];  // NaN stays NaN
            }
          }
        T* const to = run.output<T>() + ((image * shape.h + oy) * shape.w + ox) * shape.c + first;
        for (int64_t c = 0; c < count; ++c) cpu::store(to + c, maximum[c]);
      }
    });
  }

 private:
  // The first tap of a window within the image, and the end of its taps there.
  std::pair<int64_t, int64_t> taps(int axis, int64_t at, int64_t size) const {
    const int64_t start = at * fields.stride[axis] - fields.padding[axis], dilation = fields.dilation[axis];
    const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
    return {start + begin * dilation, std::min(start + fields.kernel[axis] * dilation, size)};
  }
};

}  // namespace fastgen::plan::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::plan {

FASTGEN_REGISTER_STEP(avg_pool, AvgPool)
FASTGEN_REGISTER_STEP(max_pool, MaxPool)

}  // namespace fastgen::plan
#endif
