// The register-blocked product that convolutions are made of. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(FASTGEN_VECTOR_BYTES), aligned(alignof(A)), may_alias));
  static constexpr int64_t size = FASTGEN_VECTOR_BYTES / sizeof(A);
};

constexpr int kPixels = FASTGEN_TILE_PIXELS;

// out[p][:] = sum over taps t and depth i of x[t][p][i] * w[t][i][:], for kPixels pixels and vectors * size channels,
// all of them in registers.
template <class A, int vectors>
void tile(const A* const* x, const A* const* w, int64_t taps, int64_t depth, A* const* out) {
  using V = typename Vector<A>::type;
  constexpr int64_t width = vectors * Vector<A>::size;
  V sum[kPixels][vectors] = {};
  for (int64_t t = 0; t < taps; ++t, x += kPixels) {
    const A* weight = w[t];
    for (int64_t i = 0; i < depth; ++i, weight += width) {
      V b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = *reinterpret_cast<const V*>(weight + v * Vector<A>::size);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        const A value = x[p][i];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[p][v] += b[v] * value;
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(out[p] + v * Vector<A>::size) = sum[p][v];
}

}  // namespace fastgen::cpu::FASTGEN_ISA
