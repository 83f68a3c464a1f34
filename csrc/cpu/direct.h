// A convolution as a matrix product whose rows are gathered through pointers, so that no column matrix is written.
// Included once per instruction set (see isa.h), after epilogue.h.
namespace fastgen::cpu::FASTGEN_ISA {

// joined: how many taps of a kernel row are read as one tap with that many times the channels, from rows with `edge`
// more pixels at either end. This is for few channels, for which the product over one tap is too short.
struct Direct {
  Axis rows, columns;
  int64_t joined = 1, edge = 0;
};

inline Direct direct(const Geometry& conv) {
  constexpr int64_t kFewChannels = 16;
  const bool few =
      !conv.transposed && conv.groups == 1 && conv.ic < kFewChannels && conv.dilation[1] == 1 && conv.kw > 1;
  if (few && conv.padding[1] <= conv.iw) {  // the copy is at most three times as large as x
    auto columns = Axis::strided(conv.iw + 2 * conv.padding[1], conv.ow, 1, conv.stride[1], 0, 1, false);
    return {axis_of(conv, 0), std::move(columns), conv.kw, conv.padding[1]};
  }
  return {axis_of(conv, 0), axis_of(conv, 1)};
}

constexpr int64_t kBandPixels = 1024;  // output pixels per band, approximately
constexpr int64_t kItems = 8;

// Computes the band's pixels of one class of rows and columns, kPixels at a time, in `count` blocks: one, or two that
// are band_size apart. dot: each float of x and of the weights is a pair of bfloat16, and counts as one channel.
template <bool dot, class T, int vectors>
void multiply(const Output<T, vectors>& output, const Direct& direct, const Acc<T>* x, const Acc<T>* packed,
              int64_t block, int64_t count, const Band& band, const Axis::Class& row, const Axis::Class& column,
              const Acc<T>* zeros, const Acc<T>** pointers, Acc<T>* z, int64_t band_size) {
  using A = Acc<T>;
  constexpr int64_t width = Output<T, vectors>::width;
  const Geometry& conv = output.conv;
  const int64_t channels = conv.ic / conv.groups, depth = channels * direct.joined, group = block / output.blocks();
  const int64_t row_taps = row.taps.size(), column_taps = column.taps.size(), taps = row_taps * column_taps,
                pixel = conv.ic, kernel = conv.kw / direct.joined, row_pixels = conv.iw + 2 * direct.edge;
  const A** const weights = pointers;
  const A** const sources = pointers + count * taps;
  const A** const lines = sources + taps * kPixels;
  int64_t tap = 0;
  for (int64_t k = block; k < block + count; ++k)
    for (int64_t kh : row.taps)
      for (int64_t kw : column.taps)
        weights[tap++] = packed + (k * conv.kh * kernel + kh * kernel + kw) * depth * width;
  const int64_t* const kws = column.taps.data();
  A* to[2 * kPixels];
  int filled = 0;
  const auto run_tile = [&] {
    // A small tile of one block leaves registers and multipliers idle.
    if (count == 2 && filled <= kPixels / 2) kTiles<A, vectors, dot, 2>[filled - 1](sources, weights, taps, depth, to);
    else
      for (int64_t k = 0; k < count; ++k)
        kTiles<A, vectors, dot>[filled - 1](sources, weights + k* taps, taps, depth, to + k* kPixels);
    filled = 0;
  };
  const auto first_oh = std::lower_bound(row.positions.begin(), row.positions.end(), band.first_row);
  const auto last_oh = std::lower_bound(first_oh, row.positions.end(), band.last_row);
  for (int64_t image = band.first_image; image < band.last_image; ++image)
    for (auto at = first_oh; at != last_oh; ++at) {
      const int64_t oh = *at;
      for (int64_t i = 0; i < row_taps; ++i) {
        const int64_t ih = direct.rows.source[oh * conv.kh + row.taps[i]];
        lines[i] = ih < 0 ? nullptr : x + (image * conv.ih + ih) * row_pixels * pixel + group * channels;
      }
      A* const line =
          z + ((image - band.first_image) * (band.last_row - band.first_row) + oh - band.first_row) * conv.ow * width;
      for (const int64_t ow : column.positions) {
        const int64_t* const columns = direct.columns.source.data() + ow * kernel;
        const A** source = sources + filled;
        for (int64_t i = 0; i < row_taps; ++i)
          for (int64_t j = 0; j < column_taps; ++j, source += kPixels) {
            const int64_t iw = columns[kws[j]];
            *source = lines[i] && iw >= 0 ? lines[i] + iw * pixel : zeros;
          }
        to[filled] = line + ow * width;
        to[kPixels + filled] = to[filled] + band_size;
        if (++filled == kPixels) run_tile();
      }
    }
  if (filled) run_tile();
}

template <bool dot, class T, int vectors>
void run(Output<T, vectors>& output, const Direct& direct, const Acc<T>* x, const Acc<T>* packed,
         const ParallelFor& parallel) {
  using A = Acc<T>;
  constexpr int64_t width = Output<T, vectors>::width;
  const Geometry& conv = output.conv;
  const Epilogue& epilogue = output.epilogue;
  output.set_band(kBandPixels / epilogue.s, kBandPixels / conv.ow);
  // Smaller bands where these would make fewer than kItems items of work.
  const int64_t items_per_band = conv.groups * output.blocks() * ceil_div(epilogue.n, output.images);
  output.set_band(output.images, std::min(output.band_rows,
                                          std::max<int64_t>(4, ceil_div(conv.oh, ceil_div(kItems, items_per_band)))));
  const int64_t bands = ceil_div(epilogue.n, output.images) * output.bands_per_image(),
                band_size = output.images * output.band_rows * conv.ow * width;
  // Two blocks at once, if that leaves enough work for all threads.
  const int64_t blocks_at_once = conv.groups * output.blocks() * bands >= 4 * parallel.threads ? 2 : 1;
  const int64_t parts_per_group = ceil_div(output.blocks(), blocks_at_once);
  const std::vector<A> zeros(static_cast<size_t>(conv.ic / conv.groups * direct.joined), A(0));
  parallel(conv.groups * parts_per_group * bands, [&](int64_t begin, int64_t end) {
    A* const memory = thread_scratch<A>(blocks_at_once * band_size);
    const A** const sources = thread_scratch<const A*>(conv.kh * conv.kw * (kPixels + blocks_at_once) + conv.kh);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / bands / parts_per_group, in_group = item / bands % parts_per_group * blocks_at_once;
      const int64_t block = group * output.blocks() + in_group,
                    count = std::min(blocks_at_once, output.blocks() - in_group);
      const Band band = output.band_at(item % bands);
      for (const Axis::Class& row : direct.rows.classes)
        for (const Axis::Class& column : direct.columns.classes)
          multiply<dot>(output, direct, x, packed, block, count, band, row, column, zeros.data(), sources, memory,
                        band_size);
      for (int64_t k = 0; k < count; ++k) output.finish_band(block + k, band, memory + k * band_size);
    }
  });
}

}  // namespace fastgen::cpu::FASTGEN_ISA
