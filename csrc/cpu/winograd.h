// Convolutions by Winograd's algorithm. A convolution whose kernel is r times its stride consists of r-tap convolutions
// of stride 1, one per phase of the stride (their sum, if it is not transposed). With a smaller kernel some phases have
// fewer taps, and need no products at some points. Included once per instruction set (see isa.h), after axis.h,
// epilogue.h and winograd_transform.h. Everything is computed in the accumulation type A.
namespace fastgen::cpu::FASTGEN_ISA {

// out[row][width] (+)= sum over depth i of v[i / size][row][i % size] * u[i][width], for `height` rows that stay in
// registers.
template <class A, int vectors, int height>
void product(const A* v, int64_t step, const A* u, int64_t groups, A* out, bool accumulate) {
  using V = typename Vector<A>::type;
  constexpr int64_t size = Vector<A>::size, width = vectors * size;
  V sum[height][vectors] = {};
  for (; groups; --groups, v += step)
    for (int64_t i = 0; i < size; ++i, u += width) {
      V b[vectors];
#pragma GCC unroll 4
      for (int k = 0; k < vectors; ++k) b[k] = *reinterpret_cast<const V*>(u + k * size);
#pragma GCC unroll 16
      for (int p = 0; p < height; ++p) {
        const A value = v[p * size + i];
#pragma GCC unroll 4
        for (int k = 0; k < vectors; ++k) sum[p][k] += b[k] * value;
      }
    }
#pragma GCC unroll 16
  for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
    for (int k = 0; k < vectors; ++k) {
      V* const to = reinterpret_cast<V*>(out + p * width + k * size);
      *to =
          accumulate ? *to + sum[p][k] : sum[p][k];  // each part of the depth has its own sum: smaller rounding errors
    }
}

// A convolution of (n, ih, iw, ic) pixels, by tiles of m x m outputs, in blocks of `vectors` vectors of output
// channels.
template <class A, int m, int r, int vectors>
struct Winograd {
  static constexpr int n = m + r - 1, points = n * n;
  static constexpr int64_t size = Vector<A>::size, width = vectors * size;
  // What stays in the second-level cache: this many bytes of transformed input, and transformed weights of this many
  // vectors of depth.
  static constexpr int64_t kBudget = 192 << 10;
  static constexpr int64_t kGroups = 128 / size;

  int64_t ic, ih, iw, oc;
  WinogradAxis rows, columns;
  // true: the packed weights are the taps, and each band transforms them; transformed weights are n * n / (r * r) times
  // as large. false: the packed weights are transformed, for weights that are used often and stay in the cache.
  bool expand;

  int64_t blocks() const { return ceil_div(oc, width); }
  int64_t input_phases() const { return rows.in_step * columns.in_step; }
  int64_t output_phases() const { return rows.out_step * columns.out_step; }
  int64_t groups() const { return input_phases() * ceil_div(ic, size); }     // vectors of depth
  int64_t tiles_across() const { return ceil_div(columns.positions(), m); }  // tiles
  // Either the output's phase or the input's is always 0.
  int64_t row_phase(int64_t phase, int64_t sum) const {
    return std::max(phase / columns.out_step, sum / columns.in_step);
  }
  int64_t column_phase(int64_t phase, int64_t sum) const {
    return std::max(phase % columns.out_step, sum % columns.in_step);
  }
  int64_t tiles_per_image(int64_t first_row, int64_t last_row) const {
    return ceil_div(last_row - first_row, rows.out_step * m) * tiles_across();
  }
  // The number of tiles within the budget. Up to 1.5 times as many are still processed at once, because a small
  // remainder would read all weights again.
  int64_t chunk() const {
    return std::clamp<int64_t>(kBudget / (points * groups() * size * sizeof(A)) / kPixels, 1, 8) * kPixels;
  }
  int64_t max_tiles() const { return chunk() / 2 * 3; }
  int64_t tiles_at_once(int64_t tiles) const { return expand || tiles <= max_tiles() ? tiles : chunk(); }
  // The stride between points. + 1: at a multiple of 4 KiB all points would map to the same cache set.
  static constexpr int64_t weight_step(int64_t groups) { return (groups * width + 1) * size; }
  int64_t point_step(int64_t tiles) const { return (groups() * tiles + 1) * size; }
  int64_t transform_size(int64_t tiles) const { return points * point_step(tiles); }
  int64_t edge_size() const { return ic + points * size; }
  int64_t scratch_size(int64_t tiles) const {
    const int64_t at_once = expand ? tiles : std::min(tiles, max_tiles());  // of any band with at most `tiles`
    return transform_size(at_once) + points * (at_once * width + (expand ? weight_step(kGroups) : 0)) + width +
           edge_size();
  }
  int64_t parts() const { return ceil_div(groups(), kGroups); }
  int64_t packed_at(int64_t block, int64_t part) const {
    return (block * (groups() * width + parts()) + part * (kGroups * width + 1)) * size * (expand ? r * r : points);
  }
  int64_t packed_size() const { return packed_at(output_phases() * blocks(), 0); }

