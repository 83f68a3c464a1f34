// Winograd's transforms: m outputs of r taps from m + r - 1 multiplications per axis instead of m * r (Lavin and Gray,
// 2015). Included once per instruction set (see isa.h), after tile.h. Everything is computed in the accumulation type
// A.
namespace fastgen::cpu::FASTGEN_ISA {

// y = output [(weight g) * (input d)] from the points 0, 1, -1, 1/2, -2 and infinity (Toom and Cook): their
// rounding errors are smaller than those of 0, 1, -1, 2, -2.
template <int m, int r>
struct WinogradMatrices {
  static constexpr int n = m + r - 1;
  double input[n][n] = {}, weight[n][r] = {}, output[m][n] = {};
  double weight_gradient[r][n] = {}, output_gradient[n][m] = {};  // transposes of weight and output

  constexpr WinogradMatrices() {
    constexpr double at[] = {0, 1, -1, 0.5, -2};
    for (int j = 0; j < n; ++j) {
      double scale = 1;
      input[j][0] = 1;
      for (int l = 0, degree = 0; l < n - 1; ++l) {  // the product of (x - at[l]) over the other points
        if (l == j) continue;
        for (int k = ++degree; k >= 0; --k) input[j][k] = (k ? input[j][k - 1] : 0) - at[l] * input[j][k];
        if (j < n - 1) scale *= at[j] - at[l];
      }
      double power = 1;
      for (int k = 0; k < n; ++k) {
        const double value = j < n - 1 ? power : 0;
        if (k < r) weight[j][k] = j < n - 1 ? value / scale : k == r - 1;
        if (k < m) output[k][j] = j < n - 1 ? value : k == m - 1;
        if (j < n - 1) power *= at[j];
      }
    }
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < r; ++k) weight_gradient[k][j] = weight[j][k];
      for (int k = 0; k < m; ++k) output_gradient[j][k] = output[k][j];
    }
  }
};
template <int m, int r>
constexpr WinogradMatrices<m, r> kWinograd{};

// The type that transforms read: bfloat16 is converted while it is read, other types are converted to the accumulation
// type before.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, Acc<T>>;

template <class A>
inline __attribute__((always_inline)) typename Vector<A>::type load_vector(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::type*>(p);
}
template <class A>
inline __attribute__((always_inline)) Vector<float>::type load_vector(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(FASTGEN_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(FASTGEN_VECTOR_BYTES)));
  return reinterpret_cast<Vector<float>::type>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16);
}

// to[i][j] = (matrix d matrix^T)[i][j], d[i][j] = from[i][j], one vector of channels each. The matrix, a member of
// WinogradMatrices<m, r>, is a template argument, so that its zeros and ones cost nothing.
template <class A, int m, int r, auto member, class S>
inline __attribute__((always_inline)) void transform_tile(const S* const* from, int64_t from_offset, A* const* to,
                                                          int64_t to_offset) {
  using V = typename Vector<A>::type;
  constexpr auto& matrix = kWinograd<m, r>.*member;
  constexpr int rows = std::extent_v<std::remove_reference_t<decltype(matrix)>, 0>,
                columns = std::extent_v<std::remove_reference_t<decltype(matrix)>, 1>;
  V half[columns][rows];
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) {
    V d[columns];
#pragma GCC unroll 8
    for (int k = 0; k < columns; ++k) d[k] = load_vector<A>(from[k * columns + j] + from_offset);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      V sum = {};
      bool started = false;
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) {
        if (matrix[i][k] == 0) continue;
        sum = started ? sum + d[k] * A(matrix[i][k]) : d[k] * A(matrix[i][k]);
        started = true;
      }
      half[j][i] = sum;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < rows; ++j) {
      V sum = {};
      bool started = false;
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) {
        if (matrix[j][k] == 0) continue;
        sum = started ? sum + half[k][i] * A(matrix[j][k]) : half[k][i] * A(matrix[j][k]);
        started = true;
      }
      *reinterpret_cast<V*>(to[i * rows + j] + to_offset) = sum;
    }
}

// The same for all channels: a vector of channels every `step` values of the output; the last one is padded with zeros.
template <class A, int m, int r, auto member, class S>
void transform_channels(const S** from, int64_t channels, S* edge, A* const* to, int64_t step) {
  constexpr int columns = std::extent_v<std::remove_reference_t<decltype(kWinograd<m, r>.*member)>, 1>;
  constexpr int64_t size = Vector<A>::size;
  int64_t channel = 0;
  for (; channel + size <= channels; channel += size)
    transform_tile<A, m, r, member>(from, channel, to, channel / size * step);
  if (channel == channels) return;
  std::fill_n(edge, columns * columns * size, S{});
  for (int i = 0; i < columns * columns; ++i) {
    std::copy(from[i] + channel, from[i] + channels, edge + i * size);
    from[i] = edge + i * size;
  }
  transform_tile<A, m, r, member>(from, 0, to, channel / size * step);
}

}  // namespace fastgen::cpu::FASTGEN_ISA
