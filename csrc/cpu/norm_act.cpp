#include "cpu/norm_act.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/norm_act.cpp"
#include "cpu/isa.h"

#include "cpu/block.h"

namespace fastgen::cpu::FASTGEN_ISA {

// A channel's coefficient: the same for a whole plane (contiguous), or one an element of a row (channels_last).
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

// Calls body(offset, count, sample, channel) for blocks that cover elements of x in memory order. Contiguous: each within one
// plane, `channel` is the plane's; channels_last: each within one row, `channel` is the first element's.
template <class Body>
void for_each_block(const NormAct& op, int64_t begin_row, int64_t end_row, const Body& body) {
  const int64_t length = op.channels_last ? op.c : op.s;
  for (int64_t row = begin_row; row < end_row; ++row) {
    const int64_t sample = row / (op.channels_last ? op.s : op.c);
    for (int64_t i = 0; i < length; i += kBlock)
      body(row * length + i, std::min(kBlock, length - i), sample, op.channels_last ? i : row % op.c);
  }
}

inline int64_t row_count(const NormAct& op) { return op.n * (op.channels_last ? op.s : op.c); }

template <class T>
void apply(const NormAct& op, const void* x_, const void* mean, const void* var, const void* weight, const void* bias, void* out_,
           const ParallelFor& parallel) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  const A slope = static_cast<A>(op.negative_slope);
  if (!op.normalize) {
    const int64_t size = op.n * op.c * op.s;
    parallel(ceil_div(size, kBlock), [&](int64_t begin, int64_t end) {
      A z[kBlock];
      for (int64_t i = begin * kBlock; i < std::min(end * kBlock, size); i += kBlock) {
        const int64_t count = std::min(kBlock, size - i);
        load_block(x + i, z, count);
        activate_block(op.activation, z, count, slope);
        store_block(out + i, z, count);
      }
    });
    return;
  }
  const Affine<A> affine(op, mean, var, weight, bias);
  parallel(row_count(op), [&](int64_t begin, int64_t end) {
    A z[kBlock];
    for_each_block(op, begin, end, [&](int64_t at, int64_t count, int64_t sample, int64_t channel) {
      const int64_t k = (op.per_sample ? sample * op.c : 0) + channel;
      const auto run = [&](auto center, auto scale, auto shift) {
        for (int64_t i = 0; i < count; ++i) z[i] = (load(x + at + i) - center[i]) * scale[i] + shift[i];
      };
      if (op.channels_last)
        run(Each<A>{affine.center + k}, Each<A>{affine.scale.get() + k}, Each<A>{affine.shift + channel});
      else
        run(Same<A>{affine.center[k]}, Same<A>{affine.scale[k]}, Same<A>{affine.shift[channel]});
      activate_block(op.activation, z, count, slope);
      store_block(out + at, z, count);
    });
  });
}

// Reductions run over chunks of the pixels whose size does not depend on the thread count, and so neither does the result.
inline int64_t rows_a_chunk(const NormAct& op) { return op.channels_last ? std::max<int64_t>(64, ceil_div(op.s, 128)) : op.s; }

// Moments of one contiguous plane: blocks in two passes, merged in double.
template <class T>
Moments<double> plane_moments(const T* x, int64_t size) {
  using A = Acc<T>;
  A block[kBlock];
  Moments<double> all;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t count = std::min(kBlock, size - i);
    load_block(x + i, block, count);
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; ++j) total += block[j];
    const A mean = total / static_cast<A>(count);
    double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t j = 0; j < count; ++j) {
      const double d = block[j] - mean;
      sum += d;
      squares += d * d;
    }
    all.merge(moments_about(mean, sum, squares, count));
  }
  return all;
}

template <class T>
void moments(const NormAct& op, const void* x_, void* mean, void* var, const ParallelFor& parallel) {
  const T* x = static_cast<const T*>(x_);
  const int64_t chunk = rows_a_chunk(op), chunks = ceil_div(op.s, chunk);
  std::vector<Moments<double>> parts(static_cast<size_t>(op.n * chunks * op.c));  // (n, chunks, c)
  parallel(op.channels_last ? op.n * chunks : op.n * op.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!op.channels_last) {
        parts[i] = plane_moments(x + i * op.s, op.s);
        continue;
      }
      const int64_t row = (i % chunks) * chunk;
      column_moments(x + ((i / chunks) * op.s + row) * op.c, std::min(chunk, op.s - row), op.c, parts.data() + i * op.c);
    }
  });
  merge_moments(op, parts, chunks, mean, var);
}

