#include "cpu/norm_act.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/norm_act.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"
#include "cpu/block.h"

namespace fastgen::cpu::FASTGEN_ISA {

// A channel's coefficient: the same for a whole plane (contiguous), or one per element of a row (channels_last).
template <class A>
struct Same {
  A value;
  A operator[](int64_t) const { return value; }
};
template <class A>
struct Each {
  const A* values;
  A operator[](int64_t i) const { return values[i]; }
};

// With few channels, this many pixels make one row of the loops below: a power of two that divides the pixels. The
// coefficients and the sums are repeated once per pixel of the row.
inline int64_t pixels_per_row(const Epilogue& epilogue) {
  int64_t pixels = 1;
  while (epilogue.channels_last && epilogue.s % (2 * pixels) == 0 && 2 * pixels * epilogue.c <= kBlock) pixels *= 2;
  return pixels;
}

// A run of elements within one row of x: a plane (n, c) when contiguous, pixels (n, s) when channels_last.
struct Block {
  int64_t at, count;  // in x
  int64_t channel;    // of the plane, or of the first element
  int64_t k;          // of the coefficients, (rows of stats, c)
};

inline int64_t rows_per_sample(const Epilogue& epilogue) {
  return epilogue.channels_last ? epilogue.s / pixels_per_row(epilogue) : epilogue.c;
}

template <class Body>
void for_each_block(const Epilogue& epilogue, int64_t begin_row, int64_t end_row, const Body& body) {
  const int64_t length = epilogue.channels_last ? pixels_per_row(epilogue) * epilogue.c : epilogue.s,
                rows = rows_per_sample(epilogue);
  for (int64_t row = begin_row; row < end_row; ++row) {
    const int64_t coefficients = epilogue.per_sample ? row / rows * (epilogue.channels_last ? length : epilogue.c) : 0;
    for (int64_t i = 0; i < length; i += kBlock) {
      const int64_t channel = epilogue.channels_last ? i : row % epilogue.c;
      body(Block{row * length + i, std::min(kBlock, length - i), channel, coefficients + channel});
    }
  }
}

// The same, but over elements only, where nothing depends on the channel.
template <class Body>
void for_each_element_block(const Epilogue& epilogue, const ParallelFor& parallel, const Body& body) {
  const int64_t size = epilogue.n * epilogue.c * epilogue.s;
  parallel(ceil_div(size, kBlock), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < std::min(end * kBlock, size); i += kBlock) body(i, std::min(kBlock, size - i));
  });
}

// Calls body(coefficient) with each array of coefficients in the form that the layout needs.
template <class A, class Body>
inline void with_coefficients(const Epilogue& epilogue, const Affine<A>& affine, const Block& block, const Body& body) {
  const A *center = affine.center.get() + block.k, *scale = affine.scale.get() + block.k,
          *shift = affine.shift.get() + block.channel;
  if (epilogue.channels_last) body(Each<A>{center}, Each<A>{scale}, Each<A>{shift});
  else body(Same<A>{*center}, Same<A>{*scale}, Same<A>{*shift});
}

// z = (x - center) * scale + shift + residual
template <class T>
inline void affine_block(const Epilogue& epilogue, const Affine<Acc<T>>& affine, const Block& block, const T* x,
                         const T* residual, Acc<T>* z) {
  with_coefficients(epilogue, affine, block, [&](auto center, auto scale, auto shift) {
    for (int64_t i = 0; i < block.count; ++i) z[i] = (load(x + block.at + i) - center[i]) * scale[i] + shift[i];
  });
  if (residual)
    for (int64_t i = 0; i < block.count; ++i) z[i] += load(residual + block.at + i);
}

template <class T>
inline void plain_block(const T* x, const T* residual, int64_t at, int64_t count, Acc<T>* z) {
  load_block(x + at, z, count);
  if (residual)
    for (int64_t i = 0; i < count; ++i) z[i] += load(residual + at + i);
}

template <class T>
void apply(const Epilogue& epilogue, const void* x_, void* out_, const ParallelFor& parallel) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(x_);
  const T* residual = static_cast<const T*>(epilogue.residual);
  T* out = static_cast<T*>(out_);
  const A slope = static_cast<A>(epilogue.negative_slope);
  if (!epilogue.normalize) {
    for_each_element_block(epilogue, parallel, [&](int64_t at, int64_t count) {
      A buffer[kBlock];
      A* const z = staging(out + at, buffer);
      plain_block(x, residual, at, count, z);
      activate_block(epilogue.activation, z, count, slope);
      flush(out + at, z, count);
    });
    return;
  }
  const Affine<A> affine(epilogue, pixels_per_row(epilogue));
  parallel(epilogue.n * rows_per_sample(epilogue), [&](int64_t begin, int64_t end) {
    A buffer[kBlock];
    for_each_block(epilogue, begin, end, [&](const Block& block) {
      A* const z = staging(out + block.at, buffer);
      affine_block(epilogue, affine, block, x, residual, z);
      activate_block(epilogue.activation, z, block.count, slope);
      flush(out + block.at, z, block.count);
    });
  });
}

