#include "cpu/spectral_norm.h"

#include <atomic>

#undef FASTGEN_FILE
#define FASTGEN_FILE "cpu/spectral_norm.cpp"
#include "cpu/isa.h"

#include "cpu/store.h"

namespace fastgen::cpu::FASTGEN_ISA {

// The sizes of a weight's chunks (terms: see SpectralMatrix). They do not depend on the thread count, so the results
// do not either.
constexpr int64_t kChunkElements = 1 << 15, kChunkLines = 64, kMaxChunks = 16;
constexpr int64_t kRows = 4;

inline int64_t chunk_count(const SpectralMatrix& m) {
  return std::max<int64_t>(
      1, std::min(
             {kMaxChunks, m.lines(), std::max(ceil_div(m.size(), kChunkElements), ceil_div(m.lines(), kChunkLines))}));
}

// Some consecutive lines of a weight: the work of one thread.
struct Chunk {
  int64_t matrix, index, begin, end;
};

inline std::vector<Chunk> chunks_of(const std::vector<SpectralMatrix>& matrices) {
  std::vector<Chunk> chunks;
  for (int64_t k = 0; k < static_cast<int64_t>(matrices.size()); ++k) {
    const int64_t count = chunk_count(matrices[k]), step = ceil_div(matrices[k].lines(), count);
    for (int64_t i = 0; i < count; ++i)
      chunks.push_back({k, i, std::min(i * step, matrices[k].lines()), std::min((i + 1) * step, matrices[k].lines())});
  }
  return chunks;
}

// Calls body(i) for each i < count. Chunks differ in size, so a thread takes the next one as soon as it is free.
template <class Body>
void for_each(int64_t count, const ParallelFor& parallel, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel(count, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(i);
  });
}

// Calls body(b), with b as a compile-time constant for common kernel sizes, so that loops over it unroll.
template <class Body>
inline void with_width(int64_t b, const Body& body) {
  switch (b) {
    case 9: return body(std::integral_constant<int64_t, 9>{});
    case 16: return body(std::integral_constant<int64_t, 16>{});
    default: return body(b);
  }
}

template <int64_t rows, class T>
inline void rows_times_v(const T* w, int64_t b, const Acc<T>* v, Acc<T>* y) {
  Acc<T> s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  if constexpr (rows == 4) {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t q = 0; q < b; ++q) {
      s0 += load(w + q) * v[q];
      s1 += load(w + b + q) * v[q];
      s2 += load(w + 2 * b + q) * v[q];
      s3 += load(w + 3 * b + q) * v[q];
    }
    y[1] = s1;
    y[2] = s2;
    y[3] = s3;
  } else {
#pragma omp simd reduction(+ : s0)
    for (int64_t q = 0; q < b; ++q) s0 += load(w + q) * v[q];
  }
  y[0] = s0;
}

template <int64_t rows, class T>
inline void rows_times_u(const T* w, int64_t b, const Acc<T>* u, Acc<T>* t) {
  const Acc<T> u0 = u[0], u1 = u[rows > 1], u2 = u[rows > 1 ? 2 : 0], u3 = u[rows > 1 ? 3 : 0];
#pragma omp simd
  for (int64_t q = 0; q < b; ++q) {
    Acc<T> sum = t[q] + u0 * load(w + q);
    if constexpr (rows == 4) sum += u1 * load(w + b + q) + u2 * load(w + 2 * b + q) + u3 * load(w + 3 * b + q);
    t[q] = sum;
  }
}

template <class T>
inline void block_times_v(const T* w, int64_t d, int64_t b, const Acc<T>* v, Acc<T>* y, Acc<T>* columns) {
  if (b == 1) return rows_times_u<1>(w, d, v, y);
  with_width(b, [&](auto width) {  // columns (rows, inner), summed over q at the end
    for (int64_t i = 0; i < d; ++i)
      for (int64_t q = 0; q < width; ++q) columns[i * width + q] += load(w + i * width + q) * v[q];
  });
}

