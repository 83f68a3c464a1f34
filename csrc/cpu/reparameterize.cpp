#include "cpu/reparameterize.h"
#include "shared/philox.h"

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/reparameterize.cpp"
#include "cpu/isa.h"

#include "cpu/noise.h"
#include "cpu/store.h"

namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kElements = 512;         // elements per block, which stays in the first-level cache
constexpr int64_t kUnit = 16 * kElements;  // per unit of work; constant, so that sums do not depend on the thread count

// A key's rows as units of work: whole short rows, or pieces of a long one. Each piece or short row has its own sum.
struct Units {
  int64_t rows, size, pieces, rows_per_unit, units;

  explicit Units(const Reparameterize& op)
      : rows(op.rows),
        size(op.size),
        pieces(std::max<int64_t>(1, ceil_div(size, kUnit))),
        rows_per_unit(std::max<int64_t>(1, kUnit / std::max<int64_t>(1, size))),
        units(pieces > 1 ? rows * pieces : ceil_div(rows, rows_per_unit)) {}

  // body(begin, count) for each block of a unit's elements
  template <class Body>
  void for_each_block(int64_t unit, const Body& body) const {
    const int64_t begin = pieces > 1 ? unit / pieces * size + unit % pieces * kUnit : unit * rows_per_unit * size;
    const int64_t end = pieces > 1 ? std::min(begin + kUnit, (unit / pieces + 1) * size)
                                   : std::min(rows, (unit + 1) * rows_per_unit) * size;
    for (int64_t at = begin; at < end; at += kElements) body(at, std::min(kElements, end - at));
  }

  // body(row, from, to) for each row's part of a block, relative to the block
  template <class Body>
  void for_each_row(int64_t at, int64_t count, const Body& body) const {
    for (int64_t from = 0, row = at / size; from < count; ++row) {
      const int64_t to = std::min(count, (row + 1) * size - at);
      body(row, from, to);
      from = to;
    }
  }
};

// mu, the clamped logvar and exp(logvar / 2) of a block of elements.
template <class A>
struct Gaussian {
  A mu[kElements], logvar[kElements], sd[kElements];

  template <class T>
  void load_block(const Reparameterize& op, const T* mu_, const T* logvar_, int64_t count) {
    const A low = static_cast<A>(op.logvar_min), high = static_cast<A>(op.logvar_max);
    for (int64_t i = 0; i < count; ++i) {
      A l = load(logvar_ + i);
      l = l < low ? low : l;  // NaN stays NaN
      l = l > high ? high : l;
      mu[i] = load(mu_ + i);
      logvar[i] = l;
      sd[i] = exp_(A(0.5) * l);
    }
  }
};

template <class T>
inline void load_periodic(const T* p, int64_t period, int64_t at, int64_t count, Acc<T>* out) {
  for (int64_t i = 0; i < count;) {
    const int64_t from = (at + i) % period, run = std::min(count - i, period - from);
    for (int64_t j = 0; j < run; ++j) out[i + j] = load(p + from + j);
    i += run;
  }
}

// divergence = (ratio - 1 - log_ratio + shift * slope) / 2, where slope = (mu - prior mean) / prior variance
template <class A>
struct Divergence {
  const A *shift, *slope, *log_ratio;  // with the standard normal as the prior: mu, mu, logvar
  A ratio[kElements], with_prior[3][kElements];

  // at: the block's first element, counted over all keys
  template <class T>
  void load_block(const Reparameterize& op, const Gaussian<A>& q, const T* mean, const T* prior_logvar, int64_t at,
                  int64_t count) {
    shift = slope = q.mu;
    log_ratio = q.logvar;
    if (!mean) {
      for (int64_t i = 0; i < count; ++i) ratio[i] = q.sd[i] * q.sd[i];
      return;
    }
    load_periodic(mean, op.mean_period, at, count, with_prior[0]);
    load_periodic(prior_logvar, op.logvar_period, at, count, with_prior[1]);
    for (int64_t i = 0; i < count; ++i) {
      const A prior = with_prior[1][i];
      with_prior[0][i] = q.mu[i] - with_prior[0][i];
      with_prior[1][i] = with_prior[0][i] * exp_(-prior);
      with_prior[2][i] = q.logvar[i] - prior;
      ratio[i] = exp_(with_prior[2][i]);
    }
    shift = with_prior[0];
    slope = with_prior[1];
    log_ratio = with_prior[2];
  }

