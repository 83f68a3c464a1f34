// The register-blocked matrix product of all convolutions. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(FASTGEN_VECTOR_BYTES), aligned(alignof(A)), may_alias));
  static constexpr int64_t size = FASTGEN_VECTOR_BYTES / sizeof(A);
};

constexpr int kPixels = FASTGEN_TILE_PIXELS;

// out[k * kPixels + p][:] = sum over taps t and depth i of x[t * kPixels + p][i] * w[k * taps + t][i][:], for `height`
// pixels p and `blocks` blocks k of vectors * size channels, all of them in registers.
template <class A, int vectors, int height, int blocks>
void tile(const A* const* x, const A* const* w, int64_t taps, int64_t depth, A* const* out) {
  using V = typename Vector<A>::type;
  V sum[blocks][height][vectors] = {};
  for (int64_t t = 0; t < taps; ++t, x += kPixels) {
    const A* weight[blocks];
    for (int k = 0; k < blocks; ++k) weight[k] = w[k * taps + t];
    for (int64_t i = 0; i < depth; ++i) {
      V b[blocks][vectors];
#pragma GCC unroll 2
      for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v, weight[k] += Vector<A>::size)
          b[k][v] = *reinterpret_cast<const V*>(weight[k]);
#pragma GCC unroll 16
      for (int p = 0; p < height; ++p) {
        const A value = x[p][i];
#pragma GCC unroll 2
        for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[k][p][v] += b[k][v] * value;
      }
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 16
    for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        *reinterpret_cast<V*>(out[k * kPixels + p] + v * Vector<A>::size) = sum[k][p][v];
}

#if FASTGEN_HAS_DOT
// The same with a pair of bfloat16 instead of each float: twice the depth. For processors with AVX512-BF16.
template <int vectors, int height, int blocks>
__attribute__((target("avx512bf16"))) void dot_tile(const float* const* x, const float* const* w, int64_t taps,
                                                    int64_t depth, float* const* out) {
  __m512 sum[blocks][height][vectors];
#pragma GCC unroll 2
  for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 16
    for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[k][p][v] = _mm512_setzero_ps();
  for (int64_t t = 0; t < taps; ++t, x += kPixels) {
    const float* weight[blocks];
    for (int k = 0; k < blocks; ++k) weight[k] = w[k * taps + t];
    for (int64_t i = 0; i < depth; ++i) {
      __m512bh b[blocks][vectors];
#pragma GCC unroll 2
      for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v, weight[k] += 16) b[k][v] = (__m512bh)_mm512_loadu_ps(weight[k]);
#pragma GCC unroll 16
      for (int p = 0; p < height; ++p) {
        const __m512bh value = (__m512bh)_mm512_set1_ps(x[p][i]);
#pragma GCC unroll 2
        for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[k][p][v] = _mm512_dpbf16_ps(sum[k][p][v], b[k][v], value);
      }
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 16
    for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(out[k * kPixels + p] + v * 16, sum[k][p][v]);
}
#endif

// dot: the tiles for pairs of bfloat16.
template <class A, int vectors, bool dot, int blocks, int... i>
constexpr auto tiles(std::integer_sequence<int, i...>) {
#if FASTGEN_HAS_DOT
  if constexpr (dot) return std::array{&dot_tile<vectors, i + 1, blocks>...};
#endif
  return std::array{&tile<A, vectors, i + 1, blocks>...};
}

// The tiles of 1 to kPixels / blocks pixels.
template <class A, int vectors, bool dot, int blocks = 1>
constexpr auto kTiles = tiles<A, vectors, dot, blocks>(std::make_integer_sequence<int, kPixels / blocks>());

}  // namespace fastgen::cpu::FASTGEN_ISA