template <class T>
inline void block_times_u(const T* w, int64_t d, int64_t b, const Acc<T>* u, Acc<T>* t) {
  if (b == 1) return rows_times_v<1>(w, d, u, t);
  std::fill_n(t, b, Acc<T>(0));
  with_width(b, [&](auto width) {
    for (int64_t i = 0; i < d; ++i)
      for (int64_t q = 0; q < width; ++q) t[q] += u[i] * load(w + i * width + q);
  });
}

// The elements of the summed product: W v if outer > 1, W^T u if outer == 1 (whose `inner` is then a row's size).
inline int64_t summed_size(const SpectralMatrix& m) { return m.outer == 1 ? m.inner : m.rows; }

// A chunk's part of the summed product. fused: first computes the chunk's line product, and uses it, not normalized, as
// the vector.
template <class T>
void sum_chunk(const SpectralMatrix& m, const Chunk& chunk, bool fused, Acc<T>* sum) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(m.weight);
  A *u = static_cast<A*>(m.u), *v = static_cast<A*>(m.v);
  std::fill_n(sum, summed_size(m), A(0));
  if (m.outer == 1) {
    // Reads v and, if fused, writes u; the sum is the new v.
    int64_t i = chunk.begin;
    for (; i + kRows <= chunk.end; i += kRows) {
      if (fused) rows_times_v<kRows>(w + i * m.inner, m.inner, v, u + i);
      rows_times_u<kRows>(w + i * m.inner, m.inner, u + i, sum);
    }
    for (; i < chunk.end; ++i) {
      if (fused) rows_times_v<1>(w + i * m.inner, m.inner, v, u + i);
      rows_times_u<1>(w + i * m.inner, m.inner, u + i, sum);
    }
    return;
  }
  const auto columns = scratch<A>(m.rows * m.inner);
  std::fill_n(columns.get(), m.rows * m.inner, A(0));
  for (int64_t p = chunk.begin; p < chunk.end; ++p) {
    const T* block = w + p * m.rows * m.inner;
    if (fused) block_times_u(block, m.rows, m.inner, u, v + p * m.inner);
    block_times_v(block, m.rows, m.inner, v + p * m.inner, sum, columns.get());
  }
  if (m.inner > 1)
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t q = 0; q < m.inner; ++q) sum[i] += columns[i * m.inner + q];
}

// A chunk of the line product: W v if outer == 1, W^T u if outer > 1.
template <class T>
void line_chunk(const SpectralMatrix& m, const Chunk& chunk, Acc<T>* out) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(m.weight);
  const A *u = static_cast<const A*>(m.u), *v = static_cast<const A*>(m.v);
  if (m.outer == 1) {
    int64_t i = chunk.begin;
    for (; i + kRows <= chunk.end; i += kRows) rows_times_v<kRows>(w + i * m.inner, m.inner, v, out + i);
    for (; i < chunk.end; ++i) rows_times_v<1>(w + i * m.inner, m.inner, v, out + i);
  } else {
    for (int64_t p = chunk.begin; p < chunk.end; ++p)
      block_times_u(w + p * m.rows * m.inner, m.rows, m.inner, u, out + p * m.inner);
  }
}

// Divides x by max(|x|, eps) in place and returns the divisor. Sums in double.
template <class A>
double normalize(A* x, int64_t size, double eps) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += static_cast<double>(x[i]) * x[i];
  const double norm = std::sqrt(squares), divisor = norm < eps ? eps : norm;  // NaN stays NaN
  for (int64_t i = 0; i < size; ++i) x[i] = static_cast<A>(x[i] / divisor);
  return divisor;
}

template <class A>
double dot(const A* x, const A* y, int64_t size) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

// The results of one weight's chunks: their parts of the summed product, (chunks, summed_size).
template <class T>
struct Scratch {
  Buffer<Acc<T>> sums, product;  // product: the second product of an iteration, not normalized
};

