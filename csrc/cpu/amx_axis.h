// How a convolution by tiles reads the input along one axis. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

// Position t of output phase q is the output t * out_step + q. For each of its taps it reads position t + shift of one
// of the input's phases, phase p of which holds the pixels position * in_step + p. So all taps step by one position.
struct PhasedAxis {
  struct Tap {
    int64_t kernel, phase, shift;
  };
  int64_t in, out, in_step = 1, out_step = 1;
  bool reflect = false;
  std::vector<std::vector<Tap>> taps;  // of each output phase
  int64_t before = 0, after = 0;       // how far the taps reach beyond the position's own

  int64_t positions(int64_t phase = 0) const { return ceil_div(out - phase, out_step); }

  // The pixel at a position of an input phase, -1 outside.
  int64_t pixel(int64_t phase, int64_t position) const {
    int64_t i = position * in_step + phase;
    if (reflect) i = reflected(i, in);
    return i < 0 || i >= in ? -1 : i;
  }

  // o + padding = i * stride + k * dilation
  static PhasedAxis transposed(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                               int64_t dilation) {
    PhasedAxis axis{in, out, 1, stride, false, {}};
    for (int64_t phase = 0; phase < stride; ++phase) {
      axis.taps.emplace_back();
      for (int64_t k = 0; k < kernel; ++k)
        if ((phase + padding - k * dilation) % stride == 0) axis.add({k, 0, (phase + padding - k * dilation) / stride});
    }
    return axis;
  }

  // i = o * stride - padding + k * dilation, mirrored at both ends when the padding reflects
  static PhasedAxis strided(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                            bool reflect) {
    PhasedAxis axis{in, out, stride, 1, reflect, {}};
    axis.taps.emplace_back();
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t offset = k * dilation - padding, phase = (offset % stride + stride) % stride;
      axis.add({k, phase, (offset - phase) / stride});
    }
    return axis;
  }

 private:
  void add(const Tap& tap) {
    taps.back().push_back(tap);
    before = std::max(before, -tap.shift);
    after = std::max(after, tap.shift);
  }
};

inline PhasedAxis phased_axis_of(const Geometry& conv, int i) {
  const int64_t in = i ? conv.iw : conv.ih, out = i ? conv.ow : conv.oh, kernel = i ? conv.kw : conv.kh;
  return conv.transposed
             ? PhasedAxis::transposed(in, out, kernel, conv.stride[i], conv.padding[i], conv.dilation[i])
             : PhasedAxis::strided(in, out, kernel, conv.stride[i], conv.padding[i], conv.dilation[i], conv.reflect);
}

}  // namespace fastgen::cpu::FASTGEN_ISA