  void value(A free_bits, A* out, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const A d = A(0.5) * (shift[i] * slope[i] + (ratio[i] - A(1) - log_ratio[i]));
      out[i] = d < free_bits ? free_bits : d;
    }
  }

  // No gradient where the divergence is below `free_bits`.
  void mask(A free_bits, A* grad, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const A d = A(0.5) * (shift[i] * slope[i] + (ratio[i] - A(1) - log_ratio[i])), g = grad[i];
      grad[i] = d < free_bits ? A(0) : g;
    }
  }

  // Adds the gradients of mu and logvar.
  void add_grad(const A* grad, A* grad_mu, A* grad_logvar, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      grad_mu[i] += grad[i] * slope[i];
      grad_logvar[i] += A(0.5) * grad[i] * (ratio[i] - A(1));
    }
  }

  void prior_grad(const A* grad, A* grad_mean, A* grad_logvar, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      grad_mean[i] = -grad[i] * slope[i];
      grad_logvar[i] = A(0.5) * grad[i] * (A(1) - ratio[i] - shift[i] * slope[i]);
    }
  }
};

// Prefetches the next block while the noise of this one is computed. Prefetching memory that is
// only written does not help.
template <class T>
inline void prefetch_next(const T* p) {
  for (int64_t i = kElements; i < 2 * kElements; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// z = mu + sd * eps
template <class T>
inline void sample_block(const Acc<T>* mu, const Acc<T>* sd, const Acc<T>* eps, T* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(z + i, mu[i] + sd[i] * eps[i]);
}

// sum += grad, along += grad * eps
template <class T>
inline void accumulate_block(const T* grad, const Acc<T>* eps, Acc<T>* sum, Acc<T>* noise_sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Acc<T> g = load(grad + i);
    sum[i] += g;
    noise_sum[i] += g * eps[i];
  }
}

// No gradient where logvar_range clamped.
template <class T>
inline void zero_outside(const T* logvar, Acc<T> low, Acc<T> high, Acc<T>* grad, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Acc<T> l = load(logvar + i), g = grad[i];
    const bool outside = (l < low) | (l > high);
    grad[i] = outside ? Acc<T>(0) : g;
  }
}

// The most frequent case, in one loop: one sample, and the standard normal as the prior. Computes z and the sum of the
// divergences.
template <class T>
inline Acc<T> sample_and_diverge(const T* mu, const T* logvar, const Acc<T>* eps, Acc<T> low, Acc<T> high,
                                 Acc<T> free_bits, Acc<T>* z, int64_t count) {
  using A = Acc<T>;
  A sum = 0;  // of up to 512 elements
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const A m = load(mu + i);
    A l = load(logvar + i);
    l = l < low ? low : l;  // NaN stays NaN
    l = l > high ? high : l;
    const A sd = exp_(A(0.5) * l);
    z[i] = m + sd * eps[i];
    const A d = A(0.5) * (m * m + (sd * sd - A(1) - l));
    sum += d < free_bits ? free_bits : d;
  }
  return sum;
}

// The gradients of this case where free_bits masks none of them; grad_kl is the row's.
template <bool with_kl, class T>
inline void differentiate(const T* mu, const T* logvar, const Acc<T>* eps, const T* grad_z, Acc<T> grad_kl, Acc<T> low,
                          Acc<T> high, Acc<T>* grad_mu, Acc<T>* grad_logvar, int64_t count) {
  using A = Acc<T>;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A m = load(mu + i), g = load(grad_z + i), unclamped = load(logvar + i);
    A l = unclamped;
    l = l < low ? low : l;
    l = l > high ? high : l;
    const A sd = exp_(A(0.5) * l);
    A d_mu = g, d_logvar = g * eps[i] * (A(0.5) * sd);
    if constexpr (with_kl) {
      d_mu += grad_kl * m;
      d_logvar += A(0.5) * grad_kl * (sd * sd - A(1));
    }
    const bool outside = (unclamped < low) | (unclamped > high);
    grad_mu[i] = d_mu;
    grad_logvar[i] = outside ? A(0) : d_logvar;
  }
}

template <class T>
void noise(const Reparameterize& op, void* out_, const ParallelFor& parallel) {
  T* out = static_cast<T*>(out_);
  const int64_t size = op.samples * op.rows * op.size, blocks = ceil_div(size, kElements);
  parallel(op.keys * blocks, [&](int64_t begin, int64_t end) {
    T buffer[kElements + kNoiseSlack];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / blocks, at = i % blocks * kElements, count = std::min(kElements, size - at);
      memcpy(out + k * size + at, normals(op.key[2 * k], op.key[2 * k + 1], at, count, buffer), count * sizeof(T));
    }
  });
}

