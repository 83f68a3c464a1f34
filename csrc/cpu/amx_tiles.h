// Tiles: eight registers of 16 rows of 64 bytes, and the product of two of them (Intel AMX). One class with two bodies:
// the instructions, and the same sums in the same order in portable code, so that every processor can run the kernels.
// Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

#if FASTGEN_HAS_AMX && FASTGEN_VECTOR_BYTES == 64
// The calling thread's tiles, from the object's construction to its destruction. The products are of 16 rows of 32
// bfloat16 by 16 rows of 16 pairs.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int tile>
  __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>  // bytes: from one row to the next
  __attribute__((always_inline)) void load(const void* rows, int64_t bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(bytes), "i"(tile) : "memory");
  }
  template <int tile>
  __attribute__((always_inline)) void store(float* rows, int64_t bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(bytes), "i"(tile) : "memory");
  }
  // sums[m][n] += sum over k of a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1]
  template <int sums, int a, int b>
  __attribute__((always_inline)) void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
};
#endif

class EmulatedTiles {
 public:
  EmulatedTiles() = default;
  EmulatedTiles(const EmulatedTiles&) = delete;

  template <int tile>
  void zero() {
    memset(tiles_[tile], 0, sizeof(tiles_[tile]));
  }
  template <int tile>
  void load(const void* rows, int64_t bytes) {
    for (int row = 0; row < 16; ++row) memcpy(tiles_[tile][row], static_cast<const char*>(rows) + row * bytes, 64);
  }
  template <int tile>
  void store(float* rows, int64_t bytes) {
    for (int row = 0; row < 16; ++row) memcpy(reinterpret_cast<char*>(rows) + row * bytes, tiles_[tile][row], 64);
  }
  template <int sums, int a, int b>
  void multiply() {
    for (int m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair = tiles_[a][m][k];
        const float low = normal(pair << 16), high = normal(pair & 0xffff0000u);
        for (int n = 0; n < 16; ++n) {
          even[n] = flushed(__builtin_fmaf(low, normal(tiles_[b][k][n] << 16), even[n]));
          odd[n] = flushed(__builtin_fmaf(high, normal(tiles_[b][k][n] & 0xffff0000u), odd[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        const float sum = flushed(normal(tiles_[sums][m][n]) + flushed(even[n] + odd[n]));
        memcpy(&tiles_[sums][m][n], &sum, sizeof(sum));
      }
    }
  }

 private:
  // The unit reads subnormal numbers as zero, and writes zero instead of them.
  static float normal(uint32_t bits) {
    const uint32_t kept = bits & 0x7f800000u ? bits : bits & 0x80000000u;
    float value;
    memcpy(&value, &kept, sizeof(value));
    return value;
  }
  static float flushed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return normal(bits);
  }

  uint32_t tiles_[8][16][16];
};

// Calls run with a null pointer to the class of tiles that this process uses.
template <class Run>
void with_tiles(const Run& run) {
#if FASTGEN_HAS_AMX && FASTGEN_VECTOR_BYTES == 64
  if (amx() == Amx::instructions) return run(static_cast<Tiles*>(nullptr));
#endif
  run(static_cast<EmulatedTiles*>(nullptr));
}

}  // namespace fastgen::cpu::FASTGEN_ISA
