// A caching allocator for PyTorch's CPU tensors: touching fresh pages costs more than a layer's computation, and the C
// library's heap, which could keep freed memory too, grows with each aligned block that does not fit into a gap. This
// is the only file that uses PyTorch's C++ classes, which have no stable ABI: with any version other than the one it
// was built with, it does nothing.
#undef TORCH_TARGET_VERSION
#include "ops/allocator.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>

namespace fastgen {
namespace {

class CachingAllocator final : public c10::Allocator {
 public:
  static CachingAllocator& instance() {
    static CachingAllocator* const allocator = new CachingAllocator;  // outlives the last tensor
    return *allocator;
  }

  c10::DataPtr allocate(size_t size) override {
    if (size < kMinCached) return default_allocator->allocate(size);
    const size_t rounded = (size + kPage - 1) / kPage * kPage;
    void* memory = reuse(rounded);
    if (!memory) {
      memory = fresh(rounded);
      const std::lock_guard<std::mutex> guard(lock);
      add(memory, rounded);
    }
    c10::profiledCPUMemoryReporter().New(memory, size);
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  c10::Allocator* const default_allocator = c10::GetDefaultCPUAllocator();
  std::mutex lock;

 private:
  static constexpr size_t kMinCached = 64 << 10, kPage = 4 << 10, kLargePage = 2 << 20;

  // A cached block of this size, or up to 1.5 times as large; null if there is none.
  void* reuse(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto entry = cached.lower_bound(size);
    if (entry != cached.end() && entry->first <= size + size / 2) {
      void* const memory = entry->second;
      const size_t actual = entry->first;
      cached.erase(entry);
      cached_bytes -= actual;
      add(memory, actual);
      return memory;
    }
    if (used_bytes + cached_bytes + size > 2 * std::max(most_used, used_bytes + size)) drop();
    return nullptr;
  }

  void add(void* memory, size_t size) {
    used.emplace(memory, size);
    used_bytes += size;
    most_used = std::max(most_used, used_bytes);
  }

  void drop() {
    for (const auto& block : cached) std::free(block.second);
    cached.clear();
    cached_bytes = 0;
  }

  void* fresh(size_t size) {
    const size_t line = size < kLargePage ? size_t(64) : kLargePage;
    void* memory = nullptr;
    if (posix_memalign(&memory, line, size)) {
      {
        const std::lock_guard<std::mutex> guard(lock);
        drop();
      }
      if (posix_memalign(&memory, line, size)) {
        c10::profiledCPUMemoryReporter().OutOfMemory(size);
        TORCH_CHECK_WITH(OutOfMemoryError, false, "not enough memory: you tried to allocate ", size, " bytes.");
      }
    }
#ifdef MADV_HUGEPAGE
    if (line == kLargePage) madvise(memory, size, MADV_HUGEPAGE);  // fewer page faults and TLB misses
#endif
    return memory;
  }

  // Also frees memory of the default allocator: PyTorch asks the current allocator to free what an earlier one
  // allocated.
  static void release(void* memory) {
    CachingAllocator& self = instance();
    {
      const std::lock_guard<std::mutex> guard(self.lock);
      const auto entry = self.used.find(memory);
      if (entry != self.used.end()) {
        c10::profiledCPUMemoryReporter().Delete(memory);  // before another thread can take it
        self.cached.emplace(entry->second, memory);
        self.cached_bytes += entry->second;
        self.used_bytes -= entry->second;
        self.used.erase(entry);
        return;
      }
    }
    self.default_allocator->raw_deleter()(memory);
  }

  std::unordered_map<void*, size_t> used;
  std::multimap<size_t, void*> cached;
  size_t used_bytes = 0, cached_bytes = 0, most_used = 0;
};

}  // namespace

bool keep_freed_memory(int64_t major, int64_t minor) {
  if (major != TORCH_VERSION_MAJOR || minor != TORCH_VERSION_MINOR) return false;
  static const bool installed = [] {
    CachingAllocator& allocator = CachingAllocator::instance();
    // A forked child must not inherit the lock held by a thread that does not exist there.
    pthread_atfork([] { CachingAllocator::instance().lock.lock(); }, [] { CachingAllocator::instance().lock.unlock(); },
                   [] { CachingAllocator::instance().lock.unlock(); });
    c10::SetCPUAllocator(&allocator, 1);
    return true;
  }();
  return installed;
}

}  // namespace fastgen
