// Winograd convolutions: m outputs of r taps from m + r - 1 multiplications an axis instead of m * r (Lavin and Gray,
// 2015). A convolution whose kernel is r times its stride is, or is the sum of, r-tap convolutions of stride 1, a phase
// of the stride each; a smaller kernel lacks taps of some phases, and their products at some points. Included once per
// instruction set (see isa.h), after tile.h. Everything is computed in the accumulation type A.
namespace fastgen::cpu::FASTGEN_ISA {

// y = output [(weight g) * (input d)] from the points 0, 1, -1, 1/2, -2 and infinity (Toom and Cook): their
// rounding errors are smaller than those of 0, 1, -1, 2, -2.
template <int m, int r>
struct Minimal {
  static constexpr int n = m + r - 1;
  double input[n][n] = {}, weight[n][r] = {}, output[m][n] = {};
  double weight_gradient[r][n] = {}, output_gradient[n][m] = {};  // transposes of weight and output

  constexpr Minimal() {
    constexpr double at[] = {0, 1, -1, 0.5, -2};
    for (int j = 0; j < n; ++j) {
      double scale = 1;
      input[j][0] = 1;
      for (int l = 0, degree = 0; l < n - 1; ++l) {  // the product of (x - at[l]) over the other points
        if (l == j) continue;
        for (int k = ++degree; k >= 0; --k) input[j][k] = (k ? input[j][k - 1] : 0) - at[l] * input[j][k];
        if (j < n - 1) scale *= at[j] - at[l];
      }
      double power = 1;
      for (int k = 0; k < n; ++k) {
        const double value = j < n - 1 ? power : 0;
        if (k < r) weight[j][k] = j < n - 1 ? value / scale : k == r - 1;
        if (k < m) output[k][j] = j < n - 1 ? value : k == m - 1;
        if (j < n - 1) power *= at[j];
      }
    }
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < r; ++k) weight_gradient[k][j] = weight[j][k];
      for (int k = 0; k < m; ++k) output_gradient[j][k] = output[k][j];
    }
  }
};
template <int m, int r>
constexpr Minimal<m, r> kMinimal{};

// What transforms read and convert on the way: bfloat16 as it is, the other types in the accumulation type.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, Acc<T>>;

template <class A>
inline __attribute__((always_inline)) typename Vector<A>::type load_vector(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::type*>(p);
}
template <class A>
inline __attribute__((always_inline)) Vector<float>::type load_vector(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(FASTGEN_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(FASTGEN_VECTOR_BYTES)));
  return reinterpret_cast<Vector<float>::type>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16);
}

// to[i][j] = (matrix d matrix^T)[i][j], d[i][j] = from[i][j], one vector of channels each. The matrix, a member of
// Minimal<m, r>, is a template argument: its zeros and ones cost nothing.
template <class A, int m, int r, auto member, class S>
inline __attribute__((always_inline)) void sandwich(const S* const* from, int64_t from_offset, A* const* to,
                                                    int64_t to_offset) {
  using V = typename Vector<A>::type;
  constexpr auto& matrix = kMinimal<m, r>.*member;
  constexpr int rows = std::extent_v<std::remove_reference_t<decltype(matrix)>, 0>,
                columns = std::extent_v<std::remove_reference_t<decltype(matrix)>, 1>;
  V half[columns][rows];
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) {
    V d[columns];
#pragma GCC unroll 8
    for (int k = 0; k < columns; ++k) d[k] = load_vector<A>(from[k * columns + j] + from_offset);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      V sum = {};
      bool started = false;
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) {
        if (matrix[i][k] == 0) continue;
        sum = started ? sum + d[k] * A(matrix[i][k]) : d[k] * A(matrix[i][k]);
        started = true;
      }
      half[j][i] = sum;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < rows; ++j) {
      V sum = {};
      bool started = false;
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) {
        if (matrix[j][k] == 0) continue;
        sum = started ? sum + half[k][i] * A(matrix[j][k]) : half[k][i] * A(matrix[j][k]);
        started = true;
      }
      *reinterpret_cast<V*>(to[i * rows + j] + to_offset) = sum;
    }
}

// The same for all channels: a vector of them each `step` of the output; the last one is filled up with zeros.
template <class A, int m, int r, auto member, class S>
void sandwich_channels(const S** from, int64_t channels, S* edge, A* const* to, int64_t step) {
  constexpr int columns = std::extent_v<std::remove_reference_t<decltype(kMinimal<m, r>.*member)>, 1>;
  constexpr int64_t size = Vector<A>::size;
  int64_t channel = 0;
  for (; channel + size <= channels; channel += size)
    sandwich<A, m, r, member>(from, channel, to, channel / size * step);
  if (channel == channels) return;
  std::fill_n(edge, columns * columns * size, S{});
  for (int i = 0; i < columns * columns; ++i) {
    std::copy(from[i] + channel, from[i] + channels, edge + i * size);
    from[i] = edge + i * size;
  }
  sandwich<A, m, r, member>(from, 0, to, channel / size * step);
}

