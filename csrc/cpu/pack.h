// Tensors and weights in the order in which kernels read them. Included once per instruction set (see isa.h), after
// tile.h.
namespace fastgen::cpu::FASTGEN_ISA {

// Picks values of a and b by index; b's first value has the index `size`.
template <class V, int... i>
inline __attribute__((always_inline)) V shuffle(V a, V b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Number;
  typedef Number Numbers __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Numbers{Number(i)...});
#endif
}

// The interleaved values of two vectors, from index `from` on.
template <class V, int size, int from, int... i>
inline __attribute__((always_inline)) V interleaved(V a, V b, std::integer_sequence<int, i...>) {
  return shuffle(a, b, std::integer_sequence<int, (from + i / 2 + i % 2 * size)...>());
}

// Transposes a square: to[i][j] = from[j][i]; a vector holds one row.
template <class A>
inline void transpose(const A* from, int64_t from_step, A* to, int64_t to_step) {
  using V = typename Vector<A>::type;
  constexpr int size = Vector<A>::size;
  constexpr std::make_integer_sequence<int, size> all;
  V row[size], next[size];
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) row[i] = *reinterpret_cast<const V*>(from + i * from_step);
#pragma GCC unroll 4
  for (int round = 1; round < size; round *= 2) {  // each round rotates the bits of the index (i, j) by one
#pragma GCC unroll 8
    for (int i = 0; i < size / 2; ++i) {
      next[2 * i] = interleaved<V, size, 0>(row[i], row[i + size / 2], all);
      next[2 * i + 1] = interleaved<V, size, size / 2>(row[i], row[i + size / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) *reinterpret_cast<V*>(to + i * to_step) = row[i];
}

// to (size, width): the weights of one tap, of `depth` input channels in_step apart and `valid` output channels
// out_step apart, zeros beyond. Channels that are contiguous in memory are read together. pairs: bfloat16 weights of
// input channels 2 i and 2 i + 1 in one float.
template <bool pairs = false, class T>
void copy_taps(const T* from, int64_t in_step, int64_t out_step, int64_t depth, int64_t valid, int64_t size,
               int64_t width, Acc<T>* to) {
  if (depth < size || valid < width) std::fill_n(to, size * width, Acc<T>(0));
  const auto value = [](const T* at, [[maybe_unused]] int64_t step) {
    if constexpr (pairs) {
      const uint32_t pair = pair_of(at[0], at[step]);
      float result;
      memcpy(&result, &pair, sizeof(result));
      return result;
    } else {
      return load(at);
    }
  };
  const int64_t step = (pairs ? 2 : 1) * in_step;
  if (out_step == 1) {  // the constant step gives SIMD code
    for (int64_t i = 0; i < depth; ++i)
      for (int64_t k = 0; k < valid; ++k) to[i * width + k] = value(from + i * step + k, in_step);
  } else if (out_step <= in_step) {
    for (int64_t i = 0; i < depth; ++i)
      for (int64_t k = 0; k < valid; ++k) to[i * width + k] = value(from + i * step + k * out_step, in_step);
  } else {
    int64_t k = 0;
    if constexpr (std::is_same_v<T, Acc<T>>)
      if (in_step == 1)
        for (; k + Vector<T>::size <= valid && depth % Vector<T>::size == 0; k += Vector<T>::size)
          for (int64_t i = 0; i < depth; i += Vector<T>::size)
            transpose(from + k * out_step + i, out_step, to + i * width + k, width);
    for (; k < valid; ++k)
      for (int64_t i = 0; i < depth; ++i) to[i * width + k] = value(from + i * step + k * out_step, in_step);
  }
}

// A tensor as a kernel reads it: the caller's, or a copy.
template <class S>
struct Pixels {
  const S* x;
  Buffer<S> copy;
  const S* get() const { return x; }
};

// Transposes a square of 16 by 16 numbers of 32 bits.
inline void transpose_square(const uint32_t (*from)[16], uint32_t* to, int64_t to_step) {
  constexpr int64_t size = Vector<float>::size;
  for (int64_t i = 0; i < 16; i += size)
    for (int64_t j = 0; j < 16; j += size)
      transpose(reinterpret_cast<const float*>(&from[i][j]), 16, reinterpret_cast<float*>(to + j * to_step + i),
                to_step);
}

// The 16 pixels of 32 channels, channel by channel, to pixel by pixel.
inline void transpose_pairs(const BFloat16* from, int64_t from_step, BFloat16* to, int64_t to_step) {
  uint32_t pairs[16][16], pixels[16][16];
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t k = 0; k < 16; ++k)
      pairs[i][k] = pair_of(from[2 * i * from_step + k], from[(2 * i + 1) * from_step + k]);
  transpose_square(pairs, pixels[0], 16);
  for (int64_t k = 0; k < 16; ++k) memcpy(to + k * to_step, pixels[k], sizeof(pixels[k]));
}

// x (n, c, s), in either memory order, as (n, s, c) of type S; no copy where x already is.
template <class S, class T>
Pixels<S> pixels_first(const T* x, int64_t n, int64_t c, int64_t s, bool channels_last, const ParallelFor& parallel) {
  if constexpr (std::is_same_v<T, S>)
    if (channels_last) return {x, nullptr};
  auto copy = scratch<S>(n * c * s);
  S* out = copy.get();
  const auto convert = [](const T* value) -> S {
    if constexpr (std::is_same_v<T, S>) return *value;
    else return load(value);
  };
  constexpr int64_t most = 16, lanes = Vector<Acc<T>>::size;
  parallel(n * ceil_div(s, most), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t base = block / ceil_div(s, most) * c * s, first = block % ceil_div(s, most) * most,
                    pixels = std::min(most, s - first);
      S* const to = out + base + first * c;
      if (channels_last) {
        for (int64_t i = 0; i < pixels * c; ++i) to[i] = convert(x + base + first * c + i);
        continue;
      }
      const T* const from = x + base + first;
      int64_t channel = 0;
      if constexpr (std::is_same_v<T, S> && std::is_same_v<T, Acc<T>>)
        for (; pixels == most && channel + lanes <= c; channel += lanes)
          for (int64_t pixel = 0; pixel < most; pixel += lanes)
            transpose(from + channel * s + pixel, s, to + pixel * c + channel, c);
      if constexpr (std::is_same_v<T, S> && std::is_same_v<T, BFloat16>)
        for (; pixels == most && channel + 2 * most <= c; channel += 2 * most)
          transpose_pairs(from + channel * s, s, to + channel, c);
      for (; channel < c; ++channel)
        for (int64_t pixel = 0; pixel < pixels; ++pixel) to[pixel * c + channel] = convert(from + channel * s + pixel);
    }
  });
  return {out, std::move(copy)};
}

