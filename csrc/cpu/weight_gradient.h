// Gradients of convolution weights: by Winograd's method, and direct for any convolution. Included once per instruction
// set (see isa.h), after winograd_transform.h. Everything is computed in the accumulation type A. The pixels are summed
// in chunks that do not depend on the thread count and are merged in order, so the result does not depend on it either.
namespace fastgen::cpu::FASTGEN_ISA {

// The strides with which a sum over pixels (columns of lines of images) steps through its two factors.
struct Steps {
  int64_t images, a_image, b_image, lines, a_line, b_line, count, a, b;
  int64_t b_vector;  // from one vector of b to the next
};

constexpr int64_t kBlockOfSums = 1024;

// out[p][width] (+)= sum over pixels of a[pixel][p] * b[pixel][width], for `height` rows that stay in registers.
template <class A, int vectors, int height>
void outer_product(const A* a, const A* b, const Steps& step, A* out, int64_t out_step, bool accumulate) {
  using V = typename Vector<A>::type;
  V sum[height][vectors] = {};
  for (int64_t image = 0; image < step.images; ++image)
    for (int64_t line = 0; line < step.lines; ++line) {
      const A* left = a + image * step.a_image + line * step.a_line;
      const A* right = b + image * step.b_image + line * step.b_line;
      for (int64_t t = 0; t < step.count; ++t, left += step.a, right += step.b) {
        V row[vectors];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; ++k) row[k] = *reinterpret_cast<const V*>(right + k * step.b_vector);
#pragma GCC unroll 16
        for (int p = 0; p < height; ++p) {
          const A value = left[p];
#pragma GCC unroll 8
          for (int k = 0; k < vectors; ++k) sum[p][k] += row[k] * value;
        }
      }
    }
#pragma GCC unroll 16
  for (int p = 0; p < height; ++p)
#pragma GCC unroll 8
    for (int k = 0; k < vectors; ++k) {
      V* const to = reinterpret_cast<V*>(out + p * out_step + k * Vector<A>::size);
      *to = accumulate ? *to + sum[p][k] : sum[p][k];
    }
}

// out[rows][columns] (+)= the same sum; columns are padded to a multiple of the vectors.
template <class A, int vectors>
void outer_products(const A* a, int64_t rows, const A* b, int64_t columns, const Steps& step, A* out, int64_t out_step,
                    bool accumulate) {
  constexpr int large = kPixels, medium = kPixels / 3 * 2, small = kPixels / 3, wide = kPixels / 3 * vectors;
  const int64_t end = ceil_div(columns, vectors * Vector<A>::size) * vectors * Vector<A>::size;
  int64_t p = 0, k = 0;
  const auto run = [&](auto height, auto count) {
    for (; k + count * Vector<A>::size <= end; k += count * Vector<A>::size)
      outer_product<A, count, height>(a + p, b + k / Vector<A>::size * step.b_vector, step, out + p * out_step + k,
                                      out_step, accumulate);
  };
  const auto run_rows = [&](auto height, auto... count) {
    for (; p + height <= rows; p += height, k = 0) (run(height, count), ...);
  };
  constexpr std::integral_constant<int, vectors> narrow;
  run_rows(std::integral_constant<int, large>(), narrow);
  run_rows(std::integral_constant<int, medium>(), narrow);
  run_rows(std::integral_constant<int, small>(), narrow);
  // With few rows, more vectors keep the processor busy.
  if constexpr (small > 2)
    run_rows(std::integral_constant<int, small - 1>(), std::integral_constant<int, wide>(), narrow);
  run_rows(std::integral_constant<int, 1>(), std::integral_constant<int, wide>(), narrow);
}

// parts[0] += parts[1] + ..., in order; each part has `size` values.
template <class A>
void sum_chunks(A* parts, int64_t chunks, int64_t size, const ParallelFor& parallel) {
  if (chunks == 1) return;
  parallel(ceil_div(size, kBlockOfSums), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kBlockOfSums; first < std::min(size, end * kBlockOfSums); first += kBlockOfSums)
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = first; i < std::min(size, first + kBlockOfSums); ++i) parts[i] += parts[chunk * size + i];
  });
}

// Strides of an input channel, an output channel, kh and kw.
struct GradStrides {
  int64_t in, out, kh, kw;
};