// Reductions run over chunks of pixels. Their size in rows does not depend on the thread count, so the result does not
// either.
inline int64_t rows_per_chunk(const Epilogue& epilogue) {
  if (!epilogue.channels_last) return 1;
  const int64_t pixels = std::max(ceil_div(32768, epilogue.c), ceil_div(epilogue.s, 128));
  return ceil_div(pixels, pixels_per_row(epilogue));
}
inline int64_t chunks_per_sample(const Epilogue& epilogue) {
  return epilogue.channels_last ? ceil_div(rows_per_sample(epilogue), rows_per_chunk(epilogue)) : 1;
}

// Moments of one contiguous plane: blocks in two passes, merged in double.
template <class T>
Moments<double> plane_moments(const T* x, int64_t size) {
  using A = Acc<T>;
  A block[kBlock];
  Moments<double> result;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t count = std::min(kBlock, size - i);
    load_block(x + i, block, count);
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; ++j) total += block[j];
    const A mean = total / static_cast<A>(count);
    A sum = 0, squares = 0;  // each lane of the vector adds at most 32 values
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t j = 0; j < count; ++j) {
      const A d = block[j] - mean;
      sum += d;
      squares += d * d;
    }
    result.merge(moments_about(mean, sum, squares, count));
  }
  return result;
}

template <class T>
void moments(const Epilogue& epilogue, const void* x_, void* mean, void* var, const ParallelFor& parallel) {
  const T* x = static_cast<const T*>(x_);
  const int64_t chunk = rows_per_chunk(epilogue), chunks = chunks_per_sample(epilogue),
                rows = rows_per_sample(epilogue), pixels = pixels_per_row(epilogue);
  std::vector<Moments<double>> parts(
      static_cast<size_t>(epilogue.n * chunks * pixels * epilogue.c));  // (n, chunks, pixels of a row, c)
  parallel(epilogue.channels_last ? epilogue.n * chunks : epilogue.n * epilogue.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!epilogue.channels_last) {
        parts[i] = plane_moments(x + i * epilogue.s, epilogue.s);
        continue;
      }
      const int64_t row = i % chunks * chunk, length = pixels * epilogue.c;
      column_moments(x + (i / chunks * rows + row) * length, std::min(chunk, rows - row), length,
                     parts.data() + i * length);
    }
  });
  merge_moments(epilogue, parts, chunks * pixels, mean, var);
}

// Adds the sums of g and of g * (x - center).
template <class T>
void add_sums(const Acc<T>* g, const T* x, Acc<T> center, int64_t count, double& sum_g, double& sum_gx) {
  Acc<T> partial_g = 0, partial_gx = 0;
#pragma omp simd reduction(+ : partial_g, partial_gx)
  for (int64_t i = 0; i < count; ++i) {
    partial_g += g[i];
    partial_gx += g[i] * (load(x + i) - center);
  }
  sum_g += partial_g;
  sum_gx += partial_gx;
}

// The gradient through the statistics of x, as coefficients like Affine's: dx = scale * g - offset - (x - mean) *
// slope.
template <class A>
struct StatsGrad {
  Buffer<A> offset, slope;
};