// x (rows, columns, c) with `edge` more columns at either end, filled with zeros or with x mirrored.
template <class S>
Buffer<S> with_edges(const S* x, int64_t rows, int64_t columns, int64_t c, int64_t edge, bool reflect,
                     const ParallelFor& parallel) {
  const int64_t padded = columns + 2 * edge;
  auto copy = scratch<S>(rows * padded * c);
  parallel(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const S* const from = x + row * columns * c;
      S* const to = copy.get() + row * padded * c;
      std::copy_n(from, columns * c, to + edge * c);
      for (int64_t i = 1; i <= edge; ++i)
        for (int64_t channel = 0; channel < c; ++channel) {
          to[(edge - i) * c + channel] = reflect ? from[i * c + channel] : S(0);
          to[(edge + columns - 1 + i) * c + channel] = reflect ? from[(columns - 1 - i) * c + channel] : S(0);
        }
    }
  });
  return copy;
}

// A weight of a group is at from + ic * depth + oc * channel + kh * row + kw * column.
struct WeightStrides {
  int64_t group, depth, channel, row, column;
};

inline WeightStrides weight_strides(const Geometry& conv) {
  const int64_t* s = conv.weight_strides;
  if (conv.transposed) return {conv.ic / conv.groups * s[0], s[0], s[1], s[2], s[3]};
  return {conv.oc / conv.groups * s[0], s[1], s[0], s[2], s[3]};
}

// The weights as (group, block, tap, ic / groups, width), zero where a block is wider than the group's channels. pairs:
// bfloat16 weights of channels 2 i and 2 i + 1 in one float.
template <bool pairs = false, class T>
Buffer<Acc<T>> pack_weights(const Geometry& conv, int64_t width, const T* weight, const ParallelFor& parallel) {
  constexpr int64_t channels_per_value = pairs ? 2 : 1, chunk = 16;
  const int64_t depth = conv.ic / conv.groups / channels_per_value, channels = conv.oc / conv.groups,
                blocks = ceil_div(channels, width);
  const int64_t taps = conv.kh * conv.kw, parts = ceil_div(depth, chunk);
  const WeightStrides stride = weight_strides(conv);
  auto packed = scratch<Acc<T>>(conv.groups * blocks * taps * depth * width);
  parallel(conv.groups * blocks * parts, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts * chunk, block = item / parts % blocks, group = item / parts / blocks;
      const int64_t count = std::min(chunk, depth - first), valid = std::min(width, channels - block * width);
      const T* const from =
          weight + group * stride.group + first * channels_per_value * stride.depth + block * width * stride.channel;
      for (int64_t tap = 0; tap < taps; ++tap)
        copy_taps<pairs>(from + tap / conv.kw * stride.row + tap % conv.kw * stride.column, stride.depth,
                         stride.channel, count, valid, count, width,
                         packed.get() + (((group * blocks + block) * taps + tap) * depth + first) * width);
    }
  });
  return packed;
}

}  // namespace fastgen::cpu::FASTGEN_ISA
