// The input of a convolution by tiles: a band of x is copied to lines of 32 channels, sorted by input phase and padded,
// so that a tap is a shift: 16 neighbouring positions of a tap are a tile of 16 lines. Included once per instruction
// set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kTilePositions = 16;  // lines of a tile

// Where 16 positions of an output phase are: lines of the packed band from `from` on, and pixels of a block of the
// output. A position beyond the image is not kept.
struct PositionTile {
  int64_t from, to, step;  // if regular, position i goes to pixel to + i * step
  bool regular;
  std::array<int32_t, kTilePositions> at;  // else to pixel at[i], or nowhere: -1
};

// How a call divides its images: the order of the lines of a band, and the tiles of each output phase.
struct BandLayout {
  const AmxConvolution& how;
  int64_t images, positions;  // of a band: images, and positions of rows
  bool interleaved;           // the images are side by side at each position, for narrow images

  // For a band of about `pixels` of the output's n images.
  static BandLayout of(const AmxConvolution& how, int64_t n, int64_t pixels) {
    const int64_t narrow = how.columns.positions(), row = how.conv.ow * how.rows.out_step;
    BandLayout layout{how, 1, pixels / row, narrow < kTilePositions && n >= 8};
    if (layout.interleaved) {  // as many images as fill the tiles
      int64_t whole = 1;
      while (whole * narrow % kTilePositions) whole *= 2;
      const int64_t fit = std::max<int64_t>(pixels / (how.conv.oh * how.conv.ow), 1);
      layout.images = std::min(n, ceil_div(fit, whole) * whole);
      layout.positions = pixels / (layout.images * row);
    }
    layout.positions = std::max<int64_t>(layout.positions, std::min<int64_t>(4, how.rows.positions()));
    return layout;
  }

  int64_t rows() const { return positions + how.rows.before + how.rows.after; }
  int64_t across() const { return how.columns.positions() + how.columns.before + how.columns.after; }
  int64_t image_step() const { return interleaved ? 1 : rows() * across(); }
  int64_t row_step() const { return interleaved ? across() * images : across(); }
  int64_t column_step() const { return interleaved ? images : 1; }
  int64_t plane() const { return images * rows() * across(); }
  int64_t phases() const { return how.rows.in_step * how.columns.in_step; }
  // The last tile may read lines behind the last one.
  int64_t lines() const { return how.parts * how.line_blocks * phases() * plane() + kTilePositions; }

  // A product of a tap and a block of channels: distances in lines from a tile's first, and in pairs from the block's
  // first weight.
  struct Term {
    int64_t line, weight;
  };
  std::vector<Term> terms(int64_t row_phase, int64_t column_phase) const {
    std::vector<Term> found;
    const int64_t across_kernel = how.conv.kw / how.joined;
    for (const auto& row : how.rows.taps[row_phase])
      for (const auto& column : how.columns.taps[column_phase])
        for (int64_t line = 0; line < how.line_blocks; ++line)
          found.push_back({(line * phases() + row.phase * how.columns.in_step + column.phase) * plane() +
                               (row.shift + how.rows.before) * row_step() +
                               (column.shift + how.columns.before) * column_step(),
                           ((row.kernel * across_kernel + column.kernel) * how.line_blocks + line) * 16 * how.width()});
    return found;
  }

  // The tiles of an output phase of a band of `out_rows` rows of the output.
  std::vector<PositionTile> tiles(int64_t row_phase, int64_t column_phase, int64_t out_rows) const {
    const auto &down = how.rows, &beside = how.columns;
    const int64_t count = beside.positions(column_phase), ow = how.conv.ow;
    const int64_t valid_rows = ceil_div(out_rows - row_phase, down.out_step);
    std::vector<PositionTile> found;
    // Positions in the order of the lines: (row, column, image) if interleaved, else (image, row, column).
    const auto pixel = [&](int64_t image, int64_t row, int64_t column) -> int64_t {
      if (image >= images || row >= valid_rows || column >= count) return -1;
      return (image * out_rows + row * down.out_step + row_phase) * ow + column * beside.out_step + column_phase;
    };
    const auto run = [&](int64_t first_line, int64_t length, const auto& pixel_at) {
      for (int64_t start = 0; start < length; start += kTilePositions) {
        PositionTile tile{first_line + start, 0, 0, true, {}};
        for (int64_t i = 0; i < kTilePositions; ++i)
          tile.at[i] = start + i < length ? static_cast<int32_t>(pixel_at(start + i)) : -1;
        tile.to = tile.at[0];
        tile.step = tile.at[1] - tile.at[0];
        for (int64_t i = 0; i < kTilePositions; ++i)
          tile.regular &= tile.at[i] >= 0 && tile.at[i] == tile.to + i * tile.step;
        found.push_back(tile);
      }
    };
    if (count <= 0 || valid_rows <= 0) return found;
    // Rows one after another waste the positions between them; row by row those of the last tile.
    const bool joined_rows =
        valid_rows * ceil_div(count, kTilePositions) > ceil_div((valid_rows - 1) * across() + count, kTilePositions);
    if (interleaved)
      for (int64_t row = 0; row < valid_rows; ++row)
        run(row * row_step(), count * images, [&](int64_t i) { return pixel(i % images, row, i / images); });
    else
      for (int64_t image = 0; image < images; ++image) {
        if (joined_rows)
          run(image * image_step(), (valid_rows - 1) * across() + count,
              [&](int64_t i) { return pixel(image, i / across(), i % across()); });
        else
          for (int64_t row = 0; row < valid_rows; ++row)
            run(image * image_step() + row * row_step(), count, [&](int64_t i) { return pixel(image, row, i); });
      }
    return found;
  }

