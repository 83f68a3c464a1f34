// Convolutions as matrix products whose rows are gathered through pointers: no column matrix is ever written.
// Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

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

  // i = o * stride - padding + k * dilation, mirrored at both ends when the padding reflects
  static Axis strided(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool reflect) {
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

// A tensor as a kernel reads it: the caller's, or a copy.
template <class S>
struct Pixels {
  const S* x;
  std::unique_ptr<S[]> copy;
  const S* get() const { return x; }
};

// x (n, c, s) of any order as (n, s, c) of the type S: itself where it is that already.
template <class S, class T>
Pixels<S> pixels_first(const T* x, int64_t n, int64_t c, int64_t s, bool channels_last, const ParallelFor& parallel) {
  if constexpr (std::is_same_v<T, S>)
    if (channels_last) return {x, nullptr};
  auto copy = scratch<S>(n * c * s);
  S* out = copy.get();
  const auto convert = [](const T* value) -> S {
    if constexpr (std::is_same_v<T, S>)
      return *value;
    else
      return load(value);
  };
  parallel(n * ceil_div(s, 16), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t sample = block / ceil_div(s, 16), first = (block % ceil_div(s, 16)) * 16, last = std::min(s, first + 16);
      const int64_t base = sample * c * s;
      if (channels_last)
        for (int64_t i = base + first * c; i < base + last * c; ++i) out[i] = convert(x + i);
      else
        for (int64_t channel = 0; channel < c; ++channel)
          for (int64_t pixel = first; pixel < last; ++pixel) out[base + pixel * c + channel] = convert(x + base + channel * s + pixel);
    }
  });
  return {out, std::move(copy)};
}

// A band: some rows of one image, or all rows of several small images; about kBandPixels output pixels, a unit of work.
constexpr int64_t kBandPixels = 1024;

// Where the weights of a group lie: from + ic * depth + oc * channel + kh * row + kw * column.
struct WeightStrides {
  int64_t group, depth, channel, row, column;
};

inline WeightStrides weight_strides(const Convolution& conv, int64_t c, bool transposed) {
  const int64_t* s = conv.weight_strides;
  if (transposed) return {conv.ic / conv.groups * s[0], s[0], s[1], s[2], s[3]};
  return {c / conv.groups * s[0], s[1], s[0], s[2], s[3]};
}

// The weights as (group, block, tap, ic / groups, width), zero where a block is wider than the group's channels.
template <class T>
std::unique_ptr<Acc<T>[]> pack_weights(const Convolution& conv, int64_t c, int64_t width, bool transposed, const T* weight,
                                       const ParallelFor& parallel) {
  const int64_t depth = conv.ic / conv.groups, channels = c / conv.groups, blocks = ceil_div(channels, width), taps = conv.kh * conv.kw;
  const WeightStrides stride = weight_strides(conv, c, transposed);
  auto packed = scratch<Acc<T>>(conv.groups * blocks * taps * depth * width);
  parallel(conv.groups * blocks * depth, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % depth, block = row / depth % blocks, group = row / depth / blocks;
      const int64_t valid = std::min(width, channels - block * width);
      const T* from = weight + group * stride.group + i * stride.depth + block * width * stride.channel;
      for (int64_t tap = 0; tap < taps; ++tap) {
        Acc<T>* to = packed.get() + (((group * blocks + block) * taps + tap) * depth + i) * width;
        const T* at = from + tap / conv.kw * stride.row + tap % conv.kw * stride.column;
        for (int64_t channel = 0; channel < width; ++channel) to[channel] = channel < valid ? load(at + channel * stride.channel) : Acc<T>(0);
      }
    }
  });
  return packed;
}

// The work of one call, over blocks of `vectors` vectors of output channels.
template <class T, int vectors>
struct Call {
  using A = Acc<T>;
  static constexpr int64_t width = vectors * Vector<A>::size;
  const Convolution& conv;
  const NormAct& op;
  const A* x;  // (n, ih, iw, ic)
  const A* packed;
  const A* bias;
  const Affine<A>* affine;  // null: no normalisation in the epilogue
  T* pre;
  T* out;
  std::vector<Moments<double>>* parts;  // (n, bands an image, c), when statistics are asked for
  Axis rows, columns;
  int64_t images, band_rows;  // of a band

