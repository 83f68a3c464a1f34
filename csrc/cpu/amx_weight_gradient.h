// The gradient of a convolution's weight by tiles of bfloat16 (amx_tiles.h), or of float32 split into parts of
// bfloat16. Included once per instruction set (see isa.h), after amx_lines.h and weight_gradient.h.
namespace fastgen::cpu::FASTGEN_ISA {

// As in DirectWeightGradient: the sum over the pixels of the `small` tensor times the pixels of the `big` one that the
// taps meet. A tile's products sum over pairs of numbers. Here a pair is one position of two bands, so that a tap
// remains a shift: the big tensor is copied to lines of 32 pairs, the small one to tiles of 16 channels by 16 pairs.
template <class Tiles, int parts>
struct AmxWeightGradient {
  static constexpr int64_t kPositions = 256;       // of a band, about
  static constexpr int64_t kAtOnce = 8 << 20;      // the most bytes that are packed before they are multiplied, about
  static constexpr int64_t kSums = kLine * kLine;  // of a tap, for 32 channels of small and a line of big

  AmxConvolution how;  // strided, from big to small
  int64_t n;

  // out (ic, oc, kh, kw); `in` of its strides is a channel of big, `out` one of small.
  template <class S, class T>
  void run(const S* big, const S* small, T* out, const GradStrides& strides, const ParallelFor& parallel) const {
    const Geometry& conv = how.conv;
    BandLayout layout = BandLayout::of(how, n, kPositions);
    layout.positions = std::min(layout.positions, conv.oh);
    const int64_t bands_per_image = ceil_div(conv.oh, layout.positions),
                  chunks = ceil_div(ceil_div(n, layout.images) * bands_per_image, 2);
    const auto positions = layout.tiles(0, 0, layout.positions);
    const auto terms = layout.terms(0, 0);
    const int64_t lines = layout.lines(), of_small = ceil_div(conv.oc, kLine), taps = how.taps();
    const int64_t tiles_size = static_cast<int64_t>(positions.size()) * kTileSize,
                  small_size = parts * 2 * of_small * tiles_size;
    const int64_t at_once =
        std::clamp<int64_t>(kAtOnce / (4 * (lines * kLine + small_size)), std::min<int64_t>(chunks, 2), chunks);
    const auto pairs = scratch<uint32_t>(at_once * lines * kLine), factors = scratch<uint32_t>(at_once * small_size);
    const auto sums = scratch<float>(of_small * how.line_blocks * taps * kSums);
    const auto band_at = [&](int64_t index) -> Band {
      const int64_t image = index / bands_per_image * layout.images, row = index % bands_per_image * layout.positions;
      return {std::min(n, image), std::min(n, image + layout.images), row, std::min(conv.oh, row + layout.positions)};
    };
    for (int64_t first = 0; first < chunks; first += at_once) {
      const int64_t count = std::min(at_once, chunks - first);
      parallel(count, [&](int64_t begin, int64_t end) {
        const auto spare = scratch<BFloat16>(2 * lines * kLine);
        for (int64_t i = begin; i < end; ++i) {
          const Band bands[2] = {band_at(2 * (first + i)), band_at(2 * (first + i) + 1)};
          pack_big(layout, big, bands, spare.get(), pairs.get() + i * lines * kLine);
          pack_small(layout, positions, small, bands, tiles_size, factors.get() + i * small_size);
        }
      });
      parallel(of_small * how.line_blocks * taps, [&](int64_t begin, int64_t end) {
        Tiles tiles;
        for (int64_t item = begin; item < end;) {  // all taps of a block while its factors are in the cache
          const int64_t block = item / taps, last = std::min(end, (block + 1) * taps), s = block / how.line_blocks;
          for (int64_t i = 0; i < count; ++i)
            for (int64_t at = item; at < last; ++at) {
              const int64_t line = terms[at % taps * how.line_blocks + block % how.line_blocks].line;
              multiply(tiles, layout, positions, factors.get() + i * small_size + 2 * s * tiles_size, tiles_size,
                       pairs.get() + (i * lines + line) * kLine, sums.get() + at * kSums, first + i > 0,
                       conv.oc - s * kLine <= 16, how.depth - block % how.line_blocks * kLine <= 16);
            }
          item = last;
        }
      });
    }
    const ParallelFor serial{1, [](int64_t size, const auto& body) { body(0, size); }};
    parallel(of_small * how.line_blocks, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t s = block / how.line_blocks * kLine, b = block % how.line_blocks * kLine;
        const GradStrides from{1, kLine, how.joined > 1 ? kSums : conv.kw * kSums, how.joined > 1 ? conv.ic : kSums};
        store_weights(sums.get() + block * taps * kSums, from, std::min(kLine, conv.ic - b),
                      std::min(kLine, conv.oc - s), conv.kh, conv.kw, out + b * strides.in + s * strides.out, strides,
                      serial);
      }
    });
  }

 private:
  static constexpr int64_t kTileSize = 16 * 16;  // pairs

  template <class S>
  void pack_big(const BandLayout& layout, const S* big, const Band (&bands)[2], BFloat16* spare,
                uint32_t* pairs) const {
    const int64_t size = layout.lines() * kLine;
    for (int i = 0; i < 2; ++i) {
      BFloat16* const lines = spare + i * size;
      if (bands[i].last_image - bands[i].first_image < layout.images) memset(lines, 0, size * sizeof(BFloat16));
      else memset(lines + size - kTilePositions * kLine, 0, kTilePositions * kLine * sizeof(BFloat16));
      layout.gather(big, bands[i], lines);
    }
    for (int64_t i = 0; i < size; ++i) pairs[i] = pair_of(spare[i], spare[size + i]);
  }

  // to: (part, block of 16 channels, tile of positions, channel, pair)
  template <class S>
  void pack_small(const BandLayout& layout, const std::vector<PositionTile>& positions, const S* small,
                  const Band (&bands)[2], int64_t tiles_size, uint32_t* to) const {
    const Geometry& conv = how.conv;
    const int64_t blocks = 2 * ceil_div(conv.oc, kLine), per_image = layout.positions * conv.ow;
    const S* from[2][kTilePositions];
    for (const PositionTile& tile : positions) {
      for (int i = 0; i < 2; ++i)
        for (int64_t k = 0; k < kTilePositions; ++k) {
          const int64_t image = bands[i].first_image + tile.at[k] / per_image,
                        row = bands[i].first_row + tile.at[k] % per_image / conv.ow;
          const bool kept = tile.at[k] >= 0 && image < bands[i].last_image && row < bands[i].last_row;
          from[i][k] = kept ? small + ((image * conv.oh + row) * conv.ow + tile.at[k] % conv.ow) * conv.oc : nullptr;
        }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channels = std::clamp<int64_t>(conv.oc - block * 16, 0, 16);
        uint32_t square[parts][16][16];
        for (int64_t k = 0; k < kTilePositions; ++k) {
          BFloat16 two[2][parts][16];
          for (int i = 0; i < 2; ++i) values_of(from[i][k] ? from[i][k] + block * 16 : nullptr, channels, two[i]);
          for (int part = 0; part < parts; ++part)
            for (int c = 0; c < 16; ++c) square[part][k][c] = pair_of(two[0][part][c], two[1][part][c]);
        }
        for (int part = 0; part < parts; ++part)
          transpose_square(square[part], to + (part * blocks + block) * tiles_size, 16);
      }
      to += kTileSize;
    }
  }

  // The parts of `channels` values, zeros beyond and where `from` is null.
  static inline __attribute__((always_inline)) void values_of(const BFloat16* from, int64_t channels,
                                                              BFloat16 (&to)[parts][16]) {
    if (from && channels == 16) return void(memcpy(to[0], from, sizeof(to[0])));
    memset(to[0], 0, sizeof(to[0]));
    if (from) memcpy(to[0], from, channels * sizeof(BFloat16));
  }
  static inline __attribute__((always_inline)) void values_of(const float* from, int64_t channels,
                                                              BFloat16 (&to)[parts][16]) {
    if (from && channels == 16)
      for (int64_t i = 0; i < 16; ++i) split<parts>(from[i], &to[0][i], 16);
    else
      for (int64_t i = 0; i < 16; ++i) split<parts>(from && i < channels ? from[i] : 0.0f, &to[0][i], 16);
  }

  // Adds the products of a tap for one chunk to its sums, or sets them.
  void multiply(Tiles& tiles, const BandLayout& layout, const std::vector<PositionTile>& positions,
                const uint32_t* small, int64_t tiles_size, const uint32_t* big, float* sums, bool add, bool short_,
                bool narrow) const {
    const auto run = [&](auto tall, auto wide) {
      multiply_as<tall.value, wide.value>(tiles, layout, positions, small, tiles_size, big, sums, add);
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    if (short_) narrow ? run(one, one) : run(one, two);
    else narrow ? run(two, one) : run(two, two);
  }

  template <int tall, int wide>
  void multiply_as(Tiles& tiles, const BandLayout& layout, const std::vector<PositionTile>& positions,
                   const uint32_t* small, int64_t tiles_size, const uint32_t* big, float* sums, bool add) const {
    constexpr int64_t row = kLine * sizeof(float);
    const int64_t big_part = how.line_blocks * layout.phases() * layout.plane() * kLine,
                  small_part = 2 * ceil_div(how.conv.oc, kLine) * tiles_size;
    const auto each = [&](auto tile) {  // of the sums
      constexpr int index = decltype(tile)::value;
      float* const at = sums + index / 2 * 16 * kLine + index % 2 * 16;
      if constexpr (index / 2 < tall && index % 2 < wide) {
        if (add) tiles.template load<index>(at, row);
        else tiles.template zero<index>();
      }
    };
    each(std::integral_constant<int, 0>());
    each(std::integral_constant<int, 1>());
    each(std::integral_constant<int, 2>());
    each(std::integral_constant<int, 3>());
    for (const PositionTile& tile : positions) {
      const uint32_t* const b = big + tile.from * kLine;
      for (int i = parts - 1; i >= 0; --i)  // the smallest products first
        for (int k = parts - 1 - i; k >= 0; --k) {
          tiles.template load<4>(small + i * small_part, 64);
          tiles.template load<6>(b + k * big_part, row);
          tiles.template multiply<0, 4, 6>();
          if constexpr (tall == 2) {
            tiles.template load<5>(small + i * small_part + tiles_size, 64);
            tiles.template multiply<2, 5, 6>();
          }
          if constexpr (wide == 2) {
            tiles.template load<7>(b + k * big_part + 16, row);
            tiles.template multiply<1, 4, 7>();
            if constexpr (tall == 2) tiles.template multiply<3, 5, 7>();
          }
        }
      small += kTileSize;
    }
    tiles.template store<0>(sums, row);
    if constexpr (wide == 2) tiles.template store<1>(sums + 16, row);
    if constexpr (tall == 2) tiles.template store<2>(sums + 16 * kLine, row);
    if constexpr (tall == 2 && wide == 2) tiles.template store<3>(sums + 16 * kLine + 16, row);
  }
};

}  // namespace fastgen::cpu::FASTGEN_ISA
