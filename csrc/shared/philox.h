// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) and normals from its words (Box and
// Muller, 1958). One formula for host and device; docs/random.md has it as a table.
#pragma once

#include "shared/activation.h"

namespace fastgen {

struct Philox {
  uint32_t word[4];
};

FASTGEN_HD void philox_round(Philox& c, uint32_t key0, uint32_t key1) {
  const uint64_t a = uint64_t{0xD2511F53} * c.word[0], b = uint64_t{0xCD9E8D57} * c.word[2];
  const uint32_t word0 = static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ key0,
                 word2 = static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ key1;
  c = {{word0, static_cast<uint32_t>(b), word2, static_cast<uint32_t>(a)}};
}

// The four words of one counter. The rounds are unrolled by hand, so that a loop over counters becomes SIMD code.
FASTGEN_HD Philox philox(uint64_t seed, uint64_t offset, uint64_t block) {
  Philox c{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(offset),
            static_cast<uint32_t>(offset >> 32)}};
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32), d0 = 0x9E3779B9,
                 d1 = 0xBB67AE85;
  philox_round(c, k0, k1);
  philox_round(c, k0 + d0, k1 + d1);
  philox_round(c, k0 + 2 * d0, k1 + 2 * d1);
  philox_round(c, k0 + 3 * d0, k1 + 3 * d1);
  philox_round(c, k0 + 4 * d0, k1 + 4 * d1);
  philox_round(c, k0 + 5 * d0, k1 + 5 * d1);
  philox_round(c, k0 + 6 * d0, k1 + 6 * d1);
  philox_round(c, k0 + 7 * d0, k1 + 7 * d1);
  philox_round(c, k0 + 8 * d0, k1 + 8 * d1);
  philox_round(c, k0 + 9 * d0, k1 + 9 * d1);
  return c;
}

// x, or -x where the highest bit is set.
FASTGEN_HD float flip_sign(float x, uint32_t bits) {
  return float_of_bits(bits_of_float(x) ^ static_cast<int32_t>(bits & 0x80000000u));
}

struct Normals {
  float first, second;
};

// Two normals from two words: radius sqrt(-2 log u), u = (floor(w0 / 2) + 1/2) / 2^31 in float32, angle w1 / 2^32
// turns.
FASTGEN_HD Normals box_muller(uint32_t w0, uint32_t w1) {
  const float v = static_cast<float>(static_cast<int32_t>(w0 >> 1)) + 0.5f;  // 2^31 u
  // u = 2^e (1 + m), sqrt(1/2) <= 1 + m < sqrt(2)
  const int32_t bits = bits_of_float(v), exponent = (bits - 0x4eb504f3) & static_cast<int32_t>(0xff800000);  // 2^23 e
  const float m = float_of_bits(bits - exponent) * 4.656612873077393e-10f - 1.f;
  const float square = m * m;  // p = -2 log(1 + m) / m within 2.7e-8 of it; in pairs: shorter dependency chains
  const float low = (-6.6668373346e-1f + 5.0004148483e-1f * m) * square + (-2.f + 9.9999976158e-1f * m);
  const float high = (-2.9904532433e-1f + 2.8733691573e-1f * m) * square + (-3.9913666248e-1f + 3.3124786615e-1f * m);
  const float p = (-1.7444719374e-1f * (square * square) + high) * (square * square) + low;
  const float radius = sqrtf(p * m + static_cast<float>(exponent) * -1.6525917e-7f);  // -2 log(2) / 2^23
  const uint32_t turn =
      w1 + 0x20000000u;  // the top two bits: the nearest quarter turn; the others: the remainder, at most pi/4
  const float x = static_cast<float>(static_cast<int32_t>(turn & 0x3fffffff) - 0x20000000) * 1.4629180792671596e-9f,
              z = x * x;
  const float sine =
      ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * (z * x) + x;  // Cephes, sinf.c
  const float cosine =
      (((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z - 0.5f) * z + 1.f;
  const bool swap = static_cast<int32_t>(turn << 1) < 0;
  const float c = swap ? sine : cosine, s = swap ? cosine : sine;
  return {flip_sign(radius, turn + 0x40000000u) * c, flip_sign(radius, turn) * s};
}

// float64: element 2 block + i. 53 bits of one pair of words make u in (0, 1], 53 bits of the other make the angle.
struct Normals64 {
  double first, second;
};

FASTGEN_HD Normals64 box_muller(Philox w) {
  const double unit = 1.1102230246251565e-16;  // 2^-53
  const double u = static_cast<double>((((uint64_t{w.word[1]} << 32) | w.word[0]) >> 11) + 1) * unit;
  const double turns = static_cast<double>(((uint64_t{w.word[3]} << 32) | w.word[2]) >> 11) * unit;
  const double radius = sqrt(-2 * log(u)), angle = 6.283185307179586 * turns;
  return {radius * cos(angle), radius * sin(angle)};
}

}  // namespace fastgen