  int64_t bands_an_image() const { return ceil_div(conv.oh, band_rows); }
  int64_t blocks() const { return ceil_div(op.c / conv.groups, width); }

  void run(const ParallelFor& parallel) const {
    const int64_t bands = ceil_div(op.n, images) * bands_an_image(), depth = conv.ic / conv.groups;
    std::vector<A> zeros(static_cast<size_t>(depth), A(0));
    parallel(conv.groups * blocks() * bands, [&](int64_t begin, int64_t end) {
      auto band = scratch<A>((images * band_rows * conv.ow + 1) * width);  // and one row for the pixels that fill up the last tile
      std::vector<const A*> sources(static_cast<size_t>(conv.kh * conv.kw * kPixels), zeros.data());
      for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item / bands, first_image = item % bands / bands_an_image() * images;
        const int64_t first_row = item % bands_an_image() * band_rows;
        const int64_t last_row = std::min(conv.oh, first_row + band_rows), last_image = std::min(op.n, first_image + images);
        for (const Axis::Class& row : rows.classes)
          for (const Axis::Class& column : columns.classes)
            multiply(block, first_image, last_image, first_row, last_row, row, column, zeros.data(), sources.data(), band.get());
        for (int64_t image = first_image; image < last_image; ++image)
          finish(block, image, first_row, last_row, band.get() + (image - first_image) * (last_row - first_row) * conv.ow * width);
      }
    });
  }

  // The same by Winograd's algorithm: bands outside, blocks inside, so that the blocks of a band share its transformed input.
  template <int m, int r>
  void run(const Winograd<A, m, r, vectors>& winograd, const ParallelFor& parallel) const {
    const int64_t bands = ceil_div(op.n, images) * bands_an_image();
    const int64_t items = parallel.threads > 1 ? 2 * parallel.threads : 1;  // at least, if there are enough blocks
    const int64_t together = ceil_div(blocks(), ceil_div(items, bands)), parts_a_band = ceil_div(blocks(), together);
    parallel(bands * parts_a_band, [&](int64_t begin, int64_t end) {
      const int64_t band_size = images * band_rows * conv.ow * width;
      auto band = scratch<A>(together * band_size);
      auto memory = scratch<A>(winograd.scratch_size(images * winograd.tiles_an_image(0, band_rows)));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t at = item / parts_a_band, first_block = item % parts_a_band * together, last_block = std::min(blocks(), first_block + together);
        const int64_t first_image = at / bands_an_image() * images, last_image = std::min(op.n, first_image + images);
        const int64_t first_row = at % bands_an_image() * band_rows, last_row = std::min(conv.oh, first_row + band_rows);
        winograd.multiply(x, packed, first_block, last_block, first_image, last_image, first_row, last_row, band.get(), memory.get());
        const A* z = band.get();
        for (int64_t block = first_block; block < last_block; ++block)
          for (int64_t image = first_image; image < last_image; ++image, z += (last_row - first_row) * conv.ow * width)
            finish(block, image, first_row, last_row, const_cast<A*>(z));
      }
    });
  }

  // The band's pixels of one class of rows and columns, kPixels at a time.
  void multiply(int64_t block, int64_t first_image, int64_t last_image, int64_t first_row, int64_t last_row, const Axis::Class& row,
                const Axis::Class& column, const A* zeros, const A** sources, A* band) const {
    const int64_t depth = conv.ic / conv.groups, group = block / blocks(), taps = row.taps.size() * column.taps.size();
    A* const spare = band + images * band_rows * conv.ow * width;
    std::vector<const A*> weights;
    for (int64_t kh : row.taps)
      for (int64_t kw : column.taps) weights.push_back(packed + (block * conv.kh * conv.kw + kh * conv.kw + kw) * depth * width);
    A* to[kPixels];
    int filled = 0;
    const auto first_oh = std::lower_bound(row.positions.begin(), row.positions.end(), first_row);
    const auto last_oh = std::lower_bound(first_oh, row.positions.end(), last_row);
    for (int64_t image = first_image; image < last_image; ++image)
      for (auto at = first_oh; at != last_oh; ++at)
        for (const int64_t ow : column.positions) {
          const int64_t oh = *at;
          const A** source = sources + filled;
          for (int64_t kh : row.taps) {
            const int64_t ih = rows.source[oh * conv.kh + kh];
            for (int64_t kw : column.taps) {
              const int64_t iw = columns.source[ow * conv.kw + kw];
              *source = ih < 0 || iw < 0 ? zeros : x + ((image * conv.ih + ih) * conv.iw + iw) * conv.ic + group * depth;
              source += kPixels;
            }
          }
          to[filled] = band + (((image - first_image) * (last_row - first_row) + oh - first_row) * conv.ow + ow) * width;
          if (++filled < kPixels) continue;
          tile<A, vectors>(sources, weights.data(), taps, depth, to);
          filled = 0;
        }
    if (!filled) return;
    for (; filled < kPixels; ++filled) {
      to[filled] = spare;
      for (int64_t tap = 0; tap < taps; ++tap) sources[tap * kPixels + filled] = zeros;
    }
    tile<A, vectors>(sources, weights.data(), taps, depth, to);
  }

  // Bias, statistics or normalisation + activation, and the store, for one block of channels of some rows of one image.
  void finish(int64_t block, int64_t image, int64_t first_row, int64_t last_row, A* z) const {
    const int64_t group = block / blocks(), first = group * (op.c / conv.groups) + block % blocks() * width;
    const int64_t valid = std::min(width, (group + 1) * (op.c / conv.groups) - first), pixels = (last_row - first_row) * conv.ow;
    if (bias)
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int64_t channel = 0; channel < valid; ++channel) z[pixel * width + channel] += bias[first + channel];
    if (parts) {
      Moments<double> moments[width];
      column_moments(z, pixels, width, moments);
      std::copy_n(moments, valid, parts->data() + (image * bands_an_image() + first_row / band_rows) * op.c + first);
    }
    if (pre) put(z, pre, image, first_row, pixels, first, valid);
    if (!out) return;
    if (affine)
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int64_t channel = 0; channel < valid; ++channel) {
          A& value = z[pixel * width + channel];
          value = (value - affine->center[first + channel]) * affine->scale[first + channel] + affine->shift[first + channel];
        }
    activate_block(op.activation, z, pixels * width, static_cast<A>(op.negative_slope));
    put(z, out, image, first_row, pixels, first, valid);
  }

  void put(const A* z, T* tensor, int64_t image, int64_t first_row, int64_t pixels, int64_t first, int64_t valid) const {
    const int64_t from = first_row * conv.ow;
    if (op.channels_last) {
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        store_block(tensor + (image * op.s + from + pixel) * op.c + first, z + pixel * width, valid);
      return;
    }
    for (int64_t start = 0; start < pixels; start += 64)
      for (int64_t channel = 0; channel < valid; ++channel)
        for (int64_t pixel = start; pixel < std::min(pixels, start + 64); ++pixel)
          store(tensor + (image * op.c + first + channel) * op.s + from + pixel, z[pixel * width + channel]);
  }
};

