// A convolution with few output channels, such as those of an image: one matrix product computes the taps of a kernel
// row as if they were output channels, and the output is their sum. Included once per instruction set (see isa.h),
// after epilogue.h.
namespace fastgen::cpu::FASTGEN_ISA {

// y[oh][ow][c] = sum over kw of t[column(ow, kw)][kw * channels + c], t = sum over kh of x[row(oh, kh)] w[kh].
struct Rows {
  // Output positions ow, ow + ow_step, ... that read the input positions iw, iw + iw_step, ... through the tap kw.
  struct Run {
    int64_t kw, ow, ow_step, iw, iw_step, count;
  };
  Axis axis;
  int64_t taps, channels;
  std::vector<Run> runs;

  Rows(Axis rows, const Axis& columns, int64_t channels_)
      : axis(std::move(rows)), taps(columns.taps), channels(channels_) {
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

template <bool dot, class T, int vectors>
void run(Output<T, vectors>& output, const Rows& rows, const Acc<T>* x, const Acc<T>* packed,
         const ParallelFor& parallel) {
  using A = Acc<T>;
  constexpr int64_t width = Output<T, vectors>::width;
  const Geometry& conv = output.conv;
  const Epilogue& epilogue = output.epilogue;
  const int64_t columns = rows.blocks(width) * width;
  parallel(epilogue.n * conv.oh, [&](int64_t begin, int64_t end) {
    A* const t = thread_scratch<A>(conv.iw * columns + epilogue.c * conv.ow);
    A* const z = t + conv.iw * columns;  // (c, ow)
    const A** const weights = thread_scratch<const A*>(conv.kh * (kPixels + 1));
    const A** const sources = weights + conv.kh;
    A* to[kPixels];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / conv.oh, oh = item % conv.oh;
      for (int64_t block = 0; block < rows.blocks(width); ++block)
        for (int64_t iw = 0; iw < conv.iw; iw += kPixels) {
          const int64_t height = std::min<int64_t>(kPixels, conv.iw - iw);
          int64_t taps = 0;
          for (int64_t kh = 0; kh < conv.kh; ++kh) {
            const int64_t ih = rows.axis.source[oh * conv.kh + kh];
            if (ih < 0) continue;
            for (int64_t p = 0; p < height; ++p)
              sources[taps * kPixels + p] = x + ((image * conv.ih + ih) * conv.iw + iw + p) * conv.ic;
            weights[taps++] = packed + (kh * rows.blocks(width) + block) * conv.ic * width;
          }
          for (int64_t p = 0; p < height; ++p) to[p] = t + (iw + p) * columns + block * width;
          kTiles<A, vectors, dot>[height - 1](sources, weights, taps, conv.ic, to);
        }
      for (int64_t channel = 0; channel < epilogue.c; ++channel)
        std::fill_n(z + channel * conv.ow, conv.ow, output.bias ? output.bias[channel] : A(0));
      for (const Rows::Run& run : rows.runs)
        for (int64_t channel = 0; channel < epilogue.c; ++channel) {
          A* to = z + channel * conv.ow + run.ow;
          const A* from = t + run.iw * columns + run.kw * epilogue.c + channel;
          for (int64_t i = 0; i < run.count; ++i) to[i * run.ow_step] += from[i * run.iw_step * columns];
        }
      if (output.pre) output.put_row(z, output.pre, image, oh);
      if (!output.out) continue;
      for (int64_t channel = 0; channel < epilogue.c; ++channel)
        for (int64_t ow = 0; ow < conv.ow; ++ow) {
          A& value = z[channel * conv.ow + ow];
          if (output.affine)
            value = (value - output.affine->center[channel]) * output.affine->scale[channel] +
                    output.affine->shift[channel];
          if (output.residual) value += load(output.residual + output.at(image, channel, oh * conv.ow + ow));
        }
      activate_block(epilogue.activation, z, epilogue.c * conv.ow, static_cast<A>(epilogue.negative_slope));
      output.put_row(z, output.out, image, oh);
    }
  });
}

}  // namespace fastgen::cpu::FASTGEN_ISA
