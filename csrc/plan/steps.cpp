#include "plan/steps.h"

#include <limits>

#undef FASTGEN_FILE
#define FASTGEN_FILE "plan/steps.cpp"
#include "cpu/isa.h"

namespace fastgen::plan::FASTGEN_ISA {

constexpr int64_t kBlock = 64;  // channels that one thread sums at a time

// body(image, output row, first channel, channels)
template <class Body>
void over_blocks(const Step& s, int64_t n, const cpu::ParallelFor& parallel, const Body& body) {
  const int64_t blocks = ceil_div(s.c, kBlock);
  parallel(n * s.oh * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks, first = item % blocks * kBlock;
      body(row / s.oh, row % s.oh, first, std::min(kBlock, s.c - first));
    }
  });
}

// body(image, output row)
template <class Body>
void over_rows(const Step& s, int64_t n, const cpu::ParallelFor& parallel, const Body& body) {
  parallel(n * s.oh, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row / s.oh, row % s.oh);
  });
}

struct Window {
  int64_t begin, end;  // within the input
  int64_t padded;      // its length with what lies in the padding, but not beyond
};

inline Window window(int64_t at, int64_t kernel, int64_t stride, int64_t padding, int64_t size) {
  const int64_t begin = at * stride - padding, end = std::min(begin + kernel, size + padding);
  return {std::max<int64_t>(begin, 0), std::min(end, size), end - begin};
}

// Sums in float32: each row of the window, then the rows.
template <class T>
void avg_pool(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  over_blocks(s, n, parallel, [&](int64_t image, int64_t oy, int64_t first, int64_t count) {
    const Window rows = window(oy, s.kh, s.stride[0], s.padding[0], s.ih);
    for (int64_t ox = 0; ox < s.ow; ++ox) {
      const Window columns = window(ox, s.kw, s.stride[1], s.padding[1], s.iw);
      float sum[kBlock] = {};
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        float row[kBlock] = {};
        for (int64_t i = columns.begin; i < columns.end; ++i) {
          const T* const from = x + ((image * s.ih + y) * s.iw + i) * s.ic + first;
          for (int64_t c = 0; c < count; ++c) row[c] += cpu::load(from + c);
        }
        for (int64_t c = 0; c < count; ++c) sum[c] += row[c];
      }
      const int64_t pixels =
          s.reflect ? rows.padded * columns.padded : (rows.end - rows.begin) * (columns.end - columns.begin);
      T* const to = out + ((image * s.oh + oy) * s.ow + ox) * s.c + first;
      for (int64_t c = 0; c < count; ++c) cpu::store(to + c, sum[c] / static_cast<float>(pixels));
    }
  });
}

template <class T>
void max_pool(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  over_blocks(s, n, parallel, [&](int64_t image, int64_t oy, int64_t first, int64_t count) {
    // Behind the padding in front, and before the input's end.
    const auto taps = [](int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
      const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
      return std::pair(start + begin * dilation, std::min(start + kernel * dilation, size));
    };
    const auto [top, bottom] = taps(oy * s.stride[0] - s.padding[0], s.kh, s.dilation[0], s.ih);
    for (int64_t ox = 0; ox < s.ow; ++ox) {
      const auto [left, right] = taps(ox * s.stride[1] - s.padding[1], s.kw, s.dilation[1], s.iw);
      float most[kBlock];
      std::fill_n(most, kBlock, -std::numeric_limits<float>::infinity());
      for (int64_t y = top; y < bottom; y += s.dilation[0])
        for (int64_t i = left; i < right; i += s.dilation[1]) {
          const T* const from = x + ((image * s.ih + y) * s.iw + i) * s.ic + first;
          for (int64_t c = 0; c < count; ++c) {
            const float value = cpu::load(from + c);
            most[c] = value > most[c] || value != value ? value : most[c];  // a NaN stays
          }
        }
      T* const to = out + ((image * s.oh + oy) * s.ow + ox) * s.c + first;
      for (int64_t c = 0; c < count; ++c) cpu::store(to + c, most[c]);
    }
  });
}

// The pixel that each of `out` is: in float32, as PyTorch computes it, so that rounding picks the same.
class Nearest {
 public:
  Nearest(int64_t in, int64_t out, bool exact)
      : in(in), scale(static_cast<float>(in) / static_cast<float>(out)), shift(exact ? 0.5f : 0.0f) {}
  int64_t operator[](int64_t at) const {
    return std::min(static_cast<int64_t>((static_cast<float>(at) + shift) * scale), in - 1);
  }

 private:
  int64_t in;
  float scale, shift;
};

template <class T>
void upsample_nearest(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  const Nearest rows(s.ih, s.oh, s.reflect), columns(s.iw, s.ow, s.reflect);
  over_rows(s, n, parallel, [&](int64_t image, int64_t oy) {
    const T* const row = x + (image * s.ih + rows[oy]) * s.iw * s.c;
    T* const to = out + (image * s.oh + oy) * s.ow * s.c;
    for (int64_t ox = 0; ox < s.ow; ++ox)
      memcpy(to + ox * s.c, row + columns[ox] * s.c, static_cast<size_t>(s.c) * sizeof(T));
  });
}

