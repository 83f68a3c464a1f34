// The weights of a convolution by tiles of bfloat16 (amx_tiles.h), or of float32 split into parts of bfloat16: packed
// once as tiles of 16 pairs of channels by 16 output channels. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kLine = 32;  // channels of a line

// value as the sum of `parts` bfloat16, each the rounded rest. A value that is not finite in bfloat16 is the last part
// alone: only the other factor's first part, which is zero where that factor is, multiplies the last part. So an
// infinity stays one.
template <int parts>
inline __attribute__((always_inline)) void split(float value, BFloat16* to, int64_t step) {
  constexpr float kTooLarge = 0x1.ffp127f;  // rounds to infinity
  const bool is_finite = std::abs(value) < kTooLarge;
  float rest = is_finite ? value : 0.0f;
  for (int part = 0; part < parts - 1; ++part) {
    store(to + part * step, rest);
    rest -= load(to + part * step);
  }
  store(to + (parts - 1) * step, is_finite ? rest : value);
}

struct AmxConvolution {
  Geometry conv;
  int parts;
  PhasedAxis rows, columns;
  int64_t joined, depth, line_blocks;  // joined: taps of a kernel row that are read as one, with the channels of all

  AmxConvolution(const Geometry& conv_, int parts_)
      : conv(conv_), parts(parts_), rows(phased_axis_of(conv, 0)), columns(phased_axis_of(conv, 1)), joined(1) {
    if (!conv.transposed && conv.kw > 1 && conv.ic * conv.kw <= kLine) {
      joined = conv.kw;
      columns = PhasedAxis::strided(conv.ow, conv.ow, 1, 1, 0, 1, false);
    }
    depth = conv.ic * joined;
    line_blocks = ceil_div(depth, kLine);
  }

  int64_t width() const { return conv.oc <= 16 ? 16 : 32; }
  int64_t blocks() const { return ceil_div(conv.oc, width()); }
  int64_t taps() const { return conv.kh * conv.kw / joined; }
  int64_t block_size() const { return taps() * line_blocks * 16 * width(); }  // pairs of weights
  int64_t packed_size() const { return parts * blocks() * block_size(); }