template <int m_, int r_>
struct WinogradSize {
  static constexpr int m = m_, r = r_;
};

template <class T, int vectors>
void convolve(const Convolution& conv, const NormAct& op, bool transposed, const ConvolutionTensors& tensors, const Affine<Acc<T>>* affine,
              T* pre, T* out, std::vector<Moments<double>>* parts, int64_t* chunks, const ParallelFor& parallel) {
  using A = Acc<T>;
  const auto pixels = pixels_first<A>(static_cast<const T*>(tensors.x), op.n, conv.ic, conv.ih * conv.iw, conv.x_channels_last, parallel);
  const T* weight = static_cast<const T*>(tensors.weight);
  Call<T, vectors> call{conv, op, pixels.get(), nullptr, static_cast<const A*>(tensors.bias), affine, pre, out, parts, {}, {}, 0, 0};
  const auto prepare = [&](int64_t images, int64_t rows) {
    call.images = std::clamp<int64_t>(images, 1, op.n);
    call.band_rows = std::clamp<int64_t>(rows, 1, conv.oh);
    *chunks = call.bands_an_image();
    if (parts) parts->resize(static_cast<size_t>(op.n * *chunks * op.c));
  };

  if constexpr (std::is_same_v<A, float>) {
    const auto winograd = [&](auto tile) {
      constexpr int m = decltype(tile)::m, r = decltype(tile)::r;
      const auto axis = [&](int64_t in, int64_t size, int64_t kernel, int i) {
        return transposed ? WinogradAxis::transposed(in, size, kernel, conv.stride[i], conv.padding[i])
                          : WinogradAxis::conv(in, size, kernel, conv.stride[i], conv.padding[i], conv.reflect);
      };
      const Winograd<A, m, r, vectors> plan{conv.ic, conv.ih, conv.iw, op.c, axis(conv.ih, conv.oh, conv.kh, 0),
                                            axis(conv.iw, conv.ow, conv.kw, 1), transforms_in_bands(conv, op.c)};
      const int64_t unit = m * (transposed ? conv.stride[0] : 1), pixels_a_band = plan.expand ? 8192 : 48 * unit * unit;
      prepare(pixels_a_band / op.s, std::max<int64_t>(1, pixels_a_band / (conv.ow * unit)) * unit);
      const auto packed = scratch<A>(plan.packed_size());
      const WeightStrides s = weight_strides(conv, op.c, transposed);
      const int64_t strides[4] = {s.depth, s.channel, s.row, s.column};
      plan.pack(weight, strides, packed.get(), parallel);
      call.packed = packed.get();
      call.run(plan, parallel);
    };
    switch (winograd_tile(conv, op)) {
      case WinogradTile::none: break;
      case WinogradTile::f4x2: return winograd(WinogradSize<4, 2>{});
      case WinogradTile::f4x3: return winograd(WinogradSize<4, 3>{});
    }
  }

  const auto packed = pack_weights<T>(conv, op.c, Call<T, vectors>::width, transposed, weight, parallel);
  const auto axis = [&](int64_t in, int64_t size, int64_t kernel, int i) {
    return transposed ? Axis::transposed(in, size, kernel, conv.stride[i], conv.padding[i], conv.dilation[i])
                      : Axis::strided(in, size, kernel, conv.stride[i], conv.padding[i], conv.dilation[i], conv.reflect);
  };
  prepare(kBandPixels / op.s, kBandPixels / conv.ow);
  call.packed = packed.get();
  call.rows = axis(conv.ih, conv.oh, conv.kh, 0);
  call.columns = axis(conv.iw, conv.ow, conv.kw, 1);
  call.run(parallel);
}