template <class T>
void forward(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z_, void* kl,
             const ParallelFor& parallel) {
  using A = Acc<T>;
  const Units units(op);
  const int64_t size = op.rows * op.size;
  const A low = static_cast<A>(op.logvar_min), high = static_cast<A>(op.logvar_max),
          free_bits = static_cast<A>(op.free_bits);
  const bool plain = op.samples == 1 && !tensors.prior_mean && kl,
             streams = leaves_cache(3 * op.keys * size * int64_t(sizeof(T)));
  std::vector<double> sums(static_cast<size_t>(kl ? op.keys * op.rows * units.pieces : 0));
  parallel(op.keys * units.units, [&](int64_t begin, int64_t end) {
    Gaussian<A> q;
    Divergence<A> divergence;
    A buffer[kElements + kNoiseSlack], nats[kElements];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / units.units, unit = i % units.units;
      const T *mu = static_cast<const T*>(tensors.mu) + k * size,
              *logvar = static_cast<const T*>(tensors.logvar) + k * size;
      const T *mean = static_cast<const T*>(tensors.prior_mean),
              *prior_logvar = static_cast<const T*>(tensors.prior_logvar);
      T* z = static_cast<T*>(z_) + k * op.samples * size;
      const auto sum_of = [&](int64_t row) -> double& {
        return sums[(k * op.rows + row) * units.pieces + (units.pieces > 1 ? unit % units.pieces : 0)];
      };
      units.for_each_block(unit, [&](int64_t at, int64_t count) {
        if (plain) {
          const A* eps = normals(op.key[2 * k], op.key[2 * k + 1], at, count, buffer);
          A* const drawn = staging(z + at, nats, streams);
          units.for_each_row(at, count, [&](int64_t row, int64_t from, int64_t to) {
            const int64_t j = at + from;
            sum_of(row) +=
                sample_and_diverge(mu + j, logvar + j, eps + from, low, high, free_bits, drawn + from, to - from);
          });
          flush(z + at, drawn, count, streams);
          return;
        }
        q.load_block(op, mu + at, logvar + at, count);
        for (int64_t s = 0; s < op.samples; ++s) {
          const A* eps = normals(op.key[2 * k], op.key[2 * k + 1], s * size + at, count, buffer);
          sample_block(q.mu, q.sd, eps, z + s * size + at, count);
        }
        if (!kl) return;
        divergence.load_block(op, q, mean, prior_logvar, k * size + at, count);
        divergence.value(free_bits, nats, count);
        units.for_each_row(at, count, [&](int64_t row, int64_t from, int64_t to) {
          A sum = 0;  // of up to 512 elements; the rest in double
#pragma omp simd reduction(+ : sum)
          for (int64_t j = from; j < to; ++j) sum += nats[j];
          sum_of(row) += sum;
        });
      });
    }
    finish_streams(plain && streams);
  });
  for (int64_t row = 0; kl && row < op.keys * op.rows; ++row) {
    double sum = 0;
    for (int64_t piece = 0; piece < units.pieces; ++piece) sum += sums[row * units.pieces + piece];
    static_cast<A*>(kl)[row] = static_cast<A>(op.beta * sum);
  }
}