// out (ic, oc, kh, kw) = parts, each with its own strides: row by row where the same channels are contiguous in both,
// else through blocks that are written in the order of out.
template <class A, class T>
void store_weights(const A* parts, const GradStrides& from, int64_t ic, int64_t oc, int64_t kh, int64_t kw, T* out,
                   const GradStrides& to, const ParallelFor& parallel) {
  constexpr int64_t block = 16;
  const int64_t input_blocks = ceil_div(ic, block), taps = kh * kw;
  if ((from.out == 1 && to.out == 1) || (from.in == 1 && to.in == 1)) {
    const bool outputs = from.out == 1;
    const int64_t from_row = outputs ? from.in : from.out, to_row = outputs ? to.in : to.out;
    parallel(outputs ? ic : oc, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t i = tap / kw, j = tap % kw;
          store_block(out + row * to_row + i * to.kh + j * to.kw, parts + row * from_row + i * from.kh + j * from.kw,
                      outputs ? oc : ic);
        }
    });
    return;
  }
  const bool inputs_last = to.in < to.kw;
  const int64_t input_stride = inputs_last ? 1 : taps,
                tap_stride = inputs_last ? block : 1;  // strides of a block's values
  std::vector<int64_t> offsets(static_cast<size_t>(taps));
  for (int64_t tap = 0; tap < taps; ++tap) offsets[tap] = tap / kw * to.kh + tap % kw * to.kw;
  parallel(input_blocks * ceil_div(oc, block), [&](int64_t begin, int64_t end) {
    auto values = scratch<A>(block * taps * block);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t in = item % input_blocks * block, inputs = std::min(block, ic - in);
      const int64_t first = item / input_blocks * block, outputs = std::min(block, oc - first);
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = 0; i < inputs; ++i) {
          const A* row = parts + tap / kw * from.kh + tap % kw * from.kw + (in + i) * from.in + first * from.out;
          A* value = values.get() + i * input_stride + tap * tap_stride;
          for (int64_t o = 0; o < outputs; ++o) value[o * taps * block] = row[o * from.out];
        }
      for (int64_t o = 0; o < outputs; ++o) {
        T* const at = out + in * to.in + (first + o) * to.out;
        const A* const value = values.get() + o * taps * block;
        if (inputs_last)
          for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t i = 0; i < inputs; ++i) store(at + offsets[tap] + i * to.in, value[tap * block + i]);
        else
          for (int64_t i = 0; i < inputs; ++i)
            for (int64_t tap = 0; tap < taps; ++tap) store(at + i * to.in + offsets[tap], value[i * taps + tap]);
      }
    }
  });
}

// The weight gradient by Winograd's algorithm: the sum over tiles of products of the transformed input and the
// transformed gradient of the output. The channels of one factor are the rows of the products; those of the other run
// along the vectors.
template <class A, int m, int r, int vectors>
struct WinogradWeightGradient {
  static constexpr int n = m + r - 1, points = n * n;
  static constexpr int64_t size = Vector<A>::size, width = vectors * size;
  static constexpr int64_t kTiles = 128;

  int64_t images, ic, ih, iw, oc;
  WinogradAxis rows, columns;