template <class T>
void add_chunks(const SpectralMatrix& m, const Acc<T>* sums, Acc<T>* out) {
  const int64_t size = summed_size(m), chunks = chunk_count(m);
  std::copy_n(sums, size, out);
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) out[i] += sums[chunk * size + i];
}

constexpr int64_t kBlock = 1024;  // elements, which stay in the first-level cache

// Calls body(at, size) for the blocks of a range.
template <class Body>
inline void in_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t at = begin; at < end; at += kBlock) body(at, std::min(kBlock, end - at));
}

// spectral_norm for weights of one dtype.
template <class T>
void normalize_all(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                   const ParallelFor& parallel) {
  using A = Acc<T>;
  const std::vector<Chunk> chunks = chunks_of(matrices);
  const int64_t count = static_cast<int64_t>(matrices.size()), chunk_total = static_cast<int64_t>(chunks.size());
  std::vector<Scratch<T>> buffers(matrices.size());
  for (int64_t k = 0; k < count; ++k) {
    buffers[k].sums = scratch<A>(chunk_count(matrices[k]) * summed_size(matrices[k]));
    buffers[k].product = scratch<A>(std::max(matrices[k].rows, matrices[k].columns()));
    std::copy_n(static_cast<const A*>(matrices[k].input_u), matrices[k].rows, static_cast<A*>(matrices[k].u));
    std::copy_n(static_cast<const A*>(matrices[k].input_v), matrices[k].columns(), static_cast<A*>(matrices[k].v));
  }
  const auto sum_at = [&](const Chunk& chunk) {
    return buffers[chunk.matrix].sums.get() + chunk.index * summed_size(matrices[chunk.matrix]);
  };

  for (int64_t step = 0; step < iterations; ++step) {
    const bool last = step == iterations - 1;
    // Fused: if the line product comes first, one pass over a weight computes both products. Otherwise the first pass
    // computes only the summed product, and the line product needs a second pass.
    const auto is_fused = [&](const SpectralMatrix& m) { return (m.outer == 1) != v_first; };
    const auto finish = [&](const SpectralMatrix& m, A* second, int64_t size, A* product) {
      normalize(second, size, eps);
      if (last) *static_cast<A*>(m.sigma) = static_cast<A>(dot(product, second, size));
    };
    for_each(chunk_total, parallel, [&](int64_t i) {
      sum_chunk<T>(matrices[chunks[i].matrix], chunks[i], is_fused(matrices[chunks[i].matrix]), sum_at(chunks[i]));
    });
    for_each(count, parallel, [&](int64_t k) {
      const SpectralMatrix& m = matrices[k];
      A *u = static_cast<A*>(m.u), *v = static_cast<A*>(m.v);
      A* first = v_first ? v : u;
      A* second = v_first ? u : v;
      const int64_t first_size = v_first ? m.columns() : m.rows, second_size = v_first ? m.rows : m.columns();
      if (!is_fused(m)) {
        add_chunks<T>(m, buffers[k].sums.get(), first);
        normalize(first, first_size, eps);
        return;
      }
      const double divisor = normalize(first, first_size, eps);
      A* product = buffers[k].product.get();
      add_chunks<T>(m, buffers[k].sums.get(), product);
      for (int64_t i = 0; i < second_size; ++i) product[i] = static_cast<A>(product[i] / divisor);
      std::copy_n(product, second_size, second);
      finish(m, second, second_size, product);
    });
    if (std::all_of(matrices.begin(), matrices.end(), is_fused)) continue;
    for_each(chunk_total, parallel, [&](int64_t i) {
      const SpectralMatrix& m = matrices[chunks[i].matrix];
      if (!is_fused(m)) line_chunk<T>(m, chunks[i], buffers[chunks[i].matrix].product.get());
    });
    for_each(count, parallel, [&](int64_t k) {
      const SpectralMatrix& m = matrices[k];
      if (is_fused(m)) return;
      A* second = static_cast<A*>(v_first ? m.u : m.v);
      const int64_t size = v_first ? m.rows : m.columns();
      std::copy_n(buffers[k].product.get(), size, second);
      finish(m, second, size, buffers[k].product.get());
    });
  }
  if (iterations == 0) {  // sigma = u^T W v, from the line product
    for_each(chunk_total, parallel, [&](int64_t i) {
      line_chunk<T>(matrices[chunks[i].matrix], chunks[i], buffers[chunks[i].matrix].product.get());
    });
    for (int64_t k = 0; k < count; ++k) {
      const SpectralMatrix& m = matrices[k];
      const A* other = static_cast<const A*>(m.outer == 1 ? m.u : m.v);
      *static_cast<A*>(m.sigma) =
          static_cast<A>(dot<A>(buffers[k].product.get(), other, m.outer == 1 ? m.rows : m.columns()));
    }
  }
  const bool divides =
      std::any_of(matrices.begin(), matrices.end(), [](const SpectralMatrix& m) { return m.out != nullptr; });
  for_each(divides ? chunk_total : 0, parallel,
           [&](int64_t reversed) {  // in reverse, because the lines read last are still cached
             const int64_t i = chunk_total - 1 - reversed;
             const SpectralMatrix& m = matrices[chunks[i].matrix];
             const T* w = static_cast<const T*>(m.weight);
             T* out = static_cast<T*>(m.out);
             const A factor = static_cast<A>(1.0 / *static_cast<const A*>(m.sigma));
             const bool streams = leaves_cache(2 * m.size() * int64_t(sizeof(T)));
             in_blocks(chunks[i].begin * m.line_size(), chunks[i].end * m.line_size(), [&](int64_t at, int64_t size) {
               A buffer[kBlock];
               A* const block = staging(out + at, buffer, streams);
               for (int64_t j = 0; j < size; ++j) block[j] = load(w + at + j) * factor;
               flush(out + at, block, size, streams);
             });
             finish_streams(streams);
           });
}