// One axis: output o = t * out_step + phase of position t, or the sum over phases of the input; tap u of position t
// reads source[phase][t + u], -1 outside, with the kernel's tap[phase][u], -1 beyond the kernel.
struct WinogradAxis {
  int64_t kernel, out, in_step, out_step;
  std::vector<std::vector<int64_t>> source, tap;

  int64_t phases() const { return in_step * out_step; }
  int64_t positions() const { return ceil_div(out, out_step); }
  // Whether a phase's transformed weights are not all zero at point i of n: the first one is tap 0 itself, the last one
  // the last tap.
  bool has(int64_t phase, int64_t i, int64_t n) const {
    return (i > 0 || tap[phase].front() >= 0) && (i < n - 1 || tap[phase].back() >= 0);
  }

  // Whether all phases read the same of the input.
  bool reads_the_same() const {
    return std::all_of(source.begin(), source.end(), [&](const auto& phase) { return phase == source.front(); });
  }

  // i = o * stride + k - padding.
  static WinogradAxis conv(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, bool reflect) {
    WinogradAxis axis{kernel, out, stride, 1, {}, {}};
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t r = ceil_div(kernel, stride);
      axis.add(in, r, stride, phase - padding, reflect);
      for (int64_t u = 0; u < r; ++u) axis.add_tap(phase + stride * u);
    }
    return axis;
  }

  // o + padding = i * stride + k. With stride 1, the data gradient of conv.
  static WinogradAxis transposed(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding) {
    WinogradAxis axis{kernel, out, 1, stride, {}, {}};
    const int64_t r = ceil_div(kernel, stride), latest = (stride - 1 + padding) / stride;
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t from = (phase + padding) / stride, k = (phase + padding) % stride;
      const bool late =
          from < latest && k + stride * (r - 1) >= kernel;  // lacks the first tap: it reads what the last phase does
      axis.add(in, r, 1, from + late - (r - 1), false);
      for (int64_t u = late; u < r + late; ++u) axis.add_tap(u < r ? k + stride * (r - 1 - u) : kernel);
    }
    return axis;
  }

 private:
  void add_tap(int64_t k) { tap.back().push_back(k < kernel ? k : -1); }

  void add(int64_t in, int64_t r, int64_t step, int64_t offset, bool reflect) {
    source.emplace_back();
    tap.emplace_back();
    for (int64_t t = 0; t < positions() + 8 + r; ++t) {  // 8: the last tile may reach beyond the output
      int64_t i = t * step + offset;
      if (reflect && i < 0) i = -i;
      if (reflect && i >= in) i = 2 * (in - 1) - i;
      source.back().push_back(i < 0 || i >= in ? -1 : i);
    }
  }
};

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
      *to = accumulate ? *to + sum[p][k] : sum[p][k];  // parts of the depth are summed apart: smaller rounding errors
    }
}

// All pixels of some rows of some images of the output.
struct Band {
  int64_t first_image, last_image, first_row, last_row;
};

// A convolution of (n, ih, iw, ic) pixels, by tiles of m x m outputs, in blocks of `vectors` vectors of output
// channels.
template <class A, int m, int r, int vectors>
struct Winograd {
  static constexpr int n = m + r - 1, points = n * n;
  static constexpr int64_t size = Vector<A>::size, width = vectors * size;
  // What lies in the second-level cache at a time: bytes of transformed input, and vectors of depth of transformed
  // weights.
  static constexpr int64_t kBudget = 192 << 10;
  static constexpr int64_t kGroups = 128 / size;

  int64_t ic, ih, iw, oc;
  WinogradAxis rows, columns;
  // The packed weights are the taps, transformed for each band: transformed ones are n * n / (r * r) times as large.
  // Else they are packed transformed, for weights that are used often and stay in the cache.
  bool expand;