  template <class S, class T>
  void run(const S* x, const S* grad, T* out, const GradStrides& strides, const ParallelFor& parallel) const {
    const int64_t tiles_across = ceil_div(columns.positions(), m),
                  tiles_per_image = ceil_div(rows.positions(), m) * tiles_across;
    const int64_t kh = rows.kernel, kw = columns.kernel, taps = kh * kw;
    const int64_t phases = rows.phases() * columns.phases(), tiles = images * tiles_per_image;
    const bool swapped = strides.in == 1;  // vectors run along the channels of x, which are contiguous in the gradient
    const int64_t row_channels = swapped ? oc : ic, channels = swapped ? ic : oc,
                  step = ceil_div(channels, width) * width;
    // Slabs of channels. They are large because a tile is transformed once per slab of the other factor; with one phase
    // they are small, for more items of work.
    const int64_t slab = phases > 1 ? 128 : 64, row_slab = std::min(slab, ceil_div(row_channels, size) * size),
                  vector_slab = std::min(slab, step);
    const int64_t row_slabs = ceil_div(row_channels, row_slab), vector_slabs = ceil_div(channels, vector_slab),
                  slabs = phases * row_slabs * vector_slabs;
    const int64_t chunks = std::clamp<int64_t>(ceil_div(tiles, 256), 1, ceil_div(32, slabs)),
                  tiles_at_once = std::min(kTiles, ceil_div(tiles, chunks));
    // The taps of a row's channel are written directly to `out` if they fill whole vectors there.
    const bool writes_out =
        std::is_same_v<T, A> && chunks == 1 && (swapped || strides.out == 1) && channels % size == 0;
    auto parts = scratch<A>(writes_out ? 0 : chunks * taps * row_channels * step);
    const GradStrides in_parts =
        swapped ? GradStrides{1, step, kw * oc * step, oc * step} : GradStrides{step, 1, kw * ic * step, ic * step};
    const GradStrides& to_strides = writes_out ? strides : in_parts;
    A* const sums = writes_out ? reinterpret_cast<A*>(out) : parts.get();
    const int64_t v_step = tiles_at_once * row_slab + size, y_step = tiles_at_once * vector_slab + size,
                  u_step = row_slab * vector_slab + size;  // not a power of two
    parallel(chunks * slabs, [&](int64_t begin, int64_t end) {
      auto v = scratch<A>(points * v_step), y = scratch<A>(points * y_step), u = scratch<A>(points * u_step),
           spare = scratch<A>(vector_slab);
      auto zeros = scratch<S>(std::max(ic, oc)), edge = scratch<S>(points * size);
      std::fill_n(zeros.get(), std::max(ic, oc), S{});
      const S* from[points];
      A* to[points];
      // Transforms `count` channels of a tile from `first` on: point i goes to `at + i * point_step`, a vector of
      // channels every vector_step values.
      const auto transform = [&](bool input, int64_t phase, int64_t tile, int64_t first, int64_t count, A* at,
                                 int64_t point_step, int64_t vector_step) {
        const int64_t row_phase = phase / columns.phases(), column_phase = phase % columns.phases(),
                      image = tile / tiles_per_image;
        const int64_t top = tile % tiles_per_image / tiles_across * m, left = tile % tiles_across * m;
        for (int point = 0; point < points; ++point) to[point] = at + point * point_step;
        if (input) {
          for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) {
              const int64_t row = rows.source[row_phase][top + i], column = columns.source[column_phase][left + j];
              from[i * n + j] =
                  row < 0 || column < 0 ? zeros.get() : x + ((image * ih + row) * iw + column) * ic + first;
            }
          return transform_channels<A, m, r, &WinogradMatrices<m, r>::input>(from, count, edge.get(), to, vector_step);
        }
        for (int i = 0; i < m; ++i)
          for (int j = 0; j < m; ++j) {
            const int64_t row = (top + i) * rows.out_step + row_phase % rows.out_step;
            const int64_t column = (left + j) * columns.out_step + column_phase % columns.out_step;
            from[i * m + j] = row < rows.out && column < columns.out
                                  ? grad + ((image * rows.out + row) * columns.out + column) * oc + first
                                  : zeros.get();
          }
        transform_channels<A, m, r, &WinogradMatrices<m, r>::output_gradient>(from, count, edge.get(), to, vector_step);
      };
      int64_t v_factor = -1;  // the row factor whose transforms, for all tiles, are in v
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row_factor = item / vector_slabs, phase = row_factor / row_slabs % phases, chunk = item / slabs;
        const int64_t first_row = row_factor % row_slabs * row_slab, first_channel = item % vector_slabs * vector_slab;
        const int64_t row_count = std::min(row_slab, row_channels - first_row),
                      channel_count = std::min(vector_slab, channels - first_channel);
        const int64_t start = tiles * chunk / chunks, last = tiles * (chunk + 1) / chunks;
        for (int64_t first = start; first < last; first += tiles_at_once) {
          const int64_t count = std::min(tiles_at_once, last - first);
          for (int64_t t = 0; t < count && v_factor != row_factor; ++t)
            transform(!swapped, phase, first + t, first_row, row_count, v.get() + t * row_slab, v_step, size);
          for (int64_t t = 0; t < count; ++t)
            transform(swapped, phase, first + t, first_channel, channel_count, y.get() + t * size, y_step,
                      tiles_at_once * size);
          for (int point = 0; point < points; ++point)
            if (rows.has(phase / columns.phases(), point / n, n) && columns.has(phase % columns.phases(), point % n, n))
              outer_products<A, vectors>(v.get() + point * v_step, row_count, y.get() + point * y_step, channel_count,
                                         {1, 0, 0, 1, 0, 0, count, row_slab, size, tiles_at_once * size},
                                         u.get() + point * u_step, vector_slab, first > start);
        }
        v_factor = last - start <= tiles_at_once ? row_factor : -1;
        const A* products[points];
        A* tap_sums[r * r];
        for (int64_t row = 0; row < row_count; ++row) {
          for (int point = 0; point < points; ++point) products[point] = u.get() + point * u_step + row * vector_slab;
          for (int tap = 0; tap < r * r; ++tap) {
            const int64_t i = rows.tap[phase / columns.phases()][tap / r],
                          j = columns.tap[phase % columns.phases()][tap % r];
            A* const at = sums + (writes_out ? 0 : chunk * taps * row_channels * step) +
                          (first_row + row) * (swapped ? to_strides.out : to_strides.in);
            tap_sums[tap] = i < 0 || j < 0 ? spare.get() : at + first_channel + i * to_strides.kh + j * to_strides.kw;
          }
          for (int64_t k = 0; k < channel_count; k += size)
            transform_tile<A, m, r, &WinogradMatrices<m, r>::weight_gradient>(products, k, tap_sums, k);
        }
      }
    });
    if (writes_out) return;
    sum_chunks(parts.get(), chunks, taps * row_channels * step, parallel);
    store_weights(parts.get(), in_parts, ic, oc, kh, kw, out, strides, parallel);
  }
};

