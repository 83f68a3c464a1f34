// A convolution by tiles of bfloat16 (amx_tiles.h): weights of amx_weights.h, lines of amx_lines.h. Included once per
// instruction set (see isa.h), after epilogue.h.
namespace fastgen::cpu::FASTGEN_ISA {

// The sums of `tall` tiles of positions by `wide` tiles of output channels, over all terms.
template <class Tiles, int parts, int tall, int wide>
inline __attribute__((always_inline)) void multiply_tiles(Tiles& tiles, const BFloat16* const* lines,
                                                          const uint32_t* weights, const BandLayout::Term* terms,
                                                          int64_t count, int64_t part_lines, int64_t part_weights) {
  constexpr int64_t row = wide * 64;  // bytes of a row of weights
  tiles.template zero<0>();
  if constexpr (wide == 2) tiles.template zero<1>();
  if constexpr (tall == 2) tiles.template zero<2>();
  if constexpr (tall == 2 && wide == 2) tiles.template zero<3>();
  for (int64_t t = 0; t < count; ++t) {
    const BFloat16* const a0 = lines[0] + terms[t].line * kLine;
    const BFloat16* const a1 = lines[tall - 1] + terms[t].line * kLine;
    const uint32_t* const b = weights + terms[t].weight;
    // Loads part i of x if it is not loaded yet, and part k of the weights, each tile just before its first use.
    const auto product = [&](auto new_x, auto new_weights, int i, int k) __attribute__((always_inline)) {
      if constexpr (new_x) tiles.template load<4>(a0 + i * part_lines, 64);
      if constexpr (new_weights) tiles.template load<6>(b + k * part_weights, row);
      if constexpr (new_weights && wide == 2) tiles.template load<7>(b + k * part_weights + 16, row);
      tiles.template multiply<0, 4, 6>();
      if constexpr (new_x && tall == 2) tiles.template load<5>(a1 + i * part_lines, 64);
      if constexpr (wide == 2) tiles.template multiply<1, 4, 7>();
      if constexpr (tall == 2) tiles.template multiply<2, 5, 6>();
      if constexpr (tall == 2 && wide == 2) tiles.template multiply<3, 5, 7>();
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if constexpr (parts == 3) {
      product(yes, yes, 0, 2);
      product(no, yes, 0, 1);
      product(yes, no, 1, 1);
      product(no, yes, 1, 0);
      product(yes, no, 2, 0);
      product(yes, no, 0, 0);
    } else if constexpr (parts == 2) {
      product(yes, yes, 0, 1);
      product(no, yes, 0, 0);
      product(yes, no, 1, 0);
    } else {
      product(yes, yes, 0, 0);
    }
  }
}

// Stores a tile of sums of 16 output channels from `channel` on to its pixels of z.
template <int tile, int width, class Tiles>
inline void store_tile(Tiles& tiles, const PositionTile& positions, float* z, int64_t channel, float* spare) {
  if (positions.regular)
    return tiles.template store<tile>(z + positions.to * width + channel, positions.step * width * 4);
  tiles.template store<tile>(spare, 64);
  for (int64_t i = 0; i < kTilePositions; ++i)
    if (positions.at[i] >= 0) memcpy(z + positions.at[i] * width + channel, spare + i * 16, 64);
}

template <class Tiles, int parts, int width>
void multiply_phase(Tiles& tiles, const BandLayout& layout, const std::vector<PositionTile>& positions,
                    const std::vector<BandLayout::Term>& terms, const BFloat16* lines, const uint32_t* weights,
                    int64_t part_weights, float* z, float* spare) {
  constexpr int wide = width / 16;
  const int64_t part_lines = layout.how.line_blocks * layout.phases() * layout.plane() * kLine;
  const int64_t count = static_cast<int64_t>(positions.size()), terms_count = static_cast<int64_t>(terms.size());
  for (int64_t i = 0; i < count; i += 2) {
    const bool two = i + 1 < count;
    const BFloat16* const from[2] = {lines + positions[i].from * kLine,
                                     lines + positions[two ? i + 1 : i].from * kLine};
    if (two)
      multiply_tiles<Tiles, parts, 2, wide>(tiles, from, weights, terms.data(), terms_count, part_lines, part_weights);
    else
      multiply_tiles<Tiles, parts, 1, wide>(tiles, from, weights, terms.data(), terms_count, part_lines, part_weights);
    store_tile<0, width>(tiles, positions[i], z, 0, spare);
    if constexpr (wide == 2) store_tile<1, width>(tiles, positions[i], z, 16, spare);
    if (!two) continue;
    store_tile<2, width>(tiles, positions[i + 1], z, 0, spare);
    if constexpr (wide == 2) store_tile<3, width>(tiles, positions[i + 1], z, 16, spare);
  }
}

// x: (n, h, w, c)
template <class Tiles, int parts, class S, class T, int vectors>
void run_tiles(Output<T, vectors>& output, const AmxConvolution& how, const S* x, const uint32_t* packed,
               const ParallelFor& parallel) {
  constexpr int width = Output<T, vectors>::width;
  const Geometry& conv = output.conv;
  const Epilogue& epilogue = output.epilogue;
  output.rounds_by_instruction = !std::is_same_v<Tiles, EmulatedTiles>;
  constexpr int64_t kPixelsOfBand = 1024;
  BandLayout layout = BandLayout::of(how, epilogue.n, kPixelsOfBand);
  output.set_band(layout.images, layout.positions * how.rows.out_step);
  layout.images = output.images;
  layout.positions = ceil_div(output.band_rows, how.rows.out_step);
  const int64_t bands = ceil_div(epilogue.n, output.images) * output.bands_per_image();
  const int64_t items = parallel.threads > 1 ? 4 * parallel.threads : 1;
  const int64_t together = ceil_div(output.blocks(), std::min(output.blocks(), ceil_div(items, bands))),
                parts_per_band = ceil_div(output.blocks(), together);
  const int64_t phases = how.rows.out_step * how.columns.out_step, part_weights = how.blocks() * how.block_size();
  std::vector<std::vector<BandLayout::Term>> terms;
  for (int64_t phase = 0; phase < phases; ++phase)
    terms.push_back(layout.terms(phase / how.columns.out_step, phase % how.columns.out_step));
  const auto tiles_of = [&](int64_t band_rows) {  // of each output phase
    std::vector<std::vector<PositionTile>> found;
    for (int64_t phase = 0; phase < phases; ++phase)
      found.push_back(layout.tiles(phase / how.columns.out_step, phase % how.columns.out_step, band_rows));
    return found;
  };
  // The last band of an image may have fewer rows.
  const auto whole = tiles_of(output.band_rows), last = tiles_of((conv.oh - 1) % output.band_rows + 1);
  parallel(bands * parts_per_band, [&](int64_t begin, int64_t end) {
    const auto lines = scratch<BFloat16>(layout.lines() * kLine);
    const auto z = scratch<float>(output.images * output.band_rows * conv.ow * width);
    const auto spare = scratch<float>(kTilePositions * 16);
    Tiles tiles;
    int64_t gathered = -1;
    for (int64_t item = begin; item < end; ++item) {
      const Band band = output.band_at(item / parts_per_band);
      if (gathered != item / parts_per_band) layout.gather(x, band, lines.get());
      gathered = item / parts_per_band;
      const auto& positions = band.last_row - band.first_row == output.band_rows ? whole : last;
      const int64_t first_block = item % parts_per_band * together;
      for (int64_t block = first_block; block < std::min(output.blocks(), first_block + together); ++block) {
        for (int64_t phase = 0; phase < phases; ++phase)
          multiply_phase<Tiles, parts, width>(tiles, layout, positions[phase], terms[phase], lines.get(),
                                              packed + block * how.block_size(), part_weights, z.get(), spare.get());
        output.finish_band(block, band, z.get());
      }
    }
  });
}

}  // namespace fastgen::cpu::FASTGEN_ISA