  // packed is (output phase, block, part of the depth, point or tap, depth, width), zero beyond ic and oc. stride: the
  // strides of an input channel, an output channel, kh and kw.
  template <class T>
  void pack(const T* weight, const int64_t* stride, A* packed, const ParallelFor& parallel) const {
    constexpr int64_t taps = r * r;
    parallel(output_phases() * blocks() * parts(), [&](int64_t begin, int64_t end) {
      auto raw = scratch<A>(taps * weight_step(kGroups));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item % parts(), block = item / parts() % blocks();
        const int64_t phase = item / parts() / blocks(), first = part * kGroups;
        const int64_t count = std::min(kGroups, groups() - first), valid = std::min(width, oc - block * width);
        A* const at = packed + packed_at(phase * blocks() + block, part);
        A* const to = expand ? at : raw.get();
        const int64_t phase_groups = ceil_div(ic, size);
        const auto tap_at = [&](int64_t tap, int64_t group) -> const T* {
          const int64_t sum = group / phase_groups, kh = rows.tap[row_phase(phase, sum)][tap / r],
                        kw = columns.tap[column_phase(phase, sum)][tap % r];
          if (kh < 0 || kw < 0) return nullptr;
          return weight + group % phase_groups * size * stride[0] + block * width * stride[1] + kh * stride[2] +
                 kw * stride[3];
        };
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t group = first; group < first + count; ++group) {
            const int64_t depth = std::min(size, ic - group % phase_groups * size);
            // The next tap is elsewhere in memory: prefetch it while this one is copied.
            if (const T* const next = tap + 1 < taps ? tap_at(tap + 1, group) : nullptr) {
              if (stride[0] == 1)
                for (int64_t k = 0; k < valid; ++k) __builtin_prefetch(next + k * stride[1]);
              else
                for (int64_t i = 0; i < depth; ++i)
                  for (int64_t k = 0; k < valid; k += size) __builtin_prefetch(next + i * stride[0] + k * stride[1]);
            }
            A* const copy = to + tap * weight_step(count) + (group - first) * size * width;
            if (const T* const from = tap_at(tap, group))
              copy_taps(from, stride[0], stride[1], depth, valid, size, width, copy);
            else std::fill_n(copy, size * width, A(0));
          }
        if (!expand) transform_weights(to, count, at);
      }
    });
  }

  static void transform_weights(const A* raw, int64_t count, A* u) {
    const A* from[r * r];
    A* to[points];
    for (int tap = 0; tap < r * r; ++tap) from[tap] = raw + tap * weight_step(count);
    for (int point = 0; point < points; ++point) to[point] = u + point * weight_step(count);
    for (int64_t i = 0; i < count * size * width; i += size)
      transform_tile<A, m, r, &WinogradMatrices<m, r>::weight>(from, i, to, i);
  }

  // Computes the band (block, image, row, column, width), whose first row is a multiple of out_step * m. All blocks use
  // the same transformed input. transformed: the band's transformed input, or null if it is yet to be computed. memory:
  // scratch_size(tiles of the band).
  template <class S>
  void multiply(const S* x, const A* transformed, const A* packed, int64_t first_block, int64_t last_block,
                const Band& band, A* out, A* memory) const {
    const int64_t per_image = tiles_per_image(band.first_row, band.last_row),
                  tiles = (band.last_image - band.first_image) * per_image, at_once = tiles_at_once(tiles),
                  pixels_per_image = (band.last_row - band.first_row) * columns.out,
                  pixels = (band.last_image - band.first_image) * pixels_per_image;
    A* const products = memory + transform_size(at_once);
    A* const spare = products + points * at_once * width;
    A* const edge = spare + width;
    A* const u = edge + edge_size();
    const int64_t chunks = ceil_div(tiles, at_once);
    const bool same_input =
        rows.phases_read_the_same() && columns.phases_read_the_same();  // they use the same transformed input
    for (int64_t item = 0; item < output_phases() * chunks; ++item) {
      const int64_t phase = same_input ? item % output_phases() : item / chunks,
                    first = (same_input ? item / output_phases() : item % chunks) * at_once;
      const int64_t count = std::min(at_once, tiles - first);
      if (!transformed && (!same_input || phase == 0))
        transform_tiles(x, phase, band, first, count, 0, count, edge, memory);
      const A* const v = transformed ? transformed : memory;
      for (int64_t block = first_block; block < last_block; ++block) {
        for (int64_t part = 0; part < parts(); ++part) {
          const int64_t depth = std::min(kGroups, groups() - part * kGroups);
          const A* at = packed + packed_at(phase * blocks() + block, part);
          if (expand) transform_weights(at, depth, u), at = u;
          for (int point = 0; point < points; ++point)
            multiply_point(v + point * point_step(count), count, phase, point, at + point * weight_step(depth),
                           part * kGroups, depth, products + point * count * width);
        }
        for (int64_t t = 0; t < count; ++t)
          transform_output(products + t * width, count * width, phase, band,
                           (first + t) % per_image / tiles_across() * m, (first + t) % tiles_across() * m, spare,
                           out + ((block - first_block) * pixels + (first + t) / per_image * pixels_per_image) * width);
      }
    }
  }

  // Of the band's `count` tiles from `first` on, transforms those in [begin, end) to (point, group of channels, tile,
  // size). memory: edge_size.
  template <class S>
  void transform_tiles(const S* x, int64_t phase, const Band& band, int64_t first, int64_t count, int64_t begin,
                       int64_t end, A* memory, A* v) const {
    const int64_t per_image = tiles_per_image(band.first_row, band.last_row);
    S* const zeros = reinterpret_cast<S*>(memory);
    S* const edge = zeros + ic;
    std::fill_n(zeros, ic, S{});
    const S* from[points];
    A* to[points];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t tile = (first + t) % per_image, top = band.first_row / rows.out_step + tile / tiles_across() * m,
                    left = tile % tiles_across() * m;
      const S* const image = x + (band.first_image + (first + t) / per_image) * ih * iw * ic;
      for (int64_t sum = 0; sum < input_phases(); ++sum) {
        const auto &row = rows.source[row_phase(phase, sum)], &column = columns.source[column_phase(phase, sum)];
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < n; ++j) {
            const int64_t y = row[top + i], at = column[left + j];
            from[i * n + j] = y < 0 || at < 0 ? zeros : image + (y * iw + at) * ic;
            to[i * n + j] = v + (i * n + j) * point_step(count) + (sum * ceil_div(ic, size) * count + t) * size;
          }
        transform_channels<A, m, r, &WinogradMatrices<m, r>::input>(from, ic, edge, to, count * size);
      }
    }
  }

  // The products of one point over `depth` vectors from `first` on, except those whose weights are zero. Every phase of
  // the input has at least the points of the first phase.
  void multiply_point(const A* v, int64_t tiles, int64_t phase, int point, const A* u, int64_t first, int64_t depth,
                      A* out) const {
    const int64_t phase_groups = ceil_div(ic, size), last = first + depth;
    const auto has_zero_weights = [&](int64_t group) {
      return !rows.has(row_phase(phase, group / phase_groups), point / n, n) ||
             !columns.has(column_phase(phase, group / phase_groups), point % n, n);
    };
    if (input_phases() == 1 && has_zero_weights(0)) return void(first ? out : std::fill_n(out, tiles * width, A(0)));
    for (int64_t begin = first, end; begin < last; begin = end) {
      const bool is_zero = has_zero_weights(begin);
      for (end = begin; end < last && has_zero_weights(end) == is_zero;)
        end = std::min(last, (end / phase_groups + 1) * phase_groups);
      if (!is_zero)
        multiply_tiles(v + begin * tiles * size, tiles, u + (begin - first) * size * width, end - begin, out,
                       begin > 0);
    }
  }

  static void multiply_tiles(const A* v, int64_t tiles, const A* u, int64_t depth, A* out, bool accumulate) {
    constexpr int large = kPixels, medium = kPixels / 3 * 2, small = kPixels / 3;
    int64_t t = 0;
    for (; t + large <= tiles; t += large)
      product<A, vectors, large>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
    for (; t + medium <= tiles; t += medium)
      product<A, vectors, medium>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
    for (; t + small <= tiles; t += small)
      product<A, vectors, small>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
    for (; t < tiles; ++t) product<A, vectors, 1>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
  }

  // Writes the pixels of one tile in one block of channels; the tile is `down` positions below the band's first row.
  // Pixels outside the band go to `spare`.
  void transform_output(const A* products, int64_t step, int64_t phase, const Band& band, int64_t down, int64_t left,
                        A* spare, A* out) const {
    const A* from[points];
    A* to[m * m];
    for (int point = 0; point < points; ++point) from[point] = products + point * step;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < m; ++j) {
        const int64_t y = (down + i) * rows.out_step + phase / columns.out_step,
                      x = (left + j) * columns.out_step + phase % columns.out_step;
        to[i * m + j] =
            y < band.last_row - band.first_row && x < columns.out ? out + (y * columns.out + x) * width : spare;
      }
    for (int64_t k = 0; k < width; k += size) transform_tile<A, m, r, &WinogradMatrices<m, r>::output>(from, k, to, k);
  }
};