  // Copies the band's part of x (n, h, w, c) to lines. `band` has at most `images` images.
  template <class S>
  void gather(const S* x, const Band& band, BFloat16* lines) const {
    const Geometry& conv = how.conv;
    const int64_t first = band.first_row / how.rows.out_step - how.rows.before, columns = across();
    const int64_t block_step = phases() * plane() * kLine, part_step = how.line_blocks * block_step;
    for (int64_t row_phase = 0; row_phase < how.rows.in_step; ++row_phase)
      for (int64_t row = 0; row < rows(); ++row)
        for (int64_t image = 0; image < band.last_image - band.first_image; ++image) {
          const int64_t y = how.rows.pixel(row_phase, first + row);
          const S* const line = y < 0 ? nullptr : x + ((band.first_image + image) * conv.ih + y) * conv.iw * conv.ic;
          for (int64_t column_phase = 0; column_phase < how.columns.in_step; ++column_phase) {
            BFloat16* const to = lines + ((row_phase * how.columns.in_step + column_phase) * plane() +
                                          image * image_step() + row * row_step()) *
                                             kLine;
            if (how.joined > 1) gather_joined(line, to, part_step);
            else
              for (int64_t block = 0; block < how.line_blocks; ++block)
                gather_row(line ? line + block * kLine : nullptr, column_phase,
                           std::min(kLine, conv.ic - block * kLine), columns, to + block * block_step, part_step);
          }
        }
  }

 private:
  // Copies `channels` of the pixels of a row, which is null in the padding.
  template <class S>
  void gather_row(const S* row, int64_t column_phase, int64_t channels, int64_t columns, BFloat16* to,
                  int64_t part_step) const {
    const int64_t step = column_step() * kLine, ic = how.conv.ic;
    for (int64_t column = 0; column < columns; ++column, to += step) {
      const int64_t at = row ? how.columns.pixel(column_phase, column - how.columns.before) : -1;
      if (at < 0) put<S>(nullptr, 0, to, part_step);
      else put(row + at * ic, channels, to, part_step);
    }
  }

  // The same with the taps of a kernel row side by side in a line.
  template <class S>
  void gather_joined(const S* row, BFloat16* to, int64_t part_step) const {
    const Geometry& conv = how.conv;
    const int64_t ic = conv.ic, reach = (conv.kw - 1) * conv.dilation[1];
    for (int64_t position = 0; position < conv.ow; ++position, to += column_step() * kLine) {
      const int64_t first = position * conv.stride[1] - conv.padding[1];
      if (!row) put<S>(nullptr, 0, to, part_step);
      else if (conv.dilation[1] == 1 && first >= 0 && first + reach < conv.iw)
        put(row + first * ic, how.depth, to, part_step);
      else {
        std::array<S, kLine> values{};
        for (int64_t k = 0; k < conv.kw; ++k) {
          int64_t i = first + k * conv.dilation[1];
          if (conv.reflect) i = reflected(i, conv.iw);
          if (i >= 0 && i < conv.iw) std::copy_n(row + i * ic, ic, values.data() + k * ic);
        }
        put(values.data(), how.depth, to, part_step);
      }
    }
  }

  // Writes a line: `channels` values and zeros.
  template <class S>
  inline __attribute__((always_inline)) void put(const S* from, int64_t channels, BFloat16* to,
                                                 int64_t part_step) const {
    if constexpr (std::is_same_v<S, BFloat16>) {
#if FASTGEN_VECTOR_BYTES == 64
      const __mmask32 mask = channels == kLine ? ~0u : (1u << channels) - 1;
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, from));
#else
      if (channels == kLine) return void(memcpy(to, from, kLine * sizeof(BFloat16)));
      memset(to, 0, kLine * sizeof(BFloat16));
      if (channels) memcpy(to, from, channels * sizeof(BFloat16));
#endif
    } else {
      if (channels < kLine)
        for (int part = 0; part < how.parts; ++part) memset(to + part * part_step, 0, kLine * sizeof(BFloat16));
      if (channels == kLine) put_parts(from, kLine, to, part_step);
      else put_parts(from, channels, to, part_step);
    }
  }

  inline __attribute__((always_inline)) void put_parts(const float* from, int64_t channels, BFloat16* __restrict to,
                                                       int64_t part_step) const {
    if (how.parts == 2)
      for (int64_t i = 0; i < channels; ++i) split<2>(from[i], to + i, part_step);
    else
      for (int64_t i = 0; i < channels; ++i) split<3>(from[i], to + i, part_step);
  }
};

}  // namespace fastgen::cpu::FASTGEN_ISA
