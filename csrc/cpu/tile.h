// The register-blocked product that convolutions are made of. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(FASTGEN_VECTOR_BYTES), aligned(alignof(A)), may_alias));
  static constexpr int64_t size = FASTGEN_VECTOR_BYTES / sizeof(A);
};

constexpr int kPixels = FASTGEN_TILE_PIXELS;

// out[p][:] = sum over taps t and depth i of x[t * kPixels + p][i] * w[t][i][:], for `height` pixels and vectors * size channels,
// all of them in registers.
template <class A, int vectors, int height>
void tile(const A* const* x, const A* const* w, int64_t taps, int64_t depth, A* const* out) {
  using V = typename Vector<A>::type;
  constexpr int64_t width = vectors * Vector<A>::size;
  V sum[height][vectors] = {};
  for (int64_t t = 0; t < taps; ++t, x += kPixels) {
    const A* weight = w[t];
    for (int64_t i = 0; i < depth; ++i, weight += width) {
      V b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = *reinterpret_cast<const V*>(weight + v * Vector<A>::size);
#pragma GCC unroll 16
      for (int p = 0; p < height; ++p) {
        const A value = x[p][i];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[p][v] += b[v] * value;
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(out[p] + v * Vector<A>::size) = sum[p][v];
}

#if FASTGEN_HAS_DOT
// The same with a pair of bfloat16 in the place of each float: twice the depth. For processors with AVX512-BF16.
template <int vectors, int height>
__attribute__((target("avx512bf16"))) void dot_tile(const float* const* x, const float* const* w, int64_t taps, int64_t depth,
                                                    float* const* out) {
  __m512 sum[height][vectors];
#pragma GCC unroll 16
  for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[p][v] = _mm512_setzero_ps();
  for (int64_t t = 0; t < taps; ++t, x += kPixels) {
    const float* weight = w[t];
    for (int64_t i = 0; i < depth; ++i, weight += vectors * 16) {
      __m512bh b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = (__m512bh)_mm512_loadu_ps(weight + v * 16);
#pragma GCC unroll 16
      for (int p = 0; p < height; ++p) {
        const __m512bh value = (__m512bh)_mm512_set1_ps(x[p][i]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[p][v] = _mm512_dpbf16_ps(sum[p][v], b[v], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < height; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(out[p] + v * 16, sum[p][v]);
}
#endif

// dot: of pairs of bfloat16.
template <class A, int vectors, bool dot, int... below>
constexpr auto tiles(std::integer_sequence<int, below...>) {
#if FASTGEN_HAS_DOT
  if constexpr (dot) return std::array{&dot_tile<vectors, below + 1>...};
#endif
  return std::array{&tile<A, vectors, below + 1>...};
}

// The tiles of 1 to kPixels pixels.
template <class A, int vectors, bool dot>
constexpr auto kTiles = tiles<A, vectors, dot>(std::make_integer_sequence<int, kPixels>());

}  // namespace fastgen::cpu::FASTGEN_ISA