// Computes the gradients of weight and bias, and StatsGrad, from the sums of g and of g * (x - mean).
template <class A>
StatsGrad<A> merge_sums(const Epilogue& epilogue, const Affine<A>& affine, const std::vector<double>& g,
                        const std::vector<double>& gx, int64_t chunks, A* grad_weight, A* grad_bias) {
  const int64_t rows = epilogue.rows_of_stats(), parts_per_row = epilogue.per_sample ? chunks : epilogue.n * chunks,
                size = rows * epilogue.stats_groups;
  const int64_t period = pixels_per_row(epilogue) * epilogue.c;
  const double count =
      static_cast<double>((epilogue.per_sample ? 1 : epilogue.n) * epilogue.s * (epilogue.c / epilogue.stats_groups));
  std::vector<double> group_g(static_cast<size_t>(size)), group_gx(static_cast<size_t>(size)),
      weight(static_cast<size_t>(epilogue.c)), bias(static_cast<size_t>(epilogue.c));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t channel = 0; channel < epilogue.c; ++channel) {
      double sum_g = 0, sum_gx = 0;
      for (int64_t part = row * parts_per_row; part < (row + 1) * parts_per_row; ++part) {
        sum_g += g[part * epilogue.c + channel];
        sum_gx += gx[part * epilogue.c + channel];
      }
      const int64_t k = row * period + channel;
      bias[channel] += sum_g;
      weight[channel] += sum_gx * affine.rstd[k];
      group_g[epilogue.stats_index(row, channel)] += sum_g * affine.scale[k];
      group_gx[epilogue.stats_index(row, channel)] += sum_gx * affine.scale[k];
    }
  std::copy(weight.begin(), weight.end(), grad_weight);
  std::copy(bias.begin(), bias.end(), grad_bias);
  StatsGrad<A> result{scratch<A>(rows * period), scratch<A>(rows * period)};
  for (int64_t k = 0; k < rows * period; ++k) {
    const int64_t group = epilogue.stats_index(k / period, k % period % epilogue.c);
    const double rstd = affine.rstd[k];
    result.offset[k] = epilogue.batch_stats ? static_cast<A>(group_g[group] / count) : A(0);
    result.slope[k] = epilogue.batch_stats ? static_cast<A>(rstd * rstd * group_gx[group] / count) : A(0);
  }
  return result;
}

template <class T>
void backward(const Epilogue& epilogue, const void* grad_out_, const void* x_, const NormActGrads& grads,
              const ParallelFor& parallel) {
  using A = Acc<T>;
  const T* grad_out = static_cast<const T*>(grad_out_);
  const T* x = static_cast<const T*>(x_);
  const T* residual = static_cast<const T*>(epilogue.residual);
  T* grad_x = static_cast<T*>(grads.x);
  T* grad_residual = static_cast<T*>(grads.residual);
  const A slope = static_cast<A>(epilogue.negative_slope);
  if (!epilogue.normalize) {
    for_each_element_block(epilogue, parallel, [&](int64_t at, int64_t count) {
      A g_buffer[kBlock], z_buffer[kBlock], buffer[kBlock];
      A* const g = staging(grad_x + at, g_buffer);
      const A* z = view(x + at, z_buffer, count);
      if (residual) {
        plain_block(x, residual, at, count, z_buffer);
        z = z_buffer;
      }
      activate_grad_block(epilogue.activation, view(grad_out + at, buffer, count), z, g, count, slope);
      flush(grad_x + at, g, count);
      if (grad_residual) store_block(grad_residual + at, g, count);
    });
    return;
  }

  const Affine<A> affine(epilogue, pixels_per_row(epilogue));
  // g = grad_out * act'(z)
  const auto grad_block = [&](const Block& block, A* g) {
    A z[kBlock], buffer[kBlock];
    affine_block(epilogue, affine, block, x, residual, z);
    activate_grad_block(epilogue.activation, view(grad_out + block.at, buffer, block.count), z, g, block.count, slope);
  };

  // Pass 1: sums of g and of g * (x - mean) per (sample, chunk, channel): short runs are summed in A, and the runs in
  // double.
  const int64_t chunk = rows_per_chunk(epilogue), chunks = chunks_per_sample(epilogue),
                rows = rows_per_sample(epilogue), pixels = pixels_per_row(epilogue);
  const int64_t period = pixels * epilogue.c;
  std::vector<double> sums_g(static_cast<size_t>(epilogue.n * chunks * period)),
      sums_gx(static_cast<size_t>(epilogue.n * chunks * period));
  parallel(epilogue.channels_last ? epilogue.n * chunks : epilogue.n * epilogue.c, [&](int64_t begin, int64_t end) {
    constexpr int64_t run = 16;
    A g[kBlock];
    auto sum_g = scratch<A>(period), sum_gx = scratch<A>(period);
    for (int64_t i = begin; i < end; ++i) {
      if (!epilogue.channels_last) {
        for_each_block(epilogue, i, i + 1, [&](const Block& block) {
          grad_block(block, g);
          add_sums(g, x + block.at, affine.center[block.k], block.count, sums_g[i], sums_gx[i]);
        });
        continue;
      }
      const int64_t first = i / chunks * rows + i % chunks * chunk,
                    last = std::min((i / chunks + 1) * rows, first + chunk);
      for (int64_t row = first; row < last; row += run) {
        std::fill_n(sum_g.get(), period, A(0));
        std::fill_n(sum_gx.get(), period, A(0));
        for_each_block(epilogue, row, std::min(last, row + run), [&](const Block& block) {
          grad_block(block, g);
          const A* center = affine.center.get() + block.k;
          A *to_g = sum_g.get() + block.channel, *to_gx = sum_gx.get() + block.channel;
          for (int64_t j = 0; j < block.count; ++j) {
            to_g[j] += g[j];
            to_gx[j] += g[j] * (load(x + block.at + j) - center[j]);
          }
        });
        for (int64_t j = 0; j < period; ++j) {
          sums_g[i * period + j] += sum_g[j];
          sums_gx[i * period + j] += sum_gx[j];
        }
      }
    }
  });

  // Pass 2: dx = scale * g - offset - (x - mean) * slope.
  const StatsGrad<A> stats = merge_sums(epilogue, affine, sums_g, sums_gx, chunks * pixels,
                                        static_cast<A*>(grads.weight), static_cast<A*>(grads.bias));
  parallel(epilogue.n * rows_per_sample(epilogue), [&](int64_t begin, int64_t end) {
    A buffer[kBlock];
    for_each_block(epilogue, begin, end, [&](const Block& block) {
      A* const g = staging(grad_x + block.at, buffer);
      grad_block(block, g);
      if (grad_residual) store_block(grad_residual + block.at, g, block.count);
      const A *offsets = stats.offset.get() + block.k, *x_slopes = stats.slope.get() + block.k;
      const auto run = [&](auto center, auto scale, auto offset, auto x_slope) {
        for (int64_t i = 0; i < block.count; ++i)
          g[i] = scale[i] * g[i] - offset[i] - (load(x + block.at + i) - center[i]) * x_slope[i];
      };
      with_coefficients(epilogue, affine, block, [&](auto center, auto scale, auto) {
        if constexpr (std::is_same_v<decltype(center), Each<A>>)
          run(center, scale, Each<A>{offsets}, Each<A>{x_slopes});
        else run(center, scale, Same<A>{*offsets}, Same<A>{*x_slopes});
      });
      flush(grad_x + block.at, g, block.count);
    });
  });
}

