// Convolutions as matrix products whose rows are gathered through pointers: no column matrix is ever written.
// Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

// How the output positions of one axis read the input: position o, tap k -> source[o * taps + k], -1 outside. Positions
// that the same taps reach form a class: one a residue of the stride when transposed, and on a short axis the positions
// at the border apart from the rest, so that no tap is multiplied with zeros.
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

  // i = o * stride - padding + k * dilation, mirrored at both ends when the padding reflects
  static Axis strided(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                      bool reflect) {
    Axis axis{kernel, std::vector<int64_t>(static_cast<size_t>(out * kernel), -1), {}};
    for (int64_t o = 0; o < out; ++o) {
      std::vector<int64_t> reached, inside;
      for (int64_t k = 0; k < kernel; ++k) {
        int64_t i = o * stride - padding + k * dilation;
        if (reflect) i = i < 0 ? -i : i >= in ? 2 * (in - 1) - i : i;
        reached.push_back(k);
        if (i < 0 || i >= in) continue;
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

// A band: some rows of one image, or all rows of several small images; about kBandPixels output pixels, a unit of work.
constexpr int64_t kBandPixels = 1024, kItems = 8;

// joined: so many taps of a row of the kernel are read as one of so many times the channels, from rows that have `edge`
// pixels more at either end; for few channels, where the tiles of one tap are too short.
struct Direct {
  Axis rows, columns;
  int64_t joined = 1, edge = 0;
};

inline Axis axis_of(const Geometry& conv, int i) {
  const int64_t in = i ? conv.iw : conv.ih, out = i ? conv.ow : conv.oh, kernel = i ? conv.kw : conv.kh;
  return conv.transposed
             ? Axis::transposed(in, out, kernel, conv.stride[i], conv.padding[i], conv.dilation[i])
             : Axis::strided(in, out, kernel, conv.stride[i], conv.padding[i], conv.dilation[i], conv.reflect);
}

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

// y[oh][ow][c] = sum over kw of t[column(ow, kw)][kw * channels + c], t = sum over kh of x[row(oh, kh)] w[kh]: a
// product as wide as a row of the kernel, for as few output channels as an image has.
struct Rows {
  // Output positions ow, ow + ow_step, ... that read the input's iw, iw + iw_step, ... by the tap kw.
  struct Run {
    int64_t kw, ow, ow_step, iw, iw_step, count;
  };
  Axis rows;
  int64_t taps, channels;
  std::vector<Run> runs;

  Rows(Axis rows_, const Axis& columns, int64_t channels_)
      : rows(std::move(rows_)), taps(columns.taps), channels(channels_) {
    for (int64_t kw = 0; kw < taps; ++kw) {
      Run run{kw, 0, 0, 0, 0, 0};
      for (int64_t ow = 0; ow < static_cast<int64_t>(columns.source.size()) / taps; ++ow) {
        const int64_t iw = columns.source[ow * taps + kw];
        if (iw < 0) continue;
        const int64_t last_ow = run.ow + (run.count - 1) * run.ow_step,
                      last_iw = run.iw + (run.count - 1) * run.iw_step;
        if (run.count == 1) run.ow_step = ow - last_ow, run.iw_step = iw - last_iw;
        if (run.count && ow - last_ow == run.ow_step && iw - last_iw == run.iw_step) {
          ++run.count;
          continue;
        }
        if (run.count) runs.push_back(run);
        run = {kw, ow, 0, iw, 0, 1};
      }
      if (run.count) runs.push_back(run);
    }
  }

  int64_t blocks(int64_t width) const { return ceil_div(taps * channels, width); }
};

// The weights as (kh, block, ic, width), a column kw * c + channel, zero beyond.
template <class T>
Buffer<Acc<T>> pack_rows(const Geometry& conv, int64_t width, const T* weight) {
  const int64_t blocks = ceil_div(conv.kw * conv.oc, width);
  const WeightStrides stride = weight_strides(conv);
  auto packed = scratch<Acc<T>>(conv.kh * blocks * conv.ic * width);
  std::fill_n(packed.get(), conv.kh * blocks * conv.ic * width, Acc<T>(0));
  for (int64_t kh = 0; kh < conv.kh; ++kh)
    for (int64_t i = 0; i < conv.ic; ++i)
      for (int64_t column = 0; column < conv.kw * conv.oc; ++column)
        packed[((kh * blocks + column / width) * conv.ic + i) * width + column % width] =
            load(weight + kh * stride.row + i * stride.depth + column / conv.oc * stride.column +
                 column % conv.oc * stride.channel);
  return packed;
}

// A convolution made ready for any number of images: how it is computed, and its weights packed for that.
template <class A, int vectors>
struct Packed {
  using Fast = std::variant<Direct, Rows, Winograd<float, 4, 2, vectors>, Winograd<float, 4, 3, vectors>>;
  std::conditional_t<std::is_same_v<A, float>, Fast, std::variant<Direct, Rows>> how;
  Buffer<A> weights;

  // x as `how` reads it.
  template <class T>
  Pixels<A> pixels(const Geometry& conv, int64_t n, const T* x, bool channels_last, const ParallelFor& parallel) const {
    auto plain = pixels_first<A>(x, n, conv.ic, conv.ih * conv.iw, channels_last, parallel);
    const Direct* const direct = std::get_if<Direct>(&how);
    if (!direct || direct->joined == 1) return plain;
    auto copy = with_edges(plain.get(), n * conv.ih, conv.iw, conv.ic, direct->edge, conv.reflect, parallel);
    return {copy.get(), std::move(copy)};
  }
};

// pixels: of the output, that the packed weights will serve.
template <class T, int vectors>
Packed<Acc<T>, vectors> pack(const Geometry& conv, Algorithm algorithm, int64_t pixels, const T* weight,
                             const ParallelFor& parallel) {
  using A = Acc<T>;
  constexpr int64_t width = vectors * Vector<A>::size;
  if constexpr (std::is_same_v<A, float>) {
    const auto winograd = [&](auto plan) {
      const WeightStrides s = weight_strides(conv);
      const int64_t strides[4] = {s.depth, s.channel, s.row, s.column};
      auto weights = scratch<A>(plan.packed_size());
      plan.pack(weight, strides, weights.get(), parallel);
      return Packed<A, vectors>{std::move(plan), std::move(weights)};
    };
    const auto axis = [&](int64_t in, int64_t size, int64_t kernel, int i) {
      return conv.transposed ? WinogradAxis::transposed(in, size, kernel, conv.stride[i], conv.padding[i])
                             : WinogradAxis::conv(in, size, kernel, conv.stride[i], conv.padding[i], conv.reflect);
    };
    const auto rows = [&] { return axis(conv.ih, conv.oh, conv.kh, 0); };
    const auto columns = [&] { return axis(conv.iw, conv.ow, conv.kw, 1); };
    const bool expand = transforms_in_bands(conv, pixels);
    if (algorithm == Algorithm::winograd_4x2)
      return winograd(Winograd<A, 4, 2, vectors>{conv.ic, conv.ih, conv.iw, conv.oc, rows(), columns(), expand});
    if (algorithm == Algorithm::winograd_4x3)
      return winograd(Winograd<A, 4, 3, vectors>{conv.ic, conv.ih, conv.iw, conv.oc, rows(), columns(), expand});
  }
  if (algorithm == Algorithm::rows)
    return {Rows(axis_of(conv, 0), axis_of(conv, 1), conv.oc), pack_rows(conv, width, weight)};
  return {direct(conv), pack_weights(conv, width, weight, parallel)};
}

// The work of one call, over blocks of `vectors` vectors of output channels. dot: a float of x and of the weights is a
// pair of bfloat16, and counts as one channel.
template <class T, int vectors, bool dot = false>
struct Call {
  using A = Acc<T>;
  static constexpr int64_t width = vectors * Vector<A>::size;
  const Geometry& conv;
  const Epilogue& op;
  const A* x;  // Packed::pixels
  const A* packed;
  const A* bias;
  const Affine<A>* affine;  // null: no normalisation in the epilogue
  const T* residual;        // added before the activation, or null
  T* pre;
  T* out;
  std::vector<Moments<double>>* parts;  // (n, bands an image, c), when statistics are asked for
  int64_t images, band_rows;            // of a band

  void set_band(int64_t images_, int64_t rows) {
    images = std::clamp<int64_t>(images_, 1, op.n);
    band_rows = std::clamp<int64_t>(rows, 1, conv.oh);
    if (parts) parts->resize(static_cast<size_t>(op.n * bands_an_image() * op.c));
  }
  int64_t bands_an_image() const { return ceil_div(conv.oh, band_rows); }
  Band band_at(int64_t index) const {
    const int64_t image = index / bands_an_image() * images, row = index % bands_an_image() * band_rows;
    return {image, std::min(op.n, image + images), row, std::min(conv.oh, row + band_rows)};
  }
  int64_t blocks() const { return ceil_div(op.c / conv.groups, width); }

  void run(const Direct& direct, const ParallelFor& parallel) {
    set_band(kBandPixels / op.s, kBandPixels / conv.ow);
    const int64_t others =
        conv.groups * blocks() * ceil_div(op.n, images);  // enough work for some threads, if rows are left
    set_band(images, std::min(band_rows, std::max<int64_t>(4, ceil_div(conv.oh, ceil_div(kItems, others)))));
    const int64_t bands = ceil_div(op.n, images) * bands_an_image(), band_size = images * band_rows * conv.ow * width;
    // Two blocks at once, if enough work is left for all threads.
    const int64_t together = conv.groups * blocks() * bands >= 4 * parallel.threads ? 2 : 1;
    const int64_t parts_a_group = ceil_div(blocks(), together);
    const std::vector<A> zeros(static_cast<size_t>(conv.ic / conv.groups * direct.joined), A(0));
    parallel(conv.groups * parts_a_group * bands, [&](int64_t begin, int64_t end) {
      A* const memory = thread_scratch<A>(together * band_size);
      const A** const sources = thread_scratch<const A*>(conv.kh * conv.kw * (kPixels + together) + conv.kh);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / bands / parts_a_group, in_group = item / bands % parts_a_group * together;
        const int64_t block = group * blocks() + in_group, count = std::min(together, blocks() - in_group);
        const Band band = band_at(item % bands);
        for (const Axis::Class& row : direct.rows.classes)
          for (const Axis::Class& column : direct.columns.classes)
            multiply(direct, block, count, band, row, column, zeros.data(), sources, memory, band_size);
        for (int64_t k = 0; k < count; ++k) finish(block + k, band, memory + k * band_size);
      }
    });
  }

  // The same by Winograd's algorithm: bands outside, blocks inside, so that the blocks of a band share its transformed
  // input.
  template <int m, int r>
  void run(const Winograd<A, m, r, vectors>& winograd, const ParallelFor& parallel) {
    const int64_t unit = m * winograd.rows.out_step, pixels_a_band = winograd.expand ? 8192 : 48 * unit * unit;
    int64_t units = std::max<int64_t>(1, pixels_a_band / (conv.ow * unit)),
            several = std::clamp<int64_t>(pixels_a_band / op.s, 1, op.n);
    if (!winograd.expand) {  // bands of units of an image, or of several images, such that threads finish together; of
                             // at least 16 tiles
      const auto limit = [](int64_t& size, int64_t fair, int64_t tiles) {
        size = std::min(size, std::max(fair, ceil_div(16, tiles)));
      };
      limit(units, ceil_div(op.n * ceil_div(conv.oh, unit), 8 * parallel.threads), winograd.across());
      const int64_t a_thread = ceil_div(ceil_div(op.n, several), parallel.threads);
      limit(several, ceil_div(op.n, a_thread * parallel.threads), winograd.tiles_an_image(0, conv.oh));
    }
    set_band(several, units * unit);
    const int64_t bands = ceil_div(op.n, images) * bands_an_image(),
                  tiles = images * winograd.tiles_an_image(0, band_rows);
    const int64_t items = parallel.threads > 1 ? 2 * parallel.threads : 1;  // at least, if there are enough blocks
    const int64_t together = ceil_div(blocks(), ceil_div(items, bands)), parts_a_band = ceil_div(blocks(), together);
    const int64_t band_size = ceil_div(images * band_rows * conv.ow * width, 16) * 16;
    // A band alone has all its tiles at once: threads share the work of transforming them.
    const bool shared = bands == 1 && winograd.expand && winograd.outputs() == 1;
    const auto transformed = shared ? scratch<A>(winograd.transform_size(tiles)) : nullptr;
    if (shared)
      parallel(tiles, [&](int64_t begin, int64_t end) {
        A* const memory = thread_scratch<A>(winograd.edge_size());
        winograd.transform_tiles(x, 0, Band{0, op.n, 0, conv.oh}, 0, tiles, begin, end, memory, transformed.get());
      });
    parallel(bands * parts_a_band, [&](int64_t begin, int64_t end) {
      A* const memory = thread_scratch<A>(together * band_size + winograd.scratch_size(tiles));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first_block = item % parts_a_band * together,
                      last_block = std::min(blocks(), first_block + together);
        const Band band = band_at(item / parts_a_band);
        winograd.multiply(x, transformed.get(), packed, first_block, last_block, band, memory,
                          memory + together * band_size);
        A* z = memory;
        for (int64_t block = first_block; block < last_block; ++block) z = finish(block, band, z);
      }
    });
  }

  void run(const Rows& plan, const ParallelFor& parallel) {
    const int64_t columns = plan.blocks(width) * width;
    parallel(op.n * conv.oh, [&](int64_t begin, int64_t end) {
      A* const t = thread_scratch<A>(conv.iw * columns + op.c * conv.ow);
      A* const z = t + conv.iw * columns;  // (c, ow)
      const A** const weights = thread_scratch<const A*>(conv.kh * (kPixels + 1));
      const A** const sources = weights + conv.kh;
      A* to[kPixels];
      for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / conv.oh, oh = item % conv.oh;
        for (int64_t block = 0; block < plan.blocks(width); ++block)
          for (int64_t iw = 0; iw < conv.iw; iw += kPixels) {
            const int64_t height = std::min<int64_t>(kPixels, conv.iw - iw);
            int64_t taps = 0;
            for (int64_t kh = 0; kh < conv.kh; ++kh) {
              const int64_t ih = plan.rows.source[oh * conv.kh + kh];
              if (ih < 0) continue;
              for (int64_t p = 0; p < height; ++p)
                sources[taps * kPixels + p] = x + ((image * conv.ih + ih) * conv.iw + iw + p) * conv.ic;
              weights[taps++] = packed + (kh * plan.blocks(width) + block) * conv.ic * width;
            }
            for (int64_t p = 0; p < height; ++p) to[p] = t + (iw + p) * columns + block * width;
            kTiles<A, vectors, dot>[height - 1](sources, weights, taps, conv.ic, to);
          }
        for (int64_t channel = 0; channel < op.c; ++channel)
          std::fill_n(z + channel * conv.ow, conv.ow, bias ? bias[channel] : A(0));
        for (const Rows::Run& run : plan.runs)
          for (int64_t channel = 0; channel < op.c; ++channel) {
            A* to = z + channel * conv.ow + run.ow;
            const A* from = t + run.iw * columns + run.kw * op.c + channel;
            for (int64_t i = 0; i < run.count; ++i) to[i * run.ow_step] += from[i * run.iw_step * columns];
          }
        if (pre) put_row(z, pre, image, oh);
        if (!out) continue;
        for (int64_t channel = 0; channel < op.c; ++channel)
          for (int64_t ow = 0; ow < conv.ow; ++ow) {
            A& value = z[channel * conv.ow + ow];
            if (affine) value = (value - affine->center[channel]) * affine->scale[channel] + affine->shift[channel];
            if (residual) value += load(residual + at(image, channel, oh * conv.ow + ow));
          }
        activate_block(op.activation, z, op.c * conv.ow, static_cast<A>(op.negative_slope));
        put_row(z, out, image, oh);
      }
    });
  }

  int64_t at(int64_t image, int64_t channel, int64_t pixel) const {
    return op.channels_last ? (image * op.s + pixel) * op.c + channel : (image * op.c + channel) * op.s + pixel;
  }

  void put_row(const A* z, T* tensor, int64_t image, int64_t oh) const {
    for (int64_t channel = 0; channel < op.c; ++channel)
      for (int64_t ow = 0; ow < conv.ow; ++ow)
        store(tensor + at(image, channel, oh * conv.ow + ow), z[channel * conv.ow + ow]);
  }

  // The band's pixels of one class of rows and columns, kPixels at a time, in `count` blocks: one, or two that lie
  // band_size apart.
  void multiply(const Direct& direct, int64_t block, int64_t count, const Band& band, const Axis::Class& row,
                const Axis::Class& column, const A* zeros, const A** pointers, A* z, int64_t band_size) const {
    const int64_t channels = conv.ic / conv.groups, depth = channels * direct.joined, group = block / blocks();
    const int64_t down = row.taps.size(), beside = column.taps.size(), taps = down * beside, pixel = conv.ic,
                  kernel = conv.kw / direct.joined, across = conv.iw + 2 * direct.edge;
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
      if (count == 2 &&
          filled <= kPixels / 2)  // a small one of one block leaves registers, and the units that multiply, idle
        kTiles<A, vectors, dot, 2>[filled - 1](sources, weights, taps, depth, to);
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
        for (int64_t i = 0; i < down; ++i) {
          const int64_t ih = direct.rows.source[oh * conv.kh + row.taps[i]];
          lines[i] = ih < 0 ? nullptr : x + (image * conv.ih + ih) * across * pixel + group * channels;
        }
        A* const line =
            z + ((image - band.first_image) * (band.last_row - band.first_row) + oh - band.first_row) * conv.ow * width;
        for (const int64_t ow : column.positions) {
          const int64_t* const columns = direct.columns.source.data() + ow * kernel;
          const A** source = sources + filled;
          for (int64_t i = 0; i < down; ++i)
            for (int64_t j = 0; j < beside; ++j, source += kPixels) {
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

  // The band's images of one block of channels, from z on; returns where the next block's are if they follow.
  A* finish(int64_t block, const Band& band, A* z) const {
    for (int64_t image = band.first_image; image < band.last_image;
         ++image, z += (band.last_row - band.first_row) * conv.ow * width)
      finish(block, image, band.first_row, band.last_row, z);
    return z;
  }

  // Bias, statistics or normalisation + activation, and the store, for one block of channels of some rows of one image.
  void finish(int64_t block, int64_t image, int64_t first_row, int64_t last_row, A* z) const {
    const int64_t group = block / blocks(), first = group * (op.c / conv.groups) + block % blocks() * width;
    const int64_t valid = std::min(width, (group + 1) * (op.c / conv.groups) - first),
                  pixels = (last_row - first_row) * conv.ow;
    A shift[width] = {};
    if (bias) std::copy_n(bias + first, valid, shift);
    if (out && op.channels_last && valid == width && !pre && !affine && !residual) {
      T* const to = out + at(image, first, first_row * conv.ow);
      with_activation(op.activation, [&](auto known) {
        put_activated<known.value>(z, pixels, shift, static_cast<A>(op.negative_slope), to, op.c);
      });
      return;
    }
    if (parts) {
      if (bias) each(z, pixels, [&](A value, int64_t k) { return value + shift[k]; });
      Moments<double> moments[width];
      column_moments(z, pixels, width, moments);
      std::copy_n(moments, valid, parts->data() + (image * bands_an_image() + first_row / band_rows) * op.c + first);
    }
    A center[width] = {}, scale[width] = {}, offset[width] = {};
    if (affine) {
      std::copy_n(affine->center.get() + first, valid, center);
      std::copy_n(affine->scale.get() + first, valid, scale);
      std::copy_n(affine->shift.get() + first, valid, offset);
    }
    for (int64_t start = 0; start < pixels;
         start += kChunk) {  // which stays in the first-level cache through all that follows
      A* const chunk = z + start * width;
      const int64_t count = std::min(kChunk, pixels - start), pixel = first_row * conv.ow + start;
      if (bias && !parts) each(chunk, count, [&](A value, int64_t k) { return value + shift[k]; });
      if (pre) put(chunk, pre, image, pixel, count, first, valid);
      if (!out) continue;
      if (affine) each(chunk, count, [&](A value, int64_t k) { return (value - center[k]) * scale[k] + offset[k]; });
      if (residual)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = 0; k < valid; ++k) chunk[i * width + k] += load(residual + at(image, first + k, pixel + i));
      activate_block(op.activation, chunk, count * width, static_cast<A>(op.negative_slope));
      put(chunk, out, image, pixel, count, first, valid);
    }
  }

  template <Activation act>
  static void put_activated(const A* z, int64_t pixels, const A* shift, A slope, T* __restrict to, int64_t step) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel, z += width, to += step)
      for (int64_t k = 0; k < width; ++k) store(to + k, activate<act>(z[k] + shift[k], slope));
  }

  static constexpr int64_t kChunk = 64;  // pixels

  template <class F>
  static void each(A* z, int64_t pixels, const F& changed) {  // a constant trip count: SIMD code
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t k = 0; k < width; ++k) z[pixel * width + k] = changed(z[pixel * width + k], k);
  }

  // The pixels z of the block of channels at `first`, to a tensor of the output's order.
  void put(const A* z, T* tensor, int64_t image, int64_t pixel, int64_t pixels, int64_t first, int64_t valid) const {
    if (!op.channels_last) {
      for (int64_t channel = 0; channel < valid; ++channel)
        for (int64_t i = 0; i < pixels; ++i)
          store(tensor + at(image, first + channel, pixel + i), z[i * width + channel]);
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      T* const to = tensor + at(image, first, pixel + i);
      if (valid < width) store_block(to, z + i * width, valid);
      else if constexpr (std::is_same_v<T, A>)
        memcpy(to, z + i * width, width * sizeof(A));  // of a constant size: a few moves
      else store_block(to, z + i * width, width);
    }
  }
};

