// The output of one call: how it is divided among threads, and the epilogue applied before it is written. Included once
// per instruction set (see isa.h), after tile.h.
namespace fastgen::cpu::FASTGEN_ISA {

// The output in blocks of `vectors` vectors of channels. z is a block of a band before the epilogue: (image, row,
// column, width).
template <class T, int vectors>
struct Output {
  using A = Acc<T>;
  static constexpr int64_t width = vectors * Vector<A>::size;
  const Geometry& conv;
  const Epilogue& epilogue;
  const A* bias;            // or null
  const Affine<A>* affine;  // null: no normalization here
  const T* residual;        // added before the activation, or null
  T* pre;
  T* out;
  std::vector<Moments<double>>* parts;  // (n, bands per image, c) if statistics are requested, else null
  int64_t images = 0, band_rows = 0;    // of a band
  bool rounds_by_instruction = false;   // to bfloat16; the processor must have it, and subnormal numbers become zero

  void set_band(int64_t images_, int64_t rows) {
    images = std::clamp<int64_t>(images_, 1, epilogue.n);
    band_rows = std::clamp<int64_t>(rows, 1, conv.oh);
    if (parts) parts->resize(static_cast<size_t>(epilogue.n * bands_per_image() * epilogue.c));
  }
  int64_t bands_per_image() const { return ceil_div(conv.oh, band_rows); }
  Band band_at(int64_t index) const {
    const int64_t image = index / bands_per_image() * images, row = index % bands_per_image() * band_rows;
    return {image, std::min(epilogue.n, image + images), row, std::min(conv.oh, row + band_rows)};
  }
  int64_t blocks() const { return ceil_div(epilogue.c / conv.groups, width); }

  int64_t at(int64_t image, int64_t channel, int64_t pixel) const {
    return epilogue.channels_last ? (image * epilogue.s + pixel) * epilogue.c + channel
                                  : (image * epilogue.c + channel) * epilogue.s + pixel;
  }

  void put_row(const A* z, T* tensor, int64_t image, int64_t oh) const {
    for (int64_t channel = 0; channel < epilogue.c; ++channel)
      for (int64_t ow = 0; ow < conv.ow; ++ow)
        store(tensor + at(image, channel, oh * conv.ow + ow), z[channel * conv.ow + ow]);
  }

  // Finishes the band's images of one block of channels, from z on; returns where the next block's are if they follow.
  A* finish_band(int64_t block, const Band& band, A* z) const {
    for (int64_t image = band.first_image; image < band.last_image;
         ++image, z += (band.last_row - band.first_row) * conv.ow * width)
      finish_rows(block, image, band.first_row, band.last_row, z);
    return z;
  }

  // Bias, statistics or normalization + activation, and the store, for one block of channels of some rows of one image.
  void finish_rows(int64_t block, int64_t image, int64_t first_row, int64_t last_row, A* z) const {
    const int64_t group = block / blocks(), first = group * (epilogue.c / conv.groups) + block % blocks() * width;
    const int64_t valid = std::min(width, (group + 1) * (epilogue.c / conv.groups) - first),
                  pixels = (last_row - first_row) * conv.ow;
    A shift[width] = {};
    if (bias) std::copy_n(bias + first, valid, shift);
    if (out && epilogue.channels_last && valid == width && !pre && !affine && !residual) {
      T* const to = out + at(image, first, first_row * conv.ow);
      with_activation(epilogue.activation, [&](auto constant) {
        put_activated<constant.value>(z, pixels, shift, static_cast<A>(epilogue.negative_slope), to, epilogue.c);
      });
      return;
    }
    if (parts) {
      if (bias) each(z, pixels, [&](A value, int64_t k) { return value + shift[k]; });
      Moments<double> moments[width];
      column_moments(z, pixels, width, moments);
      std::copy_n(moments, valid,
                  parts->data() + (image * bands_per_image() + first_row / band_rows) * epilogue.c + first);
    }
    A center[width] = {}, scale[width] = {}, offset[width] = {};
    if (affine) {
      std::copy_n(affine->center.get() + first, valid, center);
      std::copy_n(affine->scale.get() + first, valid, scale);
      std::copy_n(affine->shift.get() + first, valid, offset);
    }
    if (out && valid <= width / 2 && valid == epilogue.c && epilogue.channels_last && !pre && !affine && !residual &&
        !parts)
      return finish_few(z, pixels, shift, out + at(image, 0, first_row * conv.ow));
    for (int64_t start = 0; start < pixels; start += kChunk) {  // a chunk stays in the first-level cache
      A* const chunk = z + start * width;
      const int64_t count = std::min(kChunk, pixels - start), pixel = first_row * conv.ow + start;
      if (bias && !parts) each(chunk, count, [&](A value, int64_t k) { return value + shift[k]; });
      if (pre) put(chunk, pre, image, pixel, count, first, valid);
      if (!out) continue;
      if (affine) each(chunk, count, [&](A value, int64_t k) { return (value - center[k]) * scale[k] + offset[k]; });
      if (residual)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = 0; k < valid; ++k) chunk[i * width + k] += load(residual + at(image, first + k, pixel + i));
      activate_block(epilogue.activation, chunk, count * width, static_cast<A>(epilogue.negative_slope));
      put(chunk, out, image, pixel, count, first, valid);
    }
  }