template <class T>
void backward(const Reparameterize& op, const void* grad_z_, const void* grad_kl_, const ReparameterizeTensors& tensors,
              const ReparameterizeGrads& grads, const ParallelFor& parallel) {
  using A = Acc<T>;
  const Units units(op);
  const int64_t size = op.rows * op.size;
  const A* grad_kl = static_cast<const A*>(grad_kl_);
  const A low = static_cast<A>(op.logvar_min), high = static_cast<A>(op.logvar_max);
  const bool plain = op.samples == 1 && !tensors.prior_mean && grad_z_ && !(grad_kl && op.free_bits > 0);
  const bool streams = leaves_cache(5 * op.keys * size * int64_t(sizeof(T)));
  parallel(op.keys * units.units, [&](int64_t begin, int64_t end) {
    Gaussian<A> q;
    Divergence<A> divergence;
    A buffer[kElements + kNoiseSlack], mu_grad[kElements], logvar_grad[kElements], g[kElements];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / units.units, unit = i % units.units;
      const T *mu = static_cast<const T*>(tensors.mu) + k * size,
              *logvar = static_cast<const T*>(tensors.logvar) + k * size;
      const T *mean = static_cast<const T*>(tensors.prior_mean),
              *prior_logvar = static_cast<const T*>(tensors.prior_logvar);
      const T* grad_z = static_cast<const T*>(grad_z_) + k * op.samples * size;
      units.for_each_block(unit, [&](int64_t at, int64_t count) {
        const int64_t to = k * size + at;
        for (const T* p : {mu + at, logvar + at}) prefetch_next(p);
        if (plain) {
          prefetch_next(grad_z + at);
          const A* eps = normals(op.key[2 * k], op.key[2 * k + 1], at, count, buffer);
          T *const to_mu = static_cast<T*>(grads.mu) + to, *const to_logvar = static_cast<T*>(grads.logvar) + to;
          A *const staged_mu = staging(to_mu, mu_grad, streams), *const staged_logvar =
                                                                     staging(to_logvar, logvar_grad, streams);
          units.for_each_row(at, count, [&](int64_t row, int64_t from, int64_t end_of_row) {
            const int64_t j = at + from;
            const A kl_grad = grad_kl ? static_cast<A>(op.beta) * grad_kl[k * op.rows + row] : A(0);
            (grad_kl ? differentiate<true, T> : differentiate<false, T>)(mu + j, logvar + j, eps + from, grad_z + j,
                                                                         kl_grad, low, high, staged_mu + from,
                                                                         staged_logvar + from, end_of_row - from);
          });
          flush(to_mu, staged_mu, count, streams);
          flush(to_logvar, staged_logvar, count, streams);
          return;
        }
        q.load_block(op, mu + at, logvar + at, count);
        std::fill_n(mu_grad, count, A(0));      // first the sum of grad_z over the samples
        std::fill_n(logvar_grad, count, A(0));  // first the sum of grad_z * noise
        for (int64_t s = 0; grad_z_ && s < op.samples; ++s) {
          prefetch_next(grad_z + s * size + at);
          const A* eps = normals(op.key[2 * k], op.key[2 * k + 1], s * size + at, count, buffer);
          accumulate_block(grad_z + s * size + at, eps, mu_grad, logvar_grad, count);
        }
        if (grad_z_)
          for (int64_t j = 0; j < count; ++j) logvar_grad[j] *= A(0.5) * q.sd[j];
        if (grad_kl) {
          divergence.load_block(op, q, mean, prior_logvar, to, count);
          units.for_each_row(at, count, [&](int64_t row, int64_t from, int64_t end_of_row) {
            std::fill(g + from, g + end_of_row, static_cast<A>(op.beta) * grad_kl[k * op.rows + row]);
          });
          if (op.free_bits > 0) divergence.mask(static_cast<A>(op.free_bits), g, count);
          divergence.add_grad(g, mu_grad, logvar_grad, count);
        }
        zero_outside(logvar + at, low, high, logvar_grad, count);
        store_block(static_cast<T*>(grads.mu) + to, mu_grad, count);
        store_block(static_cast<T*>(grads.logvar) + to, logvar_grad, count);
        if (!mean) return;
        if (grad_kl) divergence.prior_grad(g, mu_grad, logvar_grad, count);
        else
          for (A* p : {mu_grad, logvar_grad}) std::fill_n(p, count, A(0));
        store_block(static_cast<T*>(grads.prior_mean) + to, mu_grad, count);
        store_block(static_cast<T*>(grads.prior_logvar) + to, logvar_grad, count);
      });
    }
    finish_streams(plain && streams);
  });
}

inline void noise(const Reparameterize& op, void* out, const ParallelFor& parallel) {
  if (op.dtype == DType::float64) return noise<double>(op, out, parallel);
  noise<float>(op, out, parallel);
}

inline void reparameterize(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z, void* kl,
                           const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, forward, op, tensors, z, kl, parallel)
}

inline void reparameterize_backward(const Reparameterize& op, const void* grad_z, const void* grad_kl,
                                    const ReparameterizeTensors& tensors, const ReparameterizeGrads& grads,
                                    const ParallelFor& parallel) {
  FASTGEN_FOR_DTYPE(op.dtype, backward, op, grad_z, grad_kl, tensors, grads, parallel)
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void noise(const Reparameterize& op, void* out, const ParallelFor& parallel) {
  FASTGEN_DISPATCH(noise, op, out, parallel)
}

void reparameterize(const Reparameterize& op, const ReparameterizeTensors& tensors, void* z, void* kl,
                    const ParallelFor& parallel) {
  FASTGEN_DISPATCH(reparameterize, op, tensors, z, kl, parallel)
}

void reparameterize_backward(const Reparameterize& op, const void* grad_z, const void* grad_kl,
                             const ReparameterizeTensors& tensors, const ReparameterizeGrads& grads,
                             const ParallelFor& parallel) {
  FASTGEN_DISPATCH(reparameterize_backward, op, grad_z, grad_kl, tensors, grads, parallel)
}

}  // namespace fastgen::cpu
#endif
