// Compiles the including file once per instruction set and picks one at run time.
//
//   #define FASTGEN_FILE "cpu/norm_act.cpp"   // this file's own path
//   #include "cpu/isa.h"
//   namespace fastgen::cpu::FASTGEN_ISA { ... }   // compiled three times on x86-64: avx512, avx2, baseline
//   #ifdef FASTGEN_ONCE                           // compiled once, after the others
//   void f(...) { FASTGEN_DISPATCH(f, ...); }
//   #endif
//
// Headers with templates of other libraries come before FASTGEN_FILE, so that none is instantiated for one instruction
// set and linked into another.
#ifndef FASTGEN_ISA

#include "cpu/processor.h"

#if defined(__clang__)
#define FASTGEN_TARGET_BEGIN(text) _Pragma(text)
#define FASTGEN_TARGET_END _Pragma("clang attribute pop")
#define FASTGEN_TARGET_AVX512                                                                                       \
  "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"))), apply_to = " \
  "function)"
#define FASTGEN_TARGET_AVX2 "clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)"
#else
#define FASTGEN_TARGET_BEGIN(text) _Pragma("GCC push_options") _Pragma(text)
#define FASTGEN_TARGET_END _Pragma("GCC pop_options")
#define FASTGEN_TARGET_AVX512 "GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512\")"
#define FASTGEN_TARGET_AVX2 "GCC target(\"avx2,fma,f16c\")"
#endif

#if defined(__x86_64__)
#define FASTGEN_ISA avx512
#define FASTGEN_HAS_DOT 1
#define FASTGEN_VECTOR_BYTES 64
#define FASTGEN_TILE_PIXELS 12
FASTGEN_TARGET_BEGIN(FASTGEN_TARGET_AVX512)
#include FASTGEN_FILE
FASTGEN_TARGET_END
#undef FASTGEN_ISA
#undef FASTGEN_HAS_DOT
#undef FASTGEN_VECTOR_BYTES
#undef FASTGEN_TILE_PIXELS

#define FASTGEN_HAS_DOT 0
#define FASTGEN_ISA avx2
#define FASTGEN_VECTOR_BYTES 32
#define FASTGEN_TILE_PIXELS 6
FASTGEN_TARGET_BEGIN(FASTGEN_TARGET_AVX2)
#include FASTGEN_FILE
FASTGEN_TARGET_END
#undef FASTGEN_ISA
#undef FASTGEN_VECTOR_BYTES
#undef FASTGEN_TILE_PIXELS

#define FASTGEN_DISPATCH(function, ...)                     \
  switch (isa()) {                                          \
    case Isa::avx512: return avx512::function(__VA_ARGS__); \
    case Isa::avx2: return avx2::function(__VA_ARGS__);     \
    default: return baseline::function(__VA_ARGS__);        \
  }
#define FASTGEN_TILE_PIXELS 6  // 16 registers: 6 x 2 accumulators, 2 weights, 1 input
#else
#define FASTGEN_HAS_DOT 0
#define FASTGEN_DISPATCH(function, ...) return baseline::function(__VA_ARGS__);
#define FASTGEN_TILE_PIXELS 12  // NEON has 32 registers
#endif

#define FASTGEN_ISA baseline
#define FASTGEN_VECTOR_BYTES 16
#define FASTGEN_ONCE

#endif  // FASTGEN_ISA
