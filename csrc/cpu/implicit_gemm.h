// Convolutions as matrix products whose rows are gathered through pointers: no column matrix is ever written.
// Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(FASTGEN_VECTOR_BYTES), aligned(alignof(A)), may_alias));
  static constexpr int64_t size = FASTGEN_VECTOR_BYTES / sizeof(A);
};

constexpr int kPixels = FASTGEN_TILE_PIXELS;

// out[p][:] = sum over taps t and depth i of x[t][p][i] * w[t][i][:], for kPixels pixels and vectors * size channels,
// all of them in registers.
template <class A, int vectors>
void tile(const A* const* x, const A* const* w, int64_t taps, int64_t depth, A* const* out) {
  using V = typename Vector<A>::type;
  constexpr int64_t width = vectors * Vector<A>::size;
  V sum[kPixels][vectors] = {};
  for (int64_t t = 0; t < taps; ++t, x += kPixels) {
    const A* weight = w[t];
    for (int64_t i = 0; i < depth; ++i, weight += width) {
      V b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = *reinterpret_cast<const V*>(weight + v * Vector<A>::size);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        const A value = x[p][i];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[p][v] += b[v] * value;
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(out[p] + v * Vector<A>::size) = sum[p][v];
}

// How the output positions of one axis read the input: position o, tap k -> source[o * taps + k], -1 outside. Positions that the
// same taps reach form a class: one a residue of the stride when transposed, and on a short axis the positions at the border
// apart from the rest, so that no tap is multiplied with zeros.
struct Axis {
  struct Class {
    std::vector<int64_t> taps, positions;
  };
  int64_t taps;
  std::vector<int64_t> source;
  std::vector<Class> classes;

  // o + padding = i * stride + k * dilation
  static Axis transposed(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    Axis axis{kernel, std::vector<int64_t>(static_cast<size_t>(out * kernel), -1), {}};
    for (int64_t o = 0; o < out; ++o) {
      std::vector<int64_t> reached, inside;
      for (int64_t k = 0; k < kernel; ++k) {
        if ((o + padding - k * dilation) % stride) continue;
        reached.push_back(k);
        const int64_t i = (o + padding - k * dilation) / stride;
        if (o + padding < k * dilation || i >= in) continue;
        inside.push_back(k);
        axis.source[o * kernel + k] = i;
      }
      axis.add(o, out <= kShort ? inside : reached);
    }
    return axis;
  }

 private:
  static constexpr int64_t kShort = 16;

  void add(int64_t position, const std::vector<int64_t>& reached) {
    for (Class& known : classes)
      if (known.taps == reached) return known.positions.push_back(position);
    classes.push_back({reached, {position}});
  }
};

// x (n, c, s) of any dtype and order as (n, s, c) in the accumulation type; x itself where it is that already.
template <class T>
const Acc<T>* pixels_first(const T* x, int64_t n, int64_t c, int64_t s, bool channels_last, std::unique_ptr<Acc<T>[]>& storage,
                           const ParallelFor& parallel) {
  if constexpr (std::is_same_v<T, Acc<T>>)
    if (channels_last) return x;
  storage = scratch<Acc<T>>(n * c * s);
  Acc<T>* out = storage.get();
  parallel(n * ceil_div(s, 16), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t sample = block / ceil_div(s, 16), first = (block % ceil_div(s, 16)) * 16, last = std::min(s, first + 16);
      const int64_t base = sample * c * s;
      if (channels_last)
        for (int64_t i = base + first * c; i < base + last * c; ++i) out[i] = load(x + i);
      else
        for (int64_t channel = 0; channel < c; ++channel)
          for (int64_t pixel = first; pixel < last; ++pixel) out[base + pixel * c + channel] = load(x + base + channel * s + pixel);
    }
  });
  return out;
}

}  // namespace fastgen::cpu::FASTGEN_ISA