// grad_weight = grad_out / sigma + (grad_sigma - <grad_out, weight> / sigma^2) u v^T
template <class T>
void backward_all(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                  const ParallelFor& parallel) {
  using A = Acc<T>;
  const std::vector<Chunk> chunks = chunks_of(matrices);
  std::vector<double> sums(chunks.size()), dots(matrices.size());
  for_each(static_cast<int64_t>(chunks.size()), parallel, [&](int64_t i) {
    const SpectralMatrix& m = matrices[chunks[i].matrix];
    const T *w = static_cast<const T*>(m.weight), *g = static_cast<const T*>(grads[chunks[i].matrix].grad_out);
    double total = 0;  // of sums of up to 4096 elements
    const int64_t end = chunks[i].end * m.line_size();
    for (int64_t at = chunks[i].begin * m.line_size(); at < end; at += 4096) {
      A sum = 0;
      const int64_t stop = std::min(at + 4096, end);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = at; j < stop; ++j) sum += load(w + j) * load(g + j);
      total += sum;
    }
    sums[i] = total;
  });
  for (size_t i = 0; i < chunks.size(); ++i) dots[chunks[i].matrix] += sums[i];
  for_each(static_cast<int64_t>(chunks.size()), parallel, [&](int64_t reversed) {
    const int64_t i = static_cast<int64_t>(chunks.size()) - 1 - reversed;
    const SpectralMatrix& m = matrices[chunks[i].matrix];
    const SpectralMatrixGrad& grad = grads[chunks[i].matrix];
    const T* g = static_cast<const T*>(grad.grad_out);
    T* out = static_cast<T*>(grad.grad_weight);
    const A *u = static_cast<const A*>(m.input_u), *v = static_cast<const A*>(m.input_v);
    const double sigma = *static_cast<const A*>(m.sigma);
    const A scale = static_cast<A>(1 / sigma);
    const A slope = static_cast<A>(*static_cast<const A*>(grad.grad_sigma) - dots[chunks[i].matrix] / (sigma * sigma));
    const bool streams = leaves_cache(3 * m.size() * int64_t(sizeof(T)));
    const auto long_row = [&](int64_t at, int64_t width, A factor, const A* vector) {
      in_blocks(0, width, [&](int64_t first, int64_t size) {
        A buffer[kBlock];
        A* const block = staging(out + at + first, buffer, streams);
        for (int64_t q = 0; q < size; ++q) block[q] = load(g + at + first + q) * scale + factor * vector[first + q];
        flush(out + at + first, block, size, streams);
      });
    };
    const auto row = [&](int64_t at, auto width, A factor, const A* vector) {
      for (int64_t q = 0; q < width; ++q) store(out + at + q, load(g + at + q) * scale + factor * vector[q]);
    };
    for (int64_t k = chunks[i].begin; k < chunks[i].end; ++k) {
      if (m.outer == 1) {
        long_row(k * m.inner, m.inner, slope * u[k], v);
      } else if (m.inner == 1) {
        long_row(k * m.rows, m.rows, slope * v[k], u);
      } else {
        with_width(m.inner, [&](auto width) {
          for (int64_t j = 0; j < m.rows; ++j) row((k * m.rows + j) * m.inner, width, slope * u[j], v + k * m.inner);
        });
      }
    }
    finish_streams(streams);
  });
}