template <class T>
void backward(const NormAct& op, const void* grad_out_, const void* x_, const void* mean, const void* var, const void* weight,
              const void* bias, void* grad_x_, void* grad_weight, void* grad_bias, const ParallelFor& parallel) {
  using A = Acc<T>;
  const T* grad_out = static_cast<const T*>(grad_out_);
  const T* x = static_cast<const T*>(x_);
  T* grad_x = static_cast<T*>(grad_x_);
  const A slope = static_cast<A>(op.negative_slope);
  if (!op.normalize) {
    const int64_t size = op.n * op.c * op.s;
    parallel(ceil_div(size, kBlock), [&](int64_t begin, int64_t end) {
      A g[kBlock], z[kBlock];
      for (int64_t i = begin * kBlock; i < std::min(end * kBlock, size); i += kBlock) {
        const int64_t count = std::min(kBlock, size - i);
        load_block(grad_out + i, g, count);
        load_block(x + i, z, count);
        activate_grad_block(op.activation, g, z, count, slope);
        store_block(grad_x + i, g, count);
      }
    });
    return;
  }

  const Affine<A> affine(op, mean, var, weight, bias);
  // g = grad_out * act'(z) of one block
  const auto grad_block = [&](int64_t at, int64_t count, auto center, auto scale, auto shift, A* g, A* z) {
    for (int64_t i = 0; i < count; ++i) z[i] = (load(x + at + i) - center[i]) * scale[i] + shift[i];
    load_block(grad_out + at, g, count);
    activate_grad_block(op.activation, g, z, count, slope);
  };

  // Pass 1: sums of g and of g * (x - mean), a (sample, chunk, channel), in double.
  const int64_t chunk = rows_a_chunk(op), chunks = ceil_div(op.s, chunk);
  const int64_t parts = op.n * chunks * op.c;
  std::vector<double> sums_g(static_cast<size_t>(parts)), sums_gx(static_cast<size_t>(parts));
  parallel(op.channels_last ? op.n * chunks : op.n * op.c, [&](int64_t begin, int64_t end) {
    A g[kBlock], z[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      if (!op.channels_last) {
        for_each_block(op, i, i + 1, [&](int64_t at, int64_t count, int64_t, int64_t channel) {
          const int64_t k = op.per_sample ? i : channel;
          const A center = affine.center[k];
          grad_block(at, count, Same<A>{center}, Same<A>{affine.scale[k]}, Same<A>{affine.shift[channel]}, g, z);
          double sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
          for (int64_t j = 0; j < count; ++j) {
            sum_g += g[j];
            sum_gx += g[j] * (load(x + at + j) - center);
          }
          sums_g[i] += sum_g;
          sums_gx[i] += sum_gx;
        });
        continue;
      }
      const int64_t sample = i / chunks, first_row = sample * op.s + i % chunks * chunk;
      for_each_block(op, first_row, std::min((sample + 1) * op.s, first_row + chunk), [&](int64_t at, int64_t count, int64_t, int64_t channel) {
        const int64_t k = (op.per_sample ? sample * op.c : 0) + channel;
        const A* center = affine.center + k;
        grad_block(at, count, Each<A>{center}, Each<A>{affine.scale.get() + k}, Each<A>{affine.shift + channel}, g, z);
        double* sum_g = sums_g.data() + i * op.c + channel;
        double* sum_gx = sums_gx.data() + i * op.c + channel;
        for (int64_t j = 0; j < count; ++j) {
          sum_g[j] += g[j];
          sum_gx[j] += g[j] * (load(x + at + j) - center[j]);
        }
      });
    }
  });

  // Pass 2: dx = scale * (g - sum(g) / m - (x - mean) * rstd^2 * sum(g * (x - mean)) / m), the last two only through batch statistics.
  const int64_t groups = op.per_sample ? op.n : 1, merged = op.per_sample ? chunks : op.n * chunks;
  const double m = static_cast<double>((op.per_sample ? 1 : op.n) * op.s);
  auto offset = scratch<A>(groups * op.c), slope_x = scratch<A>(groups * op.c);
  std::fill_n(static_cast<A*>(grad_weight), op.c, A(0));
  std::fill_n(static_cast<A*>(grad_bias), op.c, A(0));
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t channel = 0; channel < op.c; ++channel) {
      double g = 0, gx = 0;
      for (int64_t part = group * merged; part < (group + 1) * merged; ++part) {
        g += sums_g[part * op.c + channel];
        gx += sums_gx[part * op.c + channel];
      }
      const int64_t k = group * op.c + channel;
      const double rstd = affine.rstd[k];
      static_cast<A*>(grad_bias)[channel] += static_cast<A>(g);
      static_cast<A*>(grad_weight)[channel] += static_cast<A>(gx * rstd);
      offset[k] = op.batch_stats ? static_cast<A>(g / m) : A(0);
      slope_x[k] = op.batch_stats ? static_cast<A>(rstd * rstd * gx / m) : A(0);
    }
  parallel(row_count(op), [&](int64_t begin, int64_t end) {
    A g[kBlock], z[kBlock];
    for_each_block(op, begin, end, [&](int64_t at, int64_t count, int64_t sample, int64_t channel) {
      const int64_t k = (op.per_sample ? sample * op.c : 0) + channel;
      const auto run = [&](auto center, auto scale, auto shift, auto off, auto slope_of_x) {
        grad_block(at, count, center, scale, shift, g, z);
        for (int64_t i = 0; i < count; ++i)
          g[i] = scale[i] * (g[i] - off[i] - (load(x + at + i) - center[i]) * slope_of_x[i]);
      };
      if (op.channels_last)
        run(Each<A>{affine.center + k}, Each<A>{affine.scale.get() + k}, Each<A>{affine.shift + channel}, Each<A>{offset.get() + k},
            Each<A>{slope_x.get() + k});
      else
        run(Same<A>{affine.center[k]}, Same<A>{affine.scale[k]}, Same<A>{affine.shift[channel]}, Same<A>{offset[k]},
            Same<A>{slope_x[k]});
      store_block(grad_x + at, g, count);
    });
  });
}

