// Types shared by the CPU kernels. No torch: raw pointers, plain structs, and the parallel-for that the caller hands
// in.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <sys/mman.h>

#include "shared/problems.h"

namespace fastgen::cpu {

// Runs body(begin, end) over a partition of [0, count), on so many threads at most.
struct ParallelFor {
  int threads;
  std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)> run;

  void operator()(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body) const {
    run(count, body);
  }
};

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

// Reductions and arithmetic of a type run in this one.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateIn<T>::type;

inline __attribute__((always_inline)) float load(const float* p) { return *p; }
inline __attribute__((always_inline)) double load(const double* p) { return *p; }
inline __attribute__((always_inline)) float load(const Float16* p) { return static_cast<float>(*p); }
inline __attribute__((always_inline)) float load(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __attribute__((always_inline)) void store(float* p, float value) { *p = value; }
inline __attribute__((always_inline)) void store(double* p, double value) { *p = value; }
inline __attribute__((always_inline)) void store(Float16* p, float value) { *p = static_cast<Float16>(value); }
inline __attribute__((always_inline)) void store(BFloat16* p, float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// return function<T>(...) for the T of dtype
#define FASTGEN_FOR_DTYPE(dtype, function, ...)                   \
  switch (dtype) {                                                \
    case DType::float32: return function<float>(__VA_ARGS__);     \
    case DType::float64: return function<double>(__VA_ARGS__);    \
    case DType::bfloat16: return function<BFloat16>(__VA_ARGS__); \
    case DType::float16: return function<Float16>(__VA_ARGS__);   \
  }

// Large blocks are kept by the thread that frees them, kMost bytes at most: the pages of a fresh one cost more than
// what is computed in them. A block's size stands in the line before it.
class Blocks {
 public:
  static void* take(size_t size) {
    const size_t whole = size < 2 * kPage ? kLine : kPage;
    size = (kLine + size + whole - 1) / whole * whole - kLine;
    if (Blocks* const kept = size < kLeast ? nullptr : here()) {
      const auto at = kept->blocks.lower_bound(size);
      if (at != kept->blocks.end() && at->first <= 2 * size) {
        char* const memory = at->second;
        kept->bytes -= at->first;
        kept->blocks.erase(at);
        return memory + kLine;
      }
    }
    char* const memory = fresh(kLine + size);
    if (!memory) throw std::bad_alloc();
    memcpy(memory, &size, sizeof(size));
    return memory + kLine;
  }

  static void give(void* block) {
    char* const memory = static_cast<char*>(block) - kLine;
    size_t size;
    memcpy(&size, memory, sizeof(size));
    Blocks* const kept = size < kLeast || size > kMost ? nullptr : here();
    if (!kept) return std::free(memory);
    for (; kept->bytes + size > kMost; kept->blocks.erase(kept->blocks.begin())) {
      kept->bytes -= kept->blocks.begin()->first;
      std::free(kept->blocks.begin()->second);
    }
    kept->blocks.emplace(size, memory);
    kept->bytes += size;
  }

 private:
  static constexpr size_t kLine = 64, kPage = 2 << 20, kLeast = 64 << 10, kMost = 256 << 20;

  static char* fresh(size_t size) {
    if (size % kPage) return static_cast<char*>(std::aligned_alloc(kLine, size));
    char* const memory = static_cast<char*>(std::aligned_alloc(kPage, size));  // fewer faults, fewer misses of the TLB
#ifdef MADV_HUGEPAGE
    if (memory) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
  }

  std::multimap<size_t, char*> blocks;
  size_t bytes = 0;

  static Blocks* here() {  // null while the thread ends
    static thread_local bool ended = false;
    static thread_local struct Kept : Blocks {
      ~Kept() {
        ended = true;
        for (const auto& block : blocks) std::free(block.second);
      }
    } kept;
    return ended ? nullptr : &kept;
  }
};

struct Free {
  void operator()(void* memory) const { Blocks::give(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Scratch memory that begins at a line of the cache, not zeroed.
template <class T>
Buffer<T> scratch(int64_t count) {
  return Buffer<T>(static_cast<T*>(Blocks::take(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T))));
}

// Scratch memory of the calling thread; the next call for the same type hands out the same.
template <class T>
T* thread_scratch(int64_t count) {
  thread_local Buffer<T> buffer;
  thread_local int64_t size = 0;
  if (size < count) {
    buffer.reset();
    size = 0;
    buffer = scratch<T>(count);
    size = count;
  }
  return buffer.get();
}

// Whether what a call reads and writes, of so many bytes, leaves the last cache before it is used again: half of a
// common one.
inline bool leaves_cache(int64_t bytes) { return bytes > (16 << 20); }

// Whether this processor multiplies pairs of bfloat16 by one instruction.
bool can_dot_bf16();

}  // namespace fastgen::cpu