// Calls body(begin, end) for a few weights at a time, so that they are still cached in a second pass.
template <class Body>
void few_at_a_time(const std::vector<SpectralMatrix>& matrices, const Body& body) {
  constexpr int64_t max_elements = (12 << 20) / sizeof(float);  // elements
  for (size_t begin = 0, end = 0; begin < matrices.size(); begin = end) {
    int64_t size = 0;
    do size += matrices[end++].size();
    while (end < matrices.size() && size + matrices[end].size() <= max_elements);
    body(static_cast<ptrdiff_t>(begin), static_cast<ptrdiff_t>(end));
  }
}

inline void spectral_norm(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                          const ParallelFor& parallel) {
  few_at_a_time(matrices, [&](ptrdiff_t begin, ptrdiff_t end) {
    const std::vector<SpectralMatrix> few(matrices.begin() + begin, matrices.begin() + end);
    FASTGEN_FOR_DTYPE(few[0].dtype, normalize_all, few, iterations, eps, v_first, parallel)
  });
}

inline void spectral_norm_backward(const std::vector<SpectralMatrix>& matrices,
                                   const std::vector<SpectralMatrixGrad>& grads, const ParallelFor& parallel) {
  few_at_a_time(matrices, [&](ptrdiff_t begin, ptrdiff_t end) {
    const std::vector<SpectralMatrix> few(matrices.begin() + begin, matrices.begin() + end);
    const std::vector<SpectralMatrixGrad> few_grads(grads.begin() + begin, grads.begin() + end);
    FASTGEN_FOR_DTYPE(few[0].dtype, backward_all, few, few_grads, parallel)
  });
}

}  // namespace fastgen::cpu::FASTGEN_ISA

#ifdef FASTGEN_ONCE
namespace fastgen::cpu {

void spectral_norm(const std::vector<SpectralMatrix>& matrices, int64_t iterations, double eps, bool v_first,
                   const ParallelFor& parallel) {
  FASTGEN_DISPATCH(spectral_norm, matrices, iterations, eps, v_first, parallel)
}

void spectral_norm_backward(const std::vector<SpectralMatrix>& matrices, const std::vector<SpectralMatrixGrad>& grads,
                            const ParallelFor& parallel) {
  FASTGEN_DISPATCH(spectral_norm_backward, matrices, grads, parallel)
}

}  // namespace fastgen::cpu
#endif