inline void norm_act_moments(const NormAct& op, const void* x, void* mean, void* var, const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, moments, op, x, mean, var, parallel)
}

inline void norm_act_apply(const NormAct& op, const void* x, const void* mean, const void* var, const void* weight, const void* bias,
                           void* out, const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, apply, op, x, mean, var, weight, bias, out, parallel)
}

inline void norm_act_backward(const NormAct& op, const void* grad_out, const void* x, const void* mean, const void* var,
                              const void* weight, const void* bias, void* grad_x, void* grad_weight, void* grad_bias,
                              const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, backward, op, grad_out, x, mean, var, weight, bias, grad_x, grad_weight, grad_bias, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void merge_moments(const NormAct& op, const std::vector<Moments<double>>& parts, int64_t chunks, void* mean, void* var) {
  const int64_t groups = op.per_sample ? op.n : 1, merged = op.per_sample ? chunks : op.n * chunks;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t channel = 0; channel < op.c; ++channel) {
      Moments<double> all;
      for (int64_t part = 0; part < merged; ++part) all.merge(parts[(group * merged + part) * op.c + channel]);
      const int64_t k = group * op.c + channel;
      const double variance = all.m2 / all.count;
      if (op.dtype == DType::float64) {
        static_cast<double*>(mean)[k] = all.mean;
        static_cast<double*>(var)[k] = variance;
      } else {
        static_cast<float*>(mean)[k] = static_cast<float>(all.mean);
        static_cast<float*>(var)[k] = static_cast<float>(variance);
      }
    }
}

void norm_act_moments(const NormAct& op, const void* x, void* mean, void* var, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(norm_act_moments, op, x, mean, var, parallel)
}

void norm_act_apply(const NormAct& op, const void* x, const void* mean, const void* var, const void* weight, const void* bias,
                    void* out, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(norm_act_apply, op, x, mean, var, weight, bias, out, parallel)
}

void norm_act_backward(const NormAct& op, const void* grad_out, const void* x, const void* mean, const void* var,
                       const void* weight, const void* bias, void* grad_x, void* grad_weight, void* grad_bias,
                       const ParallelFor& parallel) {
  FASTGEN_DISPATCH(norm_act_backward, op, grad_out, x, mean, var, weight, bias, grad_x, grad_weight, grad_bias, parallel)
}

}  // namespace fastgen::cpu
#endif
