// An allocator for PyTorch's tensors on the CPU that keeps what is freed: fresh pages cost more than what a layer
// computes in them, and the C library's heap, which could keep them too, grows with each aligned block that does not
// fit between its neighbours. The one file that uses PyTorch's C++ classes, which are no stable ABI: it does nothing in
// another version than it was built with.
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

class Keeping final : public c10::Allocator {
 public:
  static Keeping& instance() {
    static Keeping* const one = new Keeping;  // outlives the last tensor
    return *one;
  }

  c10::DataPtr allocate(size_t size) override {
    if (size < kLeast) return usual->allocate(size);
    const size_t whole = (size + kPage - 1) / kPage * kPage;
    void* memory = take(whole);
    if (!memory) {
      memory = fresh(whole);
      const std::lock_guard<std::mutex> guard(lock);
      add(memory, whole);
    }
    c10::profiledCPUMemoryReporter().New(memory, size);
    return {memory, memory, &give, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  c10::Allocator* const usual = c10::GetDefaultCPUAllocator();
  std::mutex lock;

 private:
  static constexpr size_t kLeast = 64 << 10, kPage = 4 << 10, kLargePage = 2 << 20;

  // A kept block of this size, or up to a half larger; null where there is none.
  void* take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = kept.lower_bound(size);
    if (found != kept.end() && found->first <= size + size / 2) {
      void* const memory = found->second;
      const size_t has = found->first;
      kept.erase(found);
      kept_bytes -= has;
      add(memory, has);
      return memory;
    }
    if (used_bytes + kept_bytes + size > 2 * std::max(most_used, used_bytes + size)) drop();
    return nullptr;
  }

  void add(void* memory, size_t size) {
    used.emplace(memory, size);
    used_bytes += size;
    most_used = std::max(most_used, used_bytes);
  }

  void drop() {
    for (const auto& block : kept) std::free(block.second);
    kept.clear();
    kept_bytes = 0;
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
    if (line == kLargePage) madvise(memory, size, MADV_HUGEPAGE);  // fewer faults, fewer misses of the TLB
#endif
    return memory;
  }

  // Also what the usual allocator gave: PyTorch asks the present one to free what an earlier one allocated.
  static void give(void* memory) {
    Keeping& self = instance();
    {
      const std::lock_guard<std::mutex> guard(self.lock);
      const auto found = self.used.find(memory);
      if (found != self.used.end()) {
        c10::profiledCPUMemoryReporter().Delete(memory);  // before another thread can take it
        self.kept.emplace(found->second, memory);
        self.kept_bytes += found->second;
        self.used_bytes -= found->second;
        self.used.erase(found);
        return;
      }
    }
    self.usual->raw_deleter()(memory);
  }

  std::unordered_map<void*, size_t> used;
  std::multimap<size_t, void*> kept;
  size_t used_bytes = 0, kept_bytes = 0, most_used = 0;
};

}  // namespace

bool keep_freed_memory(int64_t major, int64_t minor) {
  if (major != TORCH_VERSION_MAJOR || minor != TORCH_VERSION_MINOR) return false;
  static const bool once = [] {
    Keeping& one = Keeping::instance();
    // A forked child must not find the lock held by a thread that it does not have.
    pthread_atfork([] { Keeping::instance().lock.lock(); }, [] { Keeping::instance().lock.unlock(); },
                   [] { Keeping::instance().lock.unlock(); });
    c10::SetCPUAllocator(&one, 1);
    return true;
  }();
  return once;
}

}  // namespace fastgen