// The direct gradient, for any convolution: the sum over the pixels of the `small` tensor, which is the convolution's
// output (the input when transposed), times the pixels small * stride + k * dilation - padding of the `big` one.
template <class A>
struct DirectWeightGradient {
  static constexpr int64_t width = 2 * Vector<A>::size;
  // The maximum bytes of a strip: some rows of one or more images of the big tensor. A strip is multiplied by at most
  // 256 pixels of the small tensor, which bounds the rounding error of one sum.
  static constexpr int64_t kStrip = 128 << 10;
  static constexpr int64_t kSlab = 2 * kPixels;  // channels of the big tensor per slab

  int64_t images, bh, bw, bc, sh, sw, sc, kh, kw;
  int64_t stride[2], padding[2], dilation[2], groups;
  bool reflect;  // big is mirrored beyond its edges instead of being zero

  // out (bc / groups, sc, kh, kw); `in` of its strides is a channel of big, `out` one of small.
  template <class T>
  void run(const A* big, const A* small, T* out, const GradStrides& strides, const ParallelFor& parallel) const {
    const int64_t group_channels = bc / groups, slabs = group_channels <= 64 ? 1 : ceil_div(group_channels, kSlab),
                  b = ceil_div(group_channels, slabs), s = sc / groups;
    const int64_t pitch = ((sw - 1) * stride[1] + (kw - 1) * dilation[1] + 1) * b;
    const int64_t fit =
        std::min(kStrip / (pitch * stride[0] * static_cast<int64_t>(sizeof(A))), ceil_div(256, sw));  // lines of small
    const int64_t lines = std::clamp<int64_t>(fit, 1, sh), images_at_once = std::clamp<int64_t>(fit / sh, 1, images);
    const int64_t height = (lines - 1) * stride[0] + (kh - 1) * dilation[0] + 1;
    const int64_t strips_per_image = ceil_div(sh, lines), strips = ceil_div(images, images_at_once) * strips_per_image;
    // If the taps of a kernel row are contiguous columns, one product computes the whole row. Its vectors run over the
    // factor that fills them better.
    const int64_t run = dilation[1] == 1 ? kw * b : b, s_step = ceil_div(s, width) * width,
                  run_step = ceil_div(run, width) * width;
    const bool vectors_along_run = run_step * s < s_step * run;
    const int64_t row_size = vectors_along_run ? s * run_step : run * s_step, rows = kh * (kw * b / run),
                  size = groups * slabs * rows * row_size;
    const int64_t chunks =
        std::clamp<int64_t>((16 << 20) / size, 1, std::min<int64_t>(strips, ceil_div(32, groups * slabs)));
    const int64_t splits = groups * slabs * chunks < 32 ? kh : 1;  // items of work that share a strip
    auto parts = scratch<A>(chunks * size);
    parallel(chunks * groups * slabs * splits, [&](int64_t begin, int64_t end) {
      auto strip = scratch<A>(images_at_once * height * pitch + width),
           packed = scratch<A>(vectors_along_run ? 0 : images_at_once * lines * sw * s_step);
      std::fill_n(strip.get() + images_at_once * height * pitch, width, A(0));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item / splits / slabs / groups, slab = item / splits % (groups * slabs),
                      split = item % splits;
        const int64_t group = slab / slabs, channel = group * group_channels + slab % slabs * b,
                      channels = std::min(b, (group + 1) * group_channels - channel);
        for (int64_t at = strips * chunk / chunks; at < strips * (chunk + 1) / chunks; ++at) {
          const int64_t image = at / strips_per_image * images_at_once, first = at % strips_per_image * lines;
          const int64_t image_count = std::min(images_at_once, images - image), count = std::min(lines, sh - first),
                        pixels = image_count * count * sw;
          gather(big, image, image_count, first * stride[0] - padding[0], height, pitch, channel, channels, b,
                 strip.get());
          const A* const factor = small + (image * sh + first) * sw * sc + group * s;
          if (!vectors_along_run) pack(factor, pixels, count * sw, s, packed.get());
          for (int64_t row = rows * split / splits; row < rows * (split + 1) / splits; ++row) {
            const A* from = strip.get() + row / (rows / kh) * dilation[0] * pitch + row % (rows / kh) * dilation[1] * b;
            A* to = parts.get() + chunk * size + (slab * rows + row) * row_size;
            const bool accumulate = at > strips * chunk / chunks;
            const int64_t image_step = height * pitch, line_step = stride[0] * pitch, step = stride[1] * b;
            if (vectors_along_run)
              outer_products<A, 2>(
                  factor, s, from, run,
                  {image_count, sh * sw * sc, image_step, count, sw * sc, line_step, sw, sc, step, Vector<A>::size}, to,
                  run_step, accumulate);
            else
              outer_products<A, 2>(from, run, packed.get(), s,
                                   {image_count, image_step, count * sw * Vector<A>::size, count, line_step,
                                    sw * Vector<A>::size, sw, step, Vector<A>::size, pixels * Vector<A>::size},
                                   to, s_step, accumulate);
          }
        }
      }
    });
    sum_chunks(parts.get(), chunks, size, parallel);
    const int64_t big_stride = vectors_along_run ? 1 : s_step, small_stride = vectors_along_run ? run_step : 1,
                  kw_stride = rows == kh ? b * big_stride : row_size;
    for (int64_t slab = 0; slab < groups * slabs; ++slab)
      store_weights(parts.get() + slab * rows * row_size, {big_stride, small_stride, rows / kh * row_size, kw_stride},
                    std::min(b, group_channels - slab % slabs * b), s, kh, kw,
                    out + slab % slabs * b * strides.in + slab / slabs * s * strides.out, strides, parallel);
  }

  // Copies `channels` channels of big, from `count` images and `height` lines starting at first_line, with padding, to
  // a strip (image, line, pitch).
  void gather(const A* big, int64_t image, int64_t count, int64_t first_line, int64_t height, int64_t pitch,
              int64_t channel, int64_t channels, int64_t b, A* strip) const {
    const auto mirrored = [this](int64_t i, int64_t size) {
      return !reflect || (i >= 0 && i < size) ? i : std::clamp<int64_t>(i < 0 ? -i : 2 * (size - 1) - i, 0, size - 1);
    };
    const int64_t width = pitch / b, left = padding[1], right = std::clamp<int64_t>(width - left, 0, bw);
    for (int64_t i = 0; i < count * height; ++i, strip += pitch) {
      const int64_t line = mirrored(first_line + i % height, bh);
      if (line < 0 || line >= bh) {
        std::fill_n(strip, pitch, A(0));
        continue;
      }
      const A* from = big + ((image + i / height) * bh + line) * bw * bc + channel;
      const auto copy_column = [&](int64_t at) {  // a column of the strip
        const int64_t column = mirrored(at - left, bw);
        A* to = strip + at * b;
        const bool is_inside = column >= 0 && column < bw;
        if (is_inside && channels == kSlab)
          return void(memcpy(to, from + column * bc, kSlab * sizeof(A)));  // a constant size compiles to a few moves
        if (is_inside) to = std::copy_n(from + column * bc, channels, to);
        std::fill(to, strip + (at + 1) * b, A(0));
      };
      for (int64_t at = 0; at < std::min(left, width); ++at) copy_column(at);
      if (channels == bc) std::copy_n(from, right * b, strip + left * b);
      else
        for (int64_t at = left; at < left + right; ++at) copy_column(at);
      for (int64_t at = left + right; at < width; ++at) copy_column(at);
    }
  }

  // Copies `channels` channels of the pixels, pixels_per_image of which are contiguous, to (group, pixel, vector),
  // padded with zeros to whole blocks.
  void pack(const A* small, int64_t pixels, int64_t pixels_per_image, int64_t channels, A* packed) const {
    constexpr int64_t size = Vector<A>::size;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const A* from = small + (pixel / pixels_per_image * sh * sw + pixel % pixels_per_image) * sc;
      for (int64_t k = 0; k < ceil_div(channels, width) * width; k += size) {
        A* const to = packed + (k * pixels + pixel * size);
        const int64_t valid = std::clamp<int64_t>(channels - k, 0, size);
        std::fill_n(std::copy_n(from + k, valid, to), size - valid, A(0));
      }
    }
  }
};

}  // namespace fastgen::cpu::FASTGEN_ISA