struct Between {
  int64_t low, high;
  float to_low, to_high;  // weights
};

inline Between between(int64_t at, int64_t in, int64_t out, bool align_corners) {
  if (in == out) return {at, at, 1, 0};
  float place;
  if (align_corners) {
    place = out > 1 ? static_cast<float>(at) * (static_cast<float>(in - 1) / static_cast<float>(out - 1)) : 0.0f;
  } else {
    place = std::max(0.0f, (static_cast<float>(at) + 0.5f) * (static_cast<float>(in) / static_cast<float>(out)) - 0.5f);
  }
  const int64_t low = std::min(static_cast<int64_t>(place), in - 1);
  const float high = std::min(std::max(place - static_cast<float>(low), 0.0f), 1.0f);
  return {low, std::min(low + 1, in - 1), 1 - high, high};
}

template <class T>
void upsample_bilinear(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  over_rows(s, n, parallel, [&](int64_t image, int64_t oy) {
    const Between rows = between(oy, s.ih, s.oh, s.reflect);
    const T* const top = x + (image * s.ih + rows.low) * s.iw * s.c;
    const T* const bottom = x + (image * s.ih + rows.high) * s.iw * s.c;
    for (int64_t ox = 0; ox < s.ow; ++ox) {
      const Between columns = between(ox, s.iw, s.ow, s.reflect);
      const int64_t left = columns.low * s.c, right = columns.high * s.c;
      const float a = rows.to_low * columns.to_low, b = rows.to_low * columns.to_high;
      const float d = rows.to_high * columns.to_low, e = rows.to_high * columns.to_high;
      T* const to = out + ((image * s.oh + oy) * s.ow + ox) * s.c;
      for (int64_t c = 0; c < s.c; ++c) {
        cpu::store(to + c, a * cpu::load(top + left + c) + b * cpu::load(top + right + c) +
                               d * cpu::load(bottom + left + c) + e * cpu::load(bottom + right + c));
      }
    }
  });
}

template <class T>
void pixel_shuffle(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  const int64_t factor = s.oh / s.ih, row = factor * s.c;  // what an input pixel gives to a row of the output
  over_rows(s, n, parallel, [&](int64_t image, int64_t oy) {
    const T* const from = x + (image * s.ih + oy / factor) * s.iw * s.ic + oy % factor * (s.reflect ? row : factor);
    T* const to = out + (image * s.oh + oy) * s.ow * s.c;
    for (int64_t ix = 0; ix < s.iw; ++ix) {
      if (s.reflect) {
        memcpy(to + ix * row, from + ix * s.ic, static_cast<size_t>(row) * sizeof(T));
        continue;
      }
      for (int64_t dx = 0; dx < factor; ++dx)
        for (int64_t c = 0; c < s.c; ++c) to[ix * row + dx * s.c + c] = from[ix * s.ic + c * factor * factor + dx];
    }
  });
}

// y is broadcast.
template <class T, class Combine>
void combine(const Step& s, int64_t n, const T* x, const T* y, T* out, const cpu::ParallelFor& parallel,
             const Combine& combined) {
  over_rows(s, n, parallel, [&](int64_t image, int64_t oy) {
    const T* const others = y + (image * s.kh + (s.kh > 1 ? oy : 0)) * s.kw * s.groups;
    for (int64_t ox = 0; ox < s.ow; ++ox) {
      const int64_t at = ((image * s.oh + oy) * s.ow + ox) * s.c;
      const T* const other = others + (s.kw > 1 ? ox * s.groups : 0);
      if (s.groups > 1) {
        for (int64_t c = 0; c < s.c; ++c)
          cpu::store(out + at + c, combined(cpu::load(x + at + c), cpu::load(other + c)));
      } else {
        const float value = cpu::load(other);
        for (int64_t c = 0; c < s.c; ++c) cpu::store(out + at + c, combined(cpu::load(x + at + c), value));
      }
    }
  });
}

template <class T>
void narrow(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  over_rows(s, n, parallel, [&](int64_t image, int64_t oy) {
    const int64_t first = (image * s.oh + oy) * s.ow;
    for (int64_t pixel = first; pixel < first + s.ow; ++pixel)
      memcpy(out + pixel * s.c, x + pixel * s.ic + s.padding[0], static_cast<size_t>(s.c) * sizeof(T));
  });
}

// From where an element in the order (c, h, w) lies to where the same lies in an image of another size.
template <class T>
void reshape(const Step& s, int64_t n, const T* x, T* out, const cpu::ParallelFor& parallel) {
  struct Place {
    int64_t pixels, channels, pixel, channel;
    Place(int64_t c, int64_t pixels, int64_t at)
        : pixels(pixels), channels(c), pixel(at % pixels), channel(at / pixels % c) {}
    int64_t offset() const { return pixel * channels + channel; }
    void next() {
      if (++pixel < pixels) return;
      pixel = 0;
      if (++channel == channels) channel = 0;
    }
  };
  const int64_t size = s.c * s.oh * s.ow;
  parallel(n * size, [&](int64_t begin, int64_t end) {
    Place from(s.ic, s.ih * s.iw, begin % size), to(s.c, s.oh * s.ow, begin % size);
    int64_t base = begin / size * size;
    for (int64_t i = begin; i < end; ++i) {
      if (i == base + size) base = i;
      out[base + to.offset()] = x[base + from.offset()];
      from.next();
      to.next();
    }
  });
}

