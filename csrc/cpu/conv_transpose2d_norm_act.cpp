#include "cpu/conv_transpose2d_norm_act.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/conv_transpose2d_norm_act.cpp"
#include "cpu/isa.h"

#include "cpu/block.h"
#include "cpu/implicit_gemm.h"

namespace fastgen::cpu::FASTGEN_ISA {

// A band: some rows of one image, or all rows of several small images; about kBandPixels output pixels, a unit of work.
constexpr int64_t kBandPixels = 1024;

// The weights as (group, block, tap, ic / groups, width), zero where a block is wider than the group's channels.
template <class T>
std::unique_ptr<Acc<T>[]> pack_weights(const ConvTranspose2d& conv, int64_t c, int64_t width, const T* weight, const ParallelFor& parallel) {
  const int64_t depth = conv.ic / conv.groups, channels = c / conv.groups, blocks = ceil_div(channels, width), taps = conv.kh * conv.kw;
  const int64_t* stride = conv.weight_strides;
  auto packed = scratch<Acc<T>>(conv.groups * blocks * taps * depth * width);
  parallel(conv.groups * blocks * depth, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % depth, block = row / depth % blocks, group = row / depth / blocks;
      const int64_t valid = std::min(width, channels - block * width);
      const T* from = weight + (group * depth + i) * stride[0] + block * width * stride[1];
      for (int64_t tap = 0; tap < taps; ++tap) {
        Acc<T>* to = packed.get() + (((group * blocks + block) * taps + tap) * depth + i) * width;
        const T* at = from + tap / conv.kw * stride[2] + tap % conv.kw * stride[3];
        for (int64_t channel = 0; channel < width; ++channel) to[channel] = channel < valid ? load(at + channel * stride[1]) : Acc<T>(0);
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
  const ConvTranspose2d& conv;
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

template <class T, int vectors>
void convolve(const ConvTranspose2d& conv, const NormAct& op, const T* x, const T* weight, const Acc<T>* bias, const Affine<Acc<T>>* affine,
              T* pre, T* out, std::vector<Moments<double>>* parts, int64_t* chunks, const ParallelFor& parallel) {
  using A = Acc<T>;
  std::unique_ptr<A[]> storage;
  const A* pixels = pixels_first(x, op.n, conv.ic, conv.ih * conv.iw, conv.x_channels_last, storage, parallel);
  const auto packed = pack_weights<T>(conv, op.c, Call<T, vectors>::width, weight, parallel);
  Call<T, vectors> call{conv, op, pixels, packed.get(), bias, affine, pre, out, parts,
                        Axis::transposed(conv.ih, conv.oh, conv.kh, conv.stride[0], conv.padding[0], conv.dilation[0]),
                        Axis::transposed(conv.iw, conv.ow, conv.kw, conv.stride[1], conv.padding[1], conv.dilation[1]),
                        std::clamp<int64_t>(kBandPixels / op.s, 1, op.n), std::clamp<int64_t>(kBandPixels / conv.ow, 1, conv.oh)};
  *chunks = call.bands_an_image();
  if (parts) parts->resize(static_cast<size_t>(op.n * *chunks * op.c));
  call.run(parallel);
}

template <class T>
void run(const ConvTranspose2d& conv, const NormAct& op, const void* x_, const void* weight_, const void* bias_, void* mean, void* var,
         const void* norm_weight, const void* norm_bias, void* pre_, void* out_, const ParallelFor& parallel) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(x_);
  const T* weight = static_cast<const T*>(weight_);
  const A* bias = static_cast<const A*>(bias_);
  T* pre = static_cast<T*>(pre_);
  T* out = static_cast<T*>(out_);
  const bool narrow = op.c / conv.groups <= Vector<A>::size;
  const auto run = narrow ? convolve<T, 1> : convolve<T, 2>;
  int64_t chunks;
  if (op.normalize && op.batch_stats) {  // the statistics come with the convolution, the rest is a pass over its output
    std::vector<Moments<double>> parts;
    T* const sum = pre ? pre : out;
    run(conv, op, x, weight, bias, nullptr, sum, nullptr, &parts, &chunks, parallel);
    merge_moments(op, parts, chunks, mean, var);
    norm_act_apply(op, sum, mean, var, norm_weight, norm_bias, out, parallel);
  } else if (op.normalize) {
    const Affine<A> affine(op, mean, var, norm_weight, norm_bias);
    run(conv, op, x, weight, bias, &affine, pre, out, nullptr, &chunks, parallel);
  } else {
    run(conv, op, x, weight, bias, nullptr, pre, out, nullptr, &chunks, parallel);
  }
}

inline void conv_transpose2d_norm_act(const ConvTranspose2d& conv, const NormAct& op, const void* x, const void* weight, const void* bias,
                                      void* mean, void* var, const void* norm_weight, const void* norm_bias, void* pre, void* out,
                                      const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, run, conv, op, x, weight, bias, mean, var, norm_weight, norm_bias, pre, out, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void conv_transpose2d_norm_act(const ConvTranspose2d& conv, const NormAct& op, const void* x, const void* weight, const void* bias,
                               void* mean, void* var, const void* norm_weight, const void* norm_bias, void* pre, void* out,
                               const ParallelFor& parallel) {
  FASTGEN_DISPATCH(conv_transpose2d_norm_act, conv, op, x, weight, bias, mean, var, norm_weight, norm_bias, pre, out, parallel)
}

}  // namespace fastgen::cpu
#endif