  int64_t blocks() const { return ceil_div(oc, width); }
  int64_t sums() const { return rows.in_step * columns.in_step; }       // phases of the input
  int64_t outputs() const { return rows.out_step * columns.out_step; }  // phases of the output
  int64_t groups() const { return sums() * ceil_div(ic, size); }        // vectors of depth
  int64_t across() const { return ceil_div(columns.positions(), m); }   // tiles
  // Of the output's phase and the input's, one is always 0.
  int64_t row_phase(int64_t phase, int64_t sum) const {
    return std::max(phase / columns.out_step, sum / columns.in_step);
  }
  int64_t column_phase(int64_t phase, int64_t sum) const {
    return std::max(phase % columns.out_step, sum % columns.in_step);
  }
  int64_t tiles_an_image(int64_t first_row, int64_t last_row) const {
    return ceil_div(last_row - first_row, rows.out_step * m) * across();
  }
  // The budget's tiles; half as many again are taken at once too, so that these few do not read all weights alone.
  int64_t chunk() const {
    return std::clamp<int64_t>(kBudget / (points * groups() * size * sizeof(A)) / kPixels, 1, 8) * kPixels;
  }
  int64_t most_tiles() const { return chunk() / 2 * 3; }
  int64_t tiles_at_once(int64_t tiles) const { return expand || tiles <= most_tiles() ? tiles : chunk(); }
  // From point to point. + 1: at a multiple of 4 KiB all points would fall into one set of the cache.
  static constexpr int64_t weight_step(int64_t groups) { return (groups * width + 1) * size; }
  int64_t point_step(int64_t tiles) const { return (groups() * tiles + 1) * size; }
  int64_t transform_size(int64_t tiles) const { return points * point_step(tiles); }
  int64_t edge_size() const { return ic + points * size; }
  int64_t scratch_size(int64_t tiles) const {
    const int64_t at_once = expand ? tiles : std::min(tiles, most_tiles());  // of any band with so many or fewer
    return transform_size(at_once) + points * (at_once * width + (expand ? weight_step(kGroups) : 0)) + width +
           edge_size();
  }
  int64_t parts() const { return ceil_div(groups(), kGroups); }
  int64_t packed_at(int64_t block, int64_t part) const {
    return (block * (groups() * width + parts()) + part * (kGroups * width + 1)) * size * (expand ? r * r : points);
  }
  int64_t packed_size() const { return packed_at(outputs() * blocks(), 0); }