  // The weights as pairs: (part, block, tap, block of channels, pair, width), zero beyond the channels.
  template <class W>
  Buffer<uint32_t> pack(const W* weight, const ParallelFor& parallel) const {
    auto packed = scratch<uint32_t>(packed_size());
    with_parts([&](auto count) {
      parallel(blocks() * line_blocks, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
          pack_lines<count.value>(weight, item / line_blocks, item % line_blocks, packed.get());
      });
    });
    return packed;
  }

 private:
  template <class F>
  void with_parts(const F& body) const {
    if (parts == 1) body(std::integral_constant<int, 1>());
    else if (parts == 2) body(std::integral_constant<int, 2>());
    else body(std::integral_constant<int, 3>());
  }

  // Packs the weights of one block of output channels and one of lines. Of the strides of W, the one that is 1 decides
  // what is read together: 16 output channels, 16 pairs of input channels or 16 taps.
  template <int count, class W>
  void pack_lines(const W* weight, int64_t block, int64_t line, uint32_t* packed) const {
    constexpr int64_t most = 16;
    const WeightStrides stride = weight_strides(conv);
    const int64_t wide = width(), part_size = blocks() * block_size(), tap_size = line_blocks * 16 * wide;
    const int64_t channels = std::min(kLine, depth - line * kLine), outputs = std::min(wide, conv.oc - block * wide);
    const int64_t across = conv.kw / joined, pairs = ceil_div(channels, 2);
    uint32_t* const first = packed + block * block_size() + line * 16 * wide;
    // The place of an input channel of the line, for output channel 0 of the block.
    const auto of_channel = [&](int64_t i) {
      const int64_t of_line = line * kLine + i;
      return weight + of_line % conv.ic * stride.depth + of_line / conv.ic * stride.column +
             block * wide * stride.channel;
    };
    const auto at_tap = [&](int64_t tap) { return tap / across * stride.row + tap % across * stride.column; };
    if (channels < kLine || outputs < wide)
      for (int part = 0; part < count; ++part)
        for (int64_t tap = 0; tap < taps(); ++tap) std::fill_n(first + part * part_size + tap * tap_size, 16 * wide, 0);
    // Pairs (low, high), the second zero beyond the channels; `step` from one value to the next.
    const auto read = [&](const W* low, const W* high, int64_t step, int64_t size, uint32_t (*to)[most]) {
      if (step == 1) pairs_of<count>(low, high, 1, size, to);
      else pairs_of<count>(low, high, step, size, to);
    };
    if (stride.channel == 1 || joined > 1) {
      for (int64_t tap = 0; tap < taps(); ++tap)
        for (int64_t pair = 0; pair < pairs; ++pair)
          for (int64_t k = 0; k < outputs; k += most) {
            uint32_t values[count][most];
            const int64_t size = std::min(most, outputs - k), from = at_tap(tap) + k * stride.channel;
            read(of_channel(2 * pair) + from, 2 * pair + 1 < channels ? of_channel(2 * pair + 1) + from : nullptr,
                 stride.channel, size, values);
            for (int part = 0; part < count; ++part)
              std::copy_n(values[part], size, first + part * part_size + tap * tap_size + pair * wide + k);
          }
      return;
    }
    // Squares of 16 output channels by 16 taps of a pair, or by the 16 pairs of a tap.
    uint32_t square[count][most][most], transposed[most][most];
    const auto put = [&](int64_t outputs_at, int64_t rows, const auto& row_at) {
      for (int part = 0; part < count; ++part) {
        transpose_square(square[part], transposed[0], 16);
        for (int64_t row = 0; row < rows; ++row)
          std::copy_n(transposed[row], std::min(most, outputs - outputs_at),
                      first + part * part_size + row_at(row) + outputs_at);
      }
    };
    const auto fill = [&](int64_t o, const W* low, const W* high, int64_t step, int64_t size) {
      uint32_t values[count][most];
      read(low, high, step, size, values);
      for (int part = 0; part < count; ++part) std::copy_n(values[part], size, square[part][o]);
    };
    for (int64_t k = 0; k < outputs; k += most) {
      const int64_t columns = std::min(most, outputs - k);
      if (stride.depth == 1) {
        for (int64_t tap = 0; tap < taps(); ++tap) {
          for (int64_t o = 0; o < columns; ++o) {
            const W* const from = of_channel(0) + at_tap(tap) + (k + o) * stride.channel;
            fill(o, from, from + 1, 2, channels / 2);
            if (channels % 2) {
              uint32_t last[count][most];
              read(from + channels - 1, nullptr, 2, 1, last);
              for (int part = 0; part < count; ++part) square[part][o][pairs - 1] = last[part][0];
            }
          }
          put(k, pairs, [&](int64_t pair) { return tap * tap_size + pair * wide; });
        }
        continue;
      }
      const bool plain = stride.row == conv.kw * stride.column;
      const int64_t run = plain ? taps() : conv.kw;
      for (int64_t pair = 0; pair < pairs; ++pair)
        for (int64_t start = 0; start < taps(); start += run)
          for (int64_t tap = start; tap < start + run; tap += most) {
            const int64_t size = std::min(most, start + run - tap);
            for (int64_t o = 0; o < columns; ++o) {
              const int64_t from = at_tap(tap) + (k + o) * stride.channel;
              fill(o, of_channel(2 * pair) + from, 2 * pair + 1 < channels ? of_channel(2 * pair + 1) + from : nullptr,
                   stride.column, size);
            }
            put(k, size, [&](int64_t row) { return (tap + row) * tap_size + pair * wide; });
          }
    }
  }

  // to[part][i]: the pair low[i * step], high[i * step] (zero if null).
  template <int count, class W>
  static inline __attribute__((always_inline)) void pairs_of(const W* low, const W* high, int64_t step, int64_t size,
                                                             uint32_t (*to)[16]) {
    if constexpr (std::is_same_v<W, BFloat16>) {
      if (high)
        for (int64_t i = 0; i < size; ++i) to[0][i] = pair_of(low[i * step], high[i * step]);
      else
        for (int64_t i = 0; i < size; ++i) to[0][i] = low[i * step].bits;
    } else {
      BFloat16 one[count][16], other[count][16] = {};
      for (int64_t i = 0; i < size; ++i) split<count>(load(low + i * step), &one[0][i], 16);
      if (high)
        for (int64_t i = 0; i < size; ++i) split<count>(load(high + i * step), &other[0][i], 16);
      for (int part = 0; part < count; ++part)
        for (int64_t i = 0; i < size; ++i) to[part][i] = pair_of(one[part][i], other[part][i]);
    }
  }
};

}  // namespace fastgen::cpu::FASTGEN_ISA
