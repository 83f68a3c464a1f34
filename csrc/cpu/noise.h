// The standard normals of shared/philox.h, computed for a vector of counters at a time. Included once per instruction
// set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

// One word of each counter, in the low half of its lane; the high half is ignored.
typedef uint64_t Words __attribute__((vector_size(FASTGEN_VECTOR_BYTES)));
constexpr int64_t kLanes = FASTGEN_VECTOR_BYTES / 8, kCounters = 2 * kLanes;
constexpr int64_t kNoiseSlack = 4 * kCounters + 4;  // floats that normals() may write beyond `count`

// The products of the low halves.
inline __attribute__((always_inline)) Words multiply(Words a, uint64_t b) {
  const Words factor = b - Words{};
#if defined(__x86_64__) && FASTGEN_VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__x86_64__) && FASTGEN_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffff) * factor;
#endif
}

// The words of the counters of two vectors, whose chains of products run side by side.
inline __attribute__((always_inline)) void philox(uint64_t seed, uint64_t offset, const Words (&block)[2],
                                                  Words (&word)[2][4]) {
  for (int i = 0; i < 2; ++i) {
    word[i][0] = block[i];
    word[i][1] = block[i] >> 32;
    word[i][2] = offset - Words{};
    word[i][3] = (offset >> 32) - Words{};
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Words* const w = word[i];
      const Words a = multiply(w[0], 0xD2511F53), b = multiply(w[2], 0xCD9E8D57);
      w[0] = (b >> 32) ^ (w[1] ^ key0);
      w[1] = b;
      w[2] = (a >> 32) ^ (w[3] ^ key1);
      w[3] = a;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// Writes the standard normals of elements [first, first + count) to `out`, which has room for count + kNoiseSlack, and
// returns the address of the first one.
inline const float* normals(uint64_t seed, uint64_t offset, uint64_t first, int64_t count, float* out) {
  const uint64_t begin = first / 4;
  const int64_t blocks = static_cast<int64_t>((first + count + 3) / 4 - begin);
  Words lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = 2 * i;
  for (int64_t at = 0; at < blocks; at += kCounters) {
    Words words[2][4];
    uint32_t word[4][kCounters];
    philox(seed, offset, {(begin + at) + lane, (begin + at + 1) + lane}, words);
    for (int i = 0; i < 4; ++i) {
      const Words interleaved = (words[0][i] & 0xffffffff) | (words[1][i] << 32);  // in the order of the counters
      memcpy(word[i], &interleaved, sizeof(interleaved));
    }
    float* to = out + 4 * at;
    for (int64_t i = 0; i < kCounters; ++i) {
      const Normals a = box_muller(word[0][i], word[1][i]), b = box_muller(word[2][i], word[3][i]);
      to[4 * i] = a.first;
      to[4 * i + 1] = a.second;
      to[4 * i + 2] = b.first;
      to[4 * i + 3] = b.second;
    }
  }
  return out + first % 4;
}

inline const double* normals(uint64_t seed, uint64_t offset, uint64_t first, int64_t count, double* out) {
  const uint64_t begin = first / 2;
  const int64_t blocks = static_cast<int64_t>((first + count + 1) / 2 - begin);
  for (int64_t at = 0; at < blocks; ++at) {
    const Normals64 pair = box_muller(fastgen::philox(seed, offset, begin + at));
    out[2 * at] = pair.first;
    out[2 * at + 1] = pair.second;
  }
  return out + first % 2;
}

}  // namespace fastgen::cpu::FASTGEN_ISA