  // packed (output phase, block, part of the depth, point or tap, depth, width), zero beyond ic and oc. stride: of an
  // input channel, an output channel, kh, kw.
  template <class T>
  void pack(const T* weight, const int64_t* stride, A* packed, const ParallelFor& parallel) const {
    constexpr int64_t taps = r * r;
    parallel(outputs() * blocks() * parts(), [&](int64_t begin, int64_t end) {
      auto raw = scratch<A>(taps * weight_step(kGroups));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item % parts(), block = item / parts() % blocks();
        const int64_t phase = item / parts() / blocks(), first = part * kGroups;
        const int64_t count = std::min(kGroups, groups() - first), valid = std::min(width, oc - block * width);
        A* const at = packed + packed_at(phase * blocks() + block, part);
        A* const to = expand ? at : raw.get();
        const int64_t rest = ceil_div(ic, size);
        const auto of_tap = [&](int64_t tap, int64_t group) -> const T* {
          const int64_t sum = group / rest, kh = rows.tap[row_phase(phase, sum)][tap / r],
                        kw = columns.tap[column_phase(phase, sum)][tap % r];
          if (kh < 0 || kw < 0) return nullptr;
          return weight + group % rest * size * stride[0] + block * width * stride[1] + kh * stride[2] + kw * stride[3];
        };
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t group = first; group < first + count; ++group) {
            const int64_t depth = std::min(size, ic - group % rest * size);
            // The next tap's lines lie apart: they are fetched while this one is copied.
            if (const T* const next = tap + 1 < taps ? of_tap(tap + 1, group) : nullptr) {
              if (stride[0] == 1)
                for (int64_t k = 0; k < valid; ++k) __builtin_prefetch(next + k * stride[1]);
              else
                for (int64_t i = 0; i < depth; ++i)
                  for (int64_t k = 0; k < valid; k += size) __builtin_prefetch(next + i * stride[0] + k * stride[1]);
            }
            A* const copy = to + tap * weight_step(count) + (group - first) * size * width;
            if (const T* const from = of_tap(tap, group))
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
    for (int64_t i = 0; i < count * size * width; i += size) sandwich<A, m, r, &Minimal<m, r>::weight>(from, i, to, i);
  }

  // The band (block, image, row, column, width); its first row a multiple of out_step * m. memory: scratch_size(tiles
  // of the band). Several blocks at once share the input's transforms. transformed: those of all its tiles, or null.
  template <class S>
  void multiply(const S* x, const A* transformed, const A* packed, int64_t first_block, int64_t last_block,
                const Band& band, A* out, A* memory) const {
    const int64_t per_image = tiles_an_image(band.first_row, band.last_row),
                  tiles = (band.last_image - band.first_image) * per_image, at_once = tiles_at_once(tiles),
                  pixels_an_image = (band.last_row - band.first_row) * columns.out,
                  pixels = (band.last_image - band.first_image) * pixels_an_image;
    A* const products = memory + transform_size(at_once);
    A* const spare = products + points * at_once * width;
    A* const edge = spare + width;
    A* const u = edge + edge_size();
    const int64_t chunks = ceil_div(tiles, at_once);
    const bool same = rows.reads_the_same() && columns.reads_the_same();  // all phases share the input's transforms
    for (int64_t item = 0; item < outputs() * chunks; ++item) {
      const int64_t phase = same ? item % outputs() : item / chunks,
                    first = (same ? item / outputs() : item % chunks) * at_once;
      const int64_t count = std::min(at_once, tiles - first);
      if (!transformed && (!same || phase == 0)) transform_tiles(x, phase, band, first, count, 0, count, edge, memory);
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
          transform_output(products + t * width, count * width, phase, band, (first + t) % per_image / across() * m,
                           (first + t) % across() * m, spare,
                           out + ((block - first_block) * pixels + (first + t) / per_image * pixels_an_image) * width);
      }
    }
  }

  // Of the band's `count` tiles from `first` on those from `begin` to `end`: (point, group of channels, tile, size).
  // memory: edge_size.
  template <class S>
  void transform_tiles(const S* x, int64_t phase, const Band& band, int64_t first, int64_t count, int64_t begin,
                       int64_t end, A* memory, A* v) const {
    const int64_t per_image = tiles_an_image(band.first_row, band.last_row);
    S* const zeros = reinterpret_cast<S*>(memory);
    S* const edge = zeros + ic;
    std::fill_n(zeros, ic, S{});
    const S* from[points];
    A* to[points];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t tile = (first + t) % per_image, top = band.first_row / rows.out_step + tile / across() * m,
                    left = tile % across() * m;
      const S* const image = x + (band.first_image + (first + t) / per_image) * ih * iw * ic;
      for (int64_t sum = 0; sum < sums(); ++sum) {
        const auto &row = rows.source[row_phase(phase, sum)], &column = columns.source[column_phase(phase, sum)];
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < n; ++j) {
            const int64_t y = row[top + i], at = column[left + j];
            from[i * n + j] = y < 0 || at < 0 ? zeros : image + (y * iw + at) * ic;
            to[i * n + j] = v + (i * n + j) * point_step(count) + (sum * ceil_div(ic, size) * count + t) * size;
          }
        sandwich_channels<A, m, r, &Minimal<m, r>::input>(from, ic, edge, to, count * size);
      }
    }
  }

  // One point's products over the `depth` vectors from `first`, but those whose weights are zero. Of the input's phases
  // none lacks the first one's.
  void multiply_point(const A* v, int64_t tiles, int64_t phase, int point, const A* u, int64_t first, int64_t depth,
                      A* out) const {
    const int64_t rest = ceil_div(ic, size), last = first + depth;
    const auto lacks = [&](int64_t group) {
      return !rows.has(row_phase(phase, group / rest), point / n, n) ||
             !columns.has(column_phase(phase, group / rest), point % n, n);
    };
    if (sums() == 1 && lacks(0)) return void(first ? out : std::fill_n(out, tiles * width, A(0)));
    for (int64_t begin = first, end; begin < last; begin = end) {
      const bool none = lacks(begin);
      for (end = begin; end < last && lacks(end) == none;) end = std::min(last, (end / rest + 1) * rest);
      if (!none)
        multiply_tiles(v + begin * tiles * size, tiles, u + (begin - first) * size * width, end - begin, out,
                       begin > 0);
    }
  }

  static void multiply_tiles(const A* v, int64_t tiles, const A* u, int64_t depth, A* out, bool accumulate) {
    constexpr int most = kPixels, some = kPixels / 3 * 2, few = kPixels / 3;
    int64_t t = 0;
    for (; t + most <= tiles; t += most)
      product<A, vectors, most>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
    for (; t + some <= tiles; t += some)
      product<A, vectors, some>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
    for (; t + few <= tiles; t += few)
      product<A, vectors, few>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
    for (; t < tiles; ++t) product<A, vectors, 1>(v + t * size, tiles * size, u, depth, out + t * width, accumulate);
  }

  // The pixels, of one block of channels, of the tile `down` positions below the band's first row; those outside the
  // band go to `spare`.
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
    for (int64_t k = 0; k < width; k += size) sandwich<A, m, r, &Minimal<m, r>::output>(from, k, to, k);
  }
};

}  // namespace fastgen::cpu::FASTGEN_ISA
