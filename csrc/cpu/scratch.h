// Scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>

#include <sys/mman.h>

namespace fastgen::cpu {

// Keeps large blocks for the thread that frees them, at most kMaxKept bytes: touching the pages of a fresh block costs
// more than the computation in it. A block's size is stored in the cache line before it.
class BlockCache {
 public:
  static void* allocate(size_t size) {
    const size_t unit = size < 2 * kPage ? kLine : kPage;
    size = (kLine + size + unit - 1) / unit * unit - kLine;
    if (BlockCache* const cache = size < kMinKept ? nullptr : for_this_thread()) {
      const auto at = cache->blocks.lower_bound(size);
      if (at != cache->blocks.end() && at->first <= 2 * size) {
        char* const memory = at->second;
        cache->bytes -= at->first;
        cache->blocks.erase(at);
        return memory + kLine;
      }
    }
    char* const memory = fresh(kLine + size);
    if (!memory) throw std::bad_alloc();
    memcpy(memory, &size, sizeof(size));
    return memory + kLine;
  }

  static void release(void* block) {
    char* const memory = static_cast<char*>(block) - kLine;
    size_t size;
    memcpy(&size, memory, sizeof(size));
    BlockCache* const cache = size < kMinKept || size > kMaxKept ? nullptr : for_this_thread();
    if (!cache) return std::free(memory);
    for (; cache->bytes + size > kMaxKept; cache->blocks.erase(cache->blocks.begin())) {
      cache->bytes -= cache->blocks.begin()->first;
      std::free(cache->blocks.begin()->second);
    }
    cache->blocks.emplace(size, memory);
    cache->bytes += size;
  }

 private:
  static constexpr size_t kLine = 64, kPage = 2 << 20, kMinKept = 64 << 10, kMaxKept = 256 << 20;

  static char* fresh(size_t size) {
    if (size % kPage) return static_cast<char*>(std::aligned_alloc(kLine, size));
    char* const memory = static_cast<char*>(std::aligned_alloc(kPage, size));  // fewer page faults and TLB misses
#ifdef MADV_HUGEPAGE
    if (memory) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
  }

  std::multimap<size_t, char*> blocks;
  size_t bytes = 0;

  static BlockCache* for_this_thread() {  // null during the thread's exit
    static thread_local bool ended = false;
    static thread_local struct Cache : BlockCache {
      ~Cache() {
        ended = true;
        for (const auto& block : blocks) std::free(block.second);
      }
    } cache;
    return ended ? nullptr : &cache;
  }
};

struct Free {
  void operator()(void* memory) const { BlockCache::release(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Scratch memory, aligned to a cache line and not zeroed.
template <class T>
Buffer<T> scratch(int64_t count) {
  return Buffer<T>(static_cast<T*>(BlockCache::allocate(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T))));
}

// Scratch memory of the calling thread; the next call for the same type returns the same memory.
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

}  // namespace fastgen::cpu