  // The same for few channels of an output that has no others: they are moved together, so that no activation of the
  // block's unused channels is computed.
  void finish_few(A* z, int64_t pixels, const A* shift, T* to) const {
    const int64_t c = epilogue.c;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t k = 0; k < c; ++k) z[pixel * c + k] = z[pixel * width + k] + shift[k];
    activate_block(epilogue.activation, z, pixels * c, static_cast<A>(epilogue.negative_slope));
    store_block(to, z, pixels * c);
  }

  template <Activation act>
  void put_activated(const A* z, int64_t pixels, const A* shift, A slope, T* __restrict to, int64_t step) const {
    for (int64_t pixel = 0; pixel < pixels; ++pixel, z += width, to += step) {
      A values[width];
      for (int64_t k = 0; k < width; ++k) values[k] = activate<act>(z[k] + shift[k], slope);
      put_pixel(values, to);
    }
  }

  // Stores a pixel's block of channels.
  inline __attribute__((always_inline)) void put_pixel(const A* values, T* to) const {
#if FASTGEN_HAS_DOT
    if constexpr (std::is_same_v<T, BFloat16> && width == 32)
      if (rounds_by_instruction) {
        __m512i rounded;
        asm("vcvtne2ps2bf16 %2, %1, %0"
            : "=v"(rounded)
            : "v"(_mm512_loadu_ps(values + 16)), "v"(_mm512_loadu_ps(values)));
        return _mm512_storeu_si512(to, rounded);
      }
#endif
    for (int64_t k = 0; k < width; ++k) store(to + k, values[k]);
  }

  static constexpr int64_t kChunk = 64;  // pixels

  template <class F>
  static void each(A* z, int64_t pixels, const F& changed) {  // the constant trip count gives SIMD code
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t k = 0; k < width; ++k) z[pixel * width + k] = changed(z[pixel * width + k], k);
  }

  // Writes the pixels z of the block of channels at `first` to a tensor in the output's memory order.
  void put(const A* z, T* tensor, int64_t image, int64_t pixel, int64_t pixels, int64_t first, int64_t valid) const {
    if (!epilogue.channels_last) {
      constexpr int64_t size = Vector<A>::size;
      const int64_t whole = pixels / size * size;
      alignas(64) A square[size * size];
      for (int64_t channel = 0; channel < valid; channel += size) {
        const int64_t channels = std::min(size, valid - channel);
        for (int64_t i = 0; i < whole; i += size) {
          transpose(z + i * width + channel, width, square, size);
          for (int64_t k = 0; k < channels; ++k)
            store_block(tensor + at(image, first + channel + k, pixel + i), square + k * size, size);
        }
        for (int64_t k = channel; k < channel + channels; ++k)
          for (int64_t i = whole; i < pixels; ++i) store(tensor + at(image, first + k, pixel + i), z[i * width + k]);
      }
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      T* const to = tensor + at(image, first, pixel + i);
      if (valid < width) store_block(to, z + i * width, valid);
      else if constexpr (std::is_same_v<T, A>)
        memcpy(to, z + i * width, width * sizeof(A));  // a constant size compiles to a few moves
      else put_pixel(z + i * width, to);
    }
  }
};

}  // namespace fastgen::cpu::FASTGEN_ISA