// The outer loop is over bands and the inner over blocks, so that the blocks of a band share its transformed input.
template <bool dot, class T, int vectors, int m, int r>
void run(Output<T, vectors>& output, const Winograd<float, m, r, vectors>& winograd, const float* x,
         const float* packed, const ParallelFor& parallel) {
  using A = float;
  constexpr int64_t width = Output<T, vectors>::width;
  const Geometry& conv = output.conv;
  const Epilogue& epilogue = output.epilogue;
  const int64_t unit = m * winograd.rows.out_step, pixels_per_band = winograd.expand ? 8192 : 48 * unit * unit;
  int64_t units = std::max<int64_t>(1, pixels_per_band / (conv.ow * unit)),
          images = std::clamp<int64_t>(pixels_per_band / epilogue.s, 1, epilogue.n);
  if (!winograd.expand) {
    // A band is a part of one image, or several images, sized so that all threads finish at about the same time; it has
    // at least 16 tiles.
    const auto limit = [](int64_t& size, int64_t share, int64_t tiles) {
      size = std::min(size, std::max(share, ceil_div(16, tiles)));
    };
    limit(units, ceil_div(epilogue.n * ceil_div(conv.oh, unit), 8 * parallel.threads), winograd.tiles_across());
    const int64_t images_per_thread = ceil_div(ceil_div(epilogue.n, images), parallel.threads);
    limit(images, ceil_div(epilogue.n, images_per_thread * parallel.threads), winograd.tiles_per_image(0, conv.oh));
  }
  output.set_band(images, units * unit);
  const int64_t bands = ceil_div(epilogue.n, output.images) * output.bands_per_image(),
                tiles = output.images * winograd.tiles_per_image(0, output.band_rows);
  const int64_t items =
      parallel.threads > 1 ? 2 * parallel.threads : 1;  // at least this many, if there are enough blocks
  const int64_t blocks_per_item = ceil_div(output.blocks(), ceil_div(items, bands)),
                parts_per_band = ceil_div(output.blocks(), blocks_per_item);
  const int64_t band_size = ceil_div(output.images * output.band_rows * conv.ow * width, 16) * 16;
  // A single band has all tiles at once: threads share the work of transforming them.
  const bool shared = bands == 1 && winograd.expand && winograd.output_phases() == 1;
  const auto transformed = shared ? scratch<A>(winograd.transform_size(tiles)) : nullptr;
  if (shared)
    parallel(tiles, [&](int64_t begin, int64_t end) {
      A* const memory = thread_scratch<A>(winograd.edge_size());
      winograd.transform_tiles(x, 0, Band{0, epilogue.n, 0, conv.oh}, 0, tiles, begin, end, memory, transformed.get());
    });
  parallel(bands * parts_per_band, [&](int64_t begin, int64_t end) {
    A* const memory = thread_scratch<A>(blocks_per_item * band_size + winograd.scratch_size(tiles));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first_block = item % parts_per_band * blocks_per_item,
                    last_block = std::min(output.blocks(), first_block + blocks_per_item);
      const Band band = output.band_at(item / parts_per_band);
      winograd.multiply(x, transformed.get(), packed, first_block, last_block, band, memory,
                        memory + blocks_per_item * band_size);
      A* z = memory;
      for (int64_t block = first_block; block < last_block; ++block) z = output.finish_band(block, band, z);
    }
  });
}

}  // namespace fastgen::cpu::FASTGEN_ISA