template <class T>
void embedding(const Step& s, int64_t n, const int64_t* labels, const float* weight, T* out) {
  for (int64_t image = 0; image < n; ++image)
    for (int64_t c = 0; c < s.c; ++c) cpu::store(out + image * s.c + c, weight[labels[image] * s.c + c]);
}

template <class T>
void run_as(const Step& s, int64_t n, const void* given, const void* other, const float* weight, void* result,
            const cpu::ParallelFor& parallel) {
  const T* const x = static_cast<const T*>(given);
  const T* const y = static_cast<const T*>(other);
  T* const out = static_cast<T*>(result);
  switch (s.kind) {
    case Kind::embedding: return embedding(s, n, static_cast<const int64_t*>(given), weight, out);
    case Kind::add: return combine(s, n, x, y, out, parallel, [](float a, float b) { return a + b; });
    case Kind::mul: return combine(s, n, x, y, out, parallel, [](float a, float b) { return a * b; });
    case Kind::narrow: return narrow(s, n, x, out, parallel);
    case Kind::reshape: return reshape(s, n, x, out, parallel);
    case Kind::avg_pool: return avg_pool(s, n, x, out, parallel);
    case Kind::max_pool: return max_pool(s, n, x, out, parallel);
    case Kind::upsample_nearest: return upsample_nearest(s, n, x, out, parallel);
    case Kind::upsample_bilinear: return upsample_bilinear(s, n, x, out, parallel);
    case Kind::pixel_shuffle: return pixel_shuffle(s, n, x, out, parallel);
    default: return;
  }
}

inline void run_other(const Step& s, DType dtype, int64_t n, const void* x, const void* y, const float* weight,
                      void* out, const cpu::ParallelFor& parallel) {
  if (dtype == DType::bfloat16) run_as<cpu::BFloat16>(s, n, x, y, weight, out, parallel);
  else run_as<float>(s, n, x, y, weight, out, parallel);
}

}  // namespace fastgen::plan::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::plan {

using cpu::Isa;
using cpu::isa;

void run_other(const Step& s, DType dtype, int64_t n, const void* x, const void* y, const float* weight, void* out,
               const cpu::ParallelFor& parallel) {
  FASTGEN_DISPATCH(run_other, s, dtype, n, x, y, weight, out, parallel)
}

namespace {

constexpr int64_t kMost = 1 << 14;  // pixels along a side

bool within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

bool pool_fits(const Step& s) {
  const int64_t in[2] = {s.ih, s.iw}, out[2] = {s.oh, s.ow}, kernel[2] = {s.kh, s.kw};
  for (int i = 0; i < 2; ++i) {
    if (!within(kernel[i], 1, kMost) || !within(s.stride[i], 1, kMost) ||
        !within(s.dilation[i], 1, s.kind == Kind::max_pool ? kMost : 1))
      return false;
    const int64_t reach = s.dilation[i] * (kernel[i] - 1) + 1, last = (out[i] - 1) * s.stride[i];
    // The last window begins before the input's end, and reaches as far as ceil_mode lets it.
    if (!within(s.padding[i], 0, reach / 2) || last >= in[i] + s.padding[i] ||
        last > in[i] + 2 * s.padding[i] - reach + s.stride[i] - 1)
      return false;
  }
  return s.ic == s.c;
}

}  // namespace

bool other_fits(const Step& s, int64_t y) {
  const bool same_pixels = s.ih == s.oh && s.iw == s.ow, flag = within(s.reflect, 0, 1);
  const auto is_one_or = [](int64_t value, int64_t all) { return value == 1 || value == all; };
  switch (s.kind) {
    case Kind::embedding: return s.ic == 1 && s.ih == 1 && s.iw == 1 && s.oh == 1 && s.ow == 1;
    case Kind::add:
    case Kind::mul:
      return same_pixels && s.ic == s.c && is_one_or(s.groups, s.c) && is_one_or(s.kh, s.oh) && is_one_or(s.kw, s.ow) &&
             y == s.groups * s.kh * s.kw;
    case Kind::narrow: return same_pixels && s.c <= s.ic && within(s.padding[0], 0, s.ic - s.c);
    case Kind::reshape: return s.ic * s.ih * s.iw == s.c * s.oh * s.ow;
    case Kind::avg_pool:
    case Kind::max_pool: return flag && pool_fits(s);
    case Kind::upsample_nearest:
    case Kind::upsample_bilinear: return flag && s.ic == s.c;
    case Kind::pixel_shuffle: {
      const int64_t factor = s.oh / s.ih;
      return flag && factor && s.oh == factor * s.ih && s.ow == factor * s.iw && s.ic % (factor * factor) == 0 &&
             s.c == s.ic / (factor * factor);
    }
    default: return s.ic == s.c && same_pixels;
  }
}

}  // namespace fastgen::plan
#endif
