// Loops over short blocks that stay in the first-level cache. Included once per instruction set (see isa.h), after
// store.h.
namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kBlock = 512;

template <class T>
inline void load_block(const T* p, Acc<T>* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = load(p + i);
}

// A block of a tensor in the accumulation type: the tensor's own memory if that has the type.
template <class T>
inline const Acc<T>* view(const T* p, Acc<T>* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, Acc<T>>) return p;
  load_block(p, buffer, count);
  return buffer;
}

template <Activation act, class A>
inline void activate_block(A* z, int64_t count, A slope) {
  for (int64_t i = 0; i < count; ++i) z[i] = activate<act>(z[i], slope);
}

template <Activation act, class A>
inline void activate_grad_block(const A* grad, const A* z, A* out, int64_t count, A slope) {
  for (int64_t i = 0; i < count; ++i) out[i] = activate_grad<act>(grad[i], z[i], slope);
}

// Calls body(std::integral_constant<Activation, act>), so that each activation has a loop of its own. The loop belongs
// in a function that takes pointers: GCC 12 may leave a loop over what a lambda captures scalar.
template <class F>
inline void with_activation(Activation act, const F& body) {
  switch (act) {
    FASTGEN_ACTIVATION_CASE(identity)
    FASTGEN_ACTIVATIONS(FASTGEN_ACTIVATION_CASE)
  }
}

// z = act(z)
template <class A>
inline void activate_block(Activation act, A* z, int64_t count, A slope) {
  with_activation(act, [&](auto constant) { activate_block<constant.value>(z, count, slope); });
}

// out = grad * act'(z)
template <class A>
inline void activate_grad_block(Activation act, const A* grad, const A* z, A* out, int64_t count, A slope) {
  with_activation(act, [&](auto constant) { activate_grad_block<constant.value>(grad, z, out, count, slope); });
}

// The affine map of the normalization: z = (x - center) * scale + shift, one coefficient per (row of statistics and)
// channel, `repeat` times one after another for blocks of several pixels.
template <class A>
struct Affine {
  Buffer<A> center, rstd, scale;
  Buffer<A> shift;  // (repeat, c)

  explicit Affine(const Epilogue& epilogue, int64_t repeat = 1)
      : center(scratch<A>(epilogue.rows_of_stats() * repeat * epilogue.c)),
        rstd(scratch<A>(epilogue.rows_of_stats() * repeat * epilogue.c)),
        scale(scratch<A>(epilogue.rows_of_stats() * repeat * epilogue.c)),
        shift(scratch<A>(repeat * epilogue.c)) {
    const A* weight = static_cast<const A*>(epilogue.norm_weight);
    const int64_t period = repeat * epilogue.c;
    for (int64_t row = 0; row < epilogue.rows_of_stats(); ++row)
      for (int64_t i = 0; i < period; ++i) {
        const int64_t k = row * period + i, channel = i % epilogue.c, index = epilogue.stats_index(row, channel);
        if (i >= epilogue.c) {
          center[k] = center[k - epilogue.c];
          rstd[k] = rstd[k - epilogue.c];
          scale[k] = scale[k - epilogue.c];
          continue;
        }
        center[k] = static_cast<const A*>(epilogue.mean)[index];
        rstd[k] = A(1) / std::sqrt(static_cast<const A*>(epilogue.var)[index] + static_cast<A>(epilogue.eps));
        scale[k] = weight ? rstd[k] * weight[channel] : rstd[k];
      }
    for (int64_t i = 0; i < period; ++i)
      shift[i] = epilogue.norm_bias ? static_cast<const A*>(epilogue.norm_bias)[i % epilogue.c] : A(0);
  }
};

// Moments of `count` values from their deviations from a rounded mean; the sum of the deviations corrects the mean.
inline Moments<double> moments_about(double mean, double sum, double squares, int64_t count) {
  return {static_cast<double>(count), mean + sum / count, std::max(0.0, squares - sum * sum / count)};
}

// Merges the moments of `rows` rows of `c` channels, one per column, into out (c); blocks of rows in two passes. Short
// runs are summed in the accumulation type, and those sums in double.
template <class T>
void column_moments(const T* x, int64_t rows, int64_t c, Moments<double>* out) {
  using A = Acc<T>;
  constexpr int64_t run = 8;
  for (int64_t first = 0; first < c; first += kBlock) {
    const int64_t width = std::min(kBlock, c - first), height = std::clamp<int64_t>(32768 / width, 16, 128);
    A mean[kBlock];
    double sum[kBlock], squares[kBlock];
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = std::min(height, rows - row);
      const T* block = x + row * c + first;
      std::fill_n(mean, width, A(0));
      std::fill_n(sum, width, 0.0);
      std::fill_n(squares, width, 0.0);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < width; ++j) mean[j] += load(block + r * c + j);
      for (int64_t j = 0; j < width; ++j) mean[j] /= static_cast<A>(count);
      const auto add = [&](int64_t r, auto lines) {
        for (int64_t j = 0; j < width; ++j) {
          A s = 0, q = 0;
#pragma GCC unroll 8
          for (int64_t k = 0; k < lines; ++k) {
            const A d = load(block + (r + k) * c + j) - mean[j];
            s += d;
            q += d * d;
          }
          sum[j] += s;
          squares[j] += q;
        }
      };
      int64_t r = 0;
      for (; r + run <= count; r += run) add(r, std::integral_constant<int64_t, run>());
      for (; r < count; ++r) add(r, std::integral_constant<int64_t, 1>());
      for (int64_t j = 0; j < width; ++j) out[first + j].merge(moments_about(mean[j], sum[j], squares[j], count));
    }
  }
}

}  // namespace fastgen::cpu::FASTGEN_ISA
