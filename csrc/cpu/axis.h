// How a convolution's output positions along one axis read the input. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

// The pixel that reflection padding repeats at i, if i is at most size - 1 pixels outside.
constexpr int64_t reflected(int64_t i, int64_t size) { return i < 0 ? -i : i >= size ? 2 * (size - 1) - i : i; }

// How the output positions of one axis read the input: position o, tap k -> source[o * taps + k], -1 outside. Positions
// that the same taps reach form a class: one class per residue of the stride when transposed, and on a short axis
// separate classes for positions at the border, so that no tap is multiplied by zeros.
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

  // i = o * stride - padding + k * dilation, mirrored at both ends if the padding reflects
  static Axis strided(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                      bool reflect) {
    Axis axis{kernel, std::vector<int64_t>(static_cast<size_t>(out * kernel), -1), {}};
    for (int64_t o = 0; o < out; ++o) {
      std::vector<int64_t> reached, inside;
      for (int64_t k = 0; k < kernel; ++k) {
        int64_t i = o * stride - padding + k * dilation;
        if (reflect) i = reflected(i, in);
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
    for (Class& existing : classes)
      if (existing.taps == reached) return existing.positions.push_back(position);
    classes.push_back({reached, {position}});
  }
};

inline Axis axis_of(const Geometry& conv, int i) {
  const int64_t in = i ? conv.iw : conv.ih, out = i ? conv.ow : conv.oh, kernel = i ? conv.kw : conv.kh;
  return conv.transposed
             ? Axis::transposed(in, out, kernel, conv.stride[i], conv.padding[i], conv.dilation[i])
             : Axis::strided(in, out, kernel, conv.stride[i], conv.padding[i], conv.dilation[i], conv.reflect);
}

// The same for Winograd's algorithm. Either position t of a phase is the output o = t * out_step + phase, or the output
// t is the sum over the phases of the input. Tap u of position t reads source[phase][t + u], -1 outside, and is the
// kernel's tap[phase][u], -1 beyond the kernel.
struct WinogradAxis {
  int64_t kernel, out, in_step, out_step;
  std::vector<std::vector<int64_t>> source, tap;

  int64_t phases() const { return in_step * out_step; }
  int64_t positions() const { return ceil_div(out, out_step); }
  // Whether a phase's transformed weights are not all zero at point i of n: the first point is tap 0 itself, the last
  // point the last tap.
  bool has(int64_t phase, int64_t i, int64_t n) const {
    return (i > 0 || tap[phase].front() >= 0) && (i < n - 1 || tap[phase].back() >= 0);
  }

  bool phases_read_the_same() const {
    return std::all_of(source.begin(), source.end(), [&](const auto& phase) { return phase == source.front(); });
  }

  // i = o * stride + k - padding.
  static WinogradAxis strided(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, bool reflect) {
    WinogradAxis axis{kernel, out, stride, 1, {}, {}};
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t r = ceil_div(kernel, stride);
      axis.add(in, r, stride, phase - padding, reflect);
      for (int64_t u = 0; u < r; ++u) axis.add_tap(phase + stride * u);
    }
    return axis;
  }

  // o + padding = i * stride + k. With stride 1, the data gradient of `strided`.
  static WinogradAxis transposed(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding) {
    WinogradAxis axis{kernel, out, 1, stride, {}, {}};
    const int64_t r = ceil_div(kernel, stride), latest = (stride - 1 + padding) / stride;
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t from = (phase + padding) / stride, k = (phase + padding) % stride;
      const bool late =
          from < latest && k + stride * (r - 1) >= kernel;  // has no first tap, and reads what the last phase reads
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

inline WinogradAxis winograd_axis_of(const Geometry& conv, int i) {
  const int64_t in = i ? conv.iw : conv.ih, out = i ? conv.ow : conv.oh, kernel = i ? conv.kw : conv.kh;
  return conv.transposed ? WinogradAxis::transposed(in, out, kernel, conv.stride[i], conv.padding[i])
                         : WinogradAxis::strided(in, out, kernel, conv.stride[i], conv.padding[i], conv.reflect);
}

}  // namespace fastgen::cpu::FASTGEN_ISA
