// Loops over short blocks that stay in the first-level cache. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

constexpr int64_t kBlock = 512;

template <class T>
inline void load_block(const T* p, Acc<T>* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = load(p + i);
}

template <class T>
inline void store_block(T* p, const Acc<T>* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(p + i, in[i]);
}

template <Activation act, class A>
inline void activate_block(A* z, int64_t count, A slope) {
  for (int64_t i = 0; i < count; ++i) z[i] = activate<act>(z[i], slope);
}

template <Activation act, class A>
inline void activate_grad_block(A* grad, const A* z, int64_t count, A slope) {
  for (int64_t i = 0; i < count; ++i) grad[i] = activate_grad<act>(grad[i], z[i], slope);
}

// z = act(z)
template <class A>
inline void activate_block(Activation act, A* z, int64_t count, A slope) {
  switch (act) {
    case Activation::identity: return;
    case Activation::relu: return activate_block<Activation::relu>(z, count, slope);
    case Activation::leaky_relu: return activate_block<Activation::leaky_relu>(z, count, slope);
    case Activation::tanh: return activate_block<Activation::tanh>(z, count, slope);
    case Activation::sigmoid: return activate_block<Activation::sigmoid>(z, count, slope);
    case Activation::silu: return activate_block<Activation::silu>(z, count, slope);
  }
}

// grad = grad * act'(z)
template <class A>
inline void activate_grad_block(Activation act, A* grad, const A* z, int64_t count, A slope) {
  switch (act) {
    case Activation::identity: return;
    case Activation::relu: return activate_grad_block<Activation::relu>(grad, z, count, slope);
    case Activation::leaky_relu: return activate_grad_block<Activation::leaky_relu>(grad, z, count, slope);
    case Activation::tanh: return activate_grad_block<Activation::tanh>(grad, z, count, slope);
    case Activation::sigmoid: return activate_grad_block<Activation::sigmoid>(grad, z, count, slope);
    case Activation::silu: return activate_grad_block<Activation::silu>(grad, z, count, slope);
  }
}

// The affine map of the normalisation: z = (x - center) * scale + shift, a coefficient a (row of stats,) channel.
template <class A>
struct Affine {
  std::unique_ptr<A[]> center, rstd, scale;
  std::unique_ptr<A[]> shift;  // (c)

  Affine(const NormAct& op, const NormActTensors& given)
      : center(scratch<A>(op.rows_of_stats() * op.c)), rstd(scratch<A>(op.rows_of_stats() * op.c)),
        scale(scratch<A>(op.rows_of_stats() * op.c)), shift(scratch<A>(op.c)) {
    const A* weight = static_cast<const A*>(given.weight);
    for (int64_t k = 0; k < op.rows_of_stats() * op.c; ++k) {
      const int64_t set = op.set(k / op.c, k % op.c);
      center[k] = static_cast<const A*>(given.mean)[set];
      rstd[k] = A(1) / std::sqrt(static_cast<const A*>(given.var)[set] + static_cast<A>(op.eps));
      scale[k] = weight ? rstd[k] * weight[k % op.c] : rstd[k];
    }
    for (int64_t channel = 0; channel < op.c; ++channel) shift[channel] = given.bias ? static_cast<const A*>(given.bias)[channel] : A(0);
  }
};

// Moments of `count` values from their deviations from a rounded mean: what the mean lacks is in the sum of the deviations.
inline Moments<double> moments_about(double mean, double sum, double squares, int64_t count) {
  return {static_cast<double>(count), mean + sum / count, std::max(0.0, squares - sum * sum / count)};
}

// Moments of `rows` rows of `c` channels, a channel a column, merged into out (c); blocks of rows in two passes.
template <class T>
void column_moments(const T* x, int64_t rows, int64_t c, Moments<double>* out) {
  using A = Acc<T>;
  for (int64_t first = 0; first < c; first += kBlock) {
    const int64_t width = std::min(kBlock, c - first), height = std::clamp<int64_t>(4096 / width, 16, 128);
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
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < width; ++j) {
          const double d = load(block + r * c + j) - mean[j];
          sum[j] += d;
          squares[j] += d * d;
        }
      for (int64_t j = 0; j < width; ++j) out[first + j].merge(moments_about(mean[j], sum[j], squares[j], count));
    }
  }
}

}  // namespace fastgen::cpu::FASTGEN_ISA