// The convolution by packed weights, with what follows it.
template <class T, int vectors, bool dot = false>
void run_packed(const Packed<Acc<T>, vectors>& how, const Geometry& conv, const Epilogue& op, const Acc<T>* pixels,
                T* pre, T* out, const ParallelFor& parallel) {
  using A = Acc<T>;
  const bool later =
      op.normalize && op.batch_stats;  // the statistics come with the convolution, the rest is a pass over its output
  T* const sum = later && !pre ? out : pre;
  std::vector<Moments<double>> parts;
  const auto affine = op.normalize && !later ? std::make_unique<Affine<A>>(op) : nullptr;
  Call<T, vectors, dot> call{conv,
                             op,
                             pixels,
                             how.weights.get(),
                             static_cast<const A*>(op.bias),
                             affine.get(),
                             later ? nullptr : static_cast<const T*>(op.residual),
                             sum,
                             later ? nullptr : out,
                             later ? &parts : nullptr,
                             0,
                             0};
  std::visit([&](const auto& algorithm) { call.run(algorithm, parallel); }, how.how);
  if (!later) return;
  merge_moments(op, parts, call.bands_an_image(), op.mean, op.var);
  norm_act_apply(op, sum, out, parallel);
}

#if FASTGEN_HAS_DOT
template <int vectors>
void convolve_in_pairs(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
                       const ParallelFor& parallel) {
  const auto pixels = pixels_first<BFloat16>(static_cast<const BFloat16*>(tensors.x), op.n, conv.ic, conv.ih * conv.iw,
                                             conv.x_channels_last, parallel);
  Geometry pairs = conv;
  pairs.ic /= 2;
  const Packed<float, vectors> packed{
      direct(pairs),
      pack_weights<true>(conv, vectors * Vector<float>::size, static_cast<const BFloat16*>(tensors.weight), parallel)};
  const auto ready = packed.pixels(pairs, op.n, reinterpret_cast<const float*>(pixels.get()), true, parallel);
  run_packed<BFloat16, vectors, true>(packed, pairs, op, ready.get(), static_cast<BFloat16*>(tensors.pre),
                                      static_cast<BFloat16*>(tensors.out), parallel);
}
#endif

