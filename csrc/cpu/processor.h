// Which instructions this processor has and the environment allows.
#pragma once

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this processor; FASTGEN_CPU_ISA=baseline|avx2|avx512 lowers it (never raises it).
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char* requested = getenv("FASTGEN_CPU_ISA");
    if (requested && !strcmp(requested, "baseline")) return Isa::baseline;
    if (requested && !strcmp(requested, "avx2") && best == Isa::avx512) return Isa::avx2;
    return best;
  }();
  return chosen;
}

// Whether this processor has an instruction that multiplies pairs of bfloat16, and the environment allows it.
inline bool can_dot_bf16() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace fastgen::cpu