template <class T>
void convolve_norm_act(const Convolution& conv, const NormAct& op, bool transposed, const ConvolutionTensors& tensors,
                       const NormActTensors& given, const ParallelFor& parallel) {
  T* pre = static_cast<T*>(tensors.pre);
  T* out = static_cast<T*>(tensors.out);
  const bool narrow = op.c / conv.groups <= Vector<Acc<T>>::size;
  const auto run = narrow ? convolve<T, 1> : convolve<T, 2>;
  int64_t chunks;
  if (op.normalize && op.batch_stats) {  // the statistics come with the convolution, the rest is a pass over its output
    std::vector<Moments<double>> parts;
    T* const sum = pre ? pre : out;
    run(conv, op, transposed, tensors, nullptr, sum, nullptr, &parts, &chunks, parallel);
    merge_moments(op, parts, chunks, const_cast<void*>(given.mean), const_cast<void*>(given.var));
    norm_act_apply(op, sum, given, out, parallel);
  } else if (given.residual) {
    T* const sum = pre ? pre : out;
    run(conv, op, transposed, tensors, nullptr, sum, nullptr, nullptr, &chunks, parallel);
    norm_act_apply(op, sum, given, out, parallel);
  } else if (op.normalize) {
    const Affine<Acc<T>> affine(op, given);
    run(conv, op, transposed, tensors, &affine, pre, out, nullptr, &chunks, parallel);
  } else {
    run(conv, op, transposed, tensors, nullptr, pre, out, nullptr, &chunks, parallel);
  }
}

}  // namespace fastgen::cpu::FASTGEN_ISA