template <class T, int vectors>
void convolve(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
              const ParallelFor& parallel) {
  const auto packed =
      pack<T, vectors>(conv, choose(conv, op), op.n * op.s, static_cast<const T*>(tensors.weight), parallel);
  const auto pixels = packed.pixels(conv, op.n, static_cast<const T*>(tensors.x), conv.x_channels_last, parallel);
  run_packed<T, vectors>(packed, conv, op, pixels.get(), static_cast<T*>(tensors.pre), static_cast<T*>(tensors.out),
                         parallel);
}

// Whether one vector is wide enough for the output channels (of `rows`: for those of a row of taps).
template <class A>
bool is_narrow(const Geometry& conv, Algorithm algorithm) {
  const int64_t columns = algorithm == Algorithm::rows ? conv.kw * conv.oc : conv.oc / conv.groups;
  return columns <= Vector<A>::size;
}

template <class T>
void convolve_norm_act(const Geometry& conv, const Epilogue& op, const ConvolutionTensors& tensors,
                       const ParallelFor& parallel) {
#if FASTGEN_HAS_DOT
  if constexpr (std::is_same_v<T, BFloat16>)
    if (in_pairs(conv, op)) {
      const bool one = is_narrow<float>(conv, Algorithm::direct);
      return (one ? convolve_in_pairs<1> : convolve_in_pairs<2>)(conv, op, tensors, parallel);
    }
#endif
  const bool narrow = is_narrow<Acc<T>>(conv, choose(conv, op));
  (narrow ? convolve<T, 1> : convolve<T, 2>)(conv, op, tensors, parallel);
}

}  // namespace fastgen::cpu::FASTGEN_ISA
