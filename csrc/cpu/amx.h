// Whether the processor has tiles of bfloat16 (Intel AMX) and this process may use them.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define FASTGEN_HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define FASTGEN_HAS_AMX 0
#endif

#include "cpu/processor.h"

namespace fastgen::cpu {

enum class Amx { none, emulated, instructions };

// Whether the processor has tiles of bfloat16 and the system saves their registers and lets this process use them. The
// request holds for all threads and for children of the process.
inline bool amx_is_permitted() {
#if FASTGEN_HAS_AMX
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return false;  // XGETBV may be used
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // the system saves tiles and their configuration
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// FASTGEN_AMX: "0" turns the tiles off, "emulate" computes them without the instructions (for tests).
inline Amx amx() {
  static const bool permitted = isa() == Isa::avx512 && can_dot_bf16() && amx_is_permitted();
  const char* requested = getenv("FASTGEN_AMX");
  if (requested && !strcmp(requested, "emulate")) return Amx::emulated;
  return permitted && !(requested && !strcmp(requested, "0")) ? Amx::instructions : Amx::none;
}

}  // namespace fastgen::cpu