inline void norm_act_moments(const Epilogue& epilogue, const void* x, void* mean, void* var,
                             const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(epilogue.dtype, moments, epilogue, x, mean, var, parallel)
}

inline void norm_act_apply(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(epilogue.dtype, apply, epilogue, x, out, parallel)
}

inline void norm_act_backward(const Epilogue& epilogue, const void* grad_out, const void* x, const NormActGrads& grads,
                              const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(epilogue.dtype, backward, epilogue, grad_out, x, grads, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void merge_moments(const Epilogue& epilogue, const std::vector<Moments<double>>& parts, int64_t chunks, void* mean,
                   void* var) {
  const int64_t parts_per_row = epilogue.per_sample ? chunks : epilogue.n * chunks,
                channels = epilogue.c / epilogue.stats_groups;
  for (int64_t row = 0; row < epilogue.rows_of_stats(); ++row)
    for (int64_t group = 0; group < epilogue.stats_groups; ++group) {
      Moments<double> total;
      for (int64_t part = row * parts_per_row; part < (row + 1) * parts_per_row; ++part)
        for (int64_t channel = group * channels; channel < (group + 1) * channels; ++channel)
          total.merge(parts[part * epilogue.c + channel]);
      const int64_t k = row * epilogue.stats_groups + group;
      const double variance = total.m2 / total.count;
      if (epilogue.dtype == DType::float64) {
        static_cast<double*>(mean)[k] = total.mean;
        static_cast<double*>(var)[k] = variance;
      } else {
        static_cast<float*>(mean)[k] = static_cast<float>(total.mean);
        static_cast<float*>(var)[k] = static_cast<float>(variance);
      }
    }
}

void norm_act_moments(const Epilogue& epilogue, const void* x, void* mean, void* var, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(norm_act_moments, epilogue, x, mean, var, parallel)
}

void norm_act_apply(const Epilogue& epilogue, const void* x, void* out, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(norm_act_apply, epilogue, x, out, parallel)
}

void norm_act_backward(const Epilogue& epilogue, const void* grad_out, const void* x, const NormActGrads& grads,
                       const ParallelFor& parallel) {
  FASTGEN_DISPATCH(norm_act_backward, epilogue, grad_out, x, grads, parallel)
}

}  // namespace fastgen::cpu
#endif
