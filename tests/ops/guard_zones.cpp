// An allocator for PyTorch's tensors on the CPU that puts a guard zone on either side of each, and counts the tensors
// whose zones were written to. For tests: it is built against the PyTorch that runs them.
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kZone = 4096, kLine = 64;
constexpr char kUntouched = '\xa5';

class GuardedAllocator final : public c10::Allocator {
 public:
  static GuardedAllocator& instance() {
    static GuardedAllocator* const allocator = new GuardedAllocator;  // outlives the last tensor
    return *allocator;
  }

  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    char* const block = static_cast<char*>(std::aligned_alloc(kLine, (2 * kZone + size + kLine - 1) / kLine * kLine));
    TORCH_CHECK_WITH(OutOfMemoryError, block, "not enough memory for ", size, " bytes and their guard zones");
    char* const data = block + kZone;
    memset(block, kUntouched, kZone);
    memset(data + size, kUntouched, kZone);
    const std::lock_guard<std::mutex> guard(lock_);
    sizes_.emplace(data, size);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  int64_t violations() {
    const std::lock_guard<std::mutex> guard(lock_);
    int64_t count = violations_;
    for (const auto& [data, size] : sizes_) count += is_violated(static_cast<const char*>(data), size);
    return count;
  }

 private:
  static bool is_violated(const char* data, size_t size) {
    const auto touched = [](const char* zone) {
      return std::any_of(zone, zone + kZone, [](char byte) { return byte != kUntouched; });
    };
    return touched(data - kZone) || touched(data + size);
  }

  // Also frees memory of the default allocator: PyTorch asks the current allocator to free what an earlier one
  // allocated.
  static void release(void* data) {
    GuardedAllocator& self = instance();
    {
      const std::lock_guard<std::mutex> guard(self.lock_);
      if (const auto entry = self.sizes_.find(data); entry != self.sizes_.end()) {
        self.violations_ += is_violated(static_cast<const char*>(data), entry->second);
        self.sizes_.erase(entry);
        return std::free(static_cast<char*>(data) - kZone);
      }
    }
    c10::GetDefaultCPUAllocator()->raw_deleter()(data);
  }

  std::mutex lock_;
  std::unordered_map<void*, size_t> sizes_;
  int64_t violations_ = 0;  // of tensors that were freed
};

c10::Allocator* previous = nullptr;

}  // namespace

extern "C" void install() {
  previous = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&GuardedAllocator::instance(), 1);
}

extern "C" void uninstall() { c10::SetCPUAllocator(previous, 1); }

extern "C" int64_t violations() { return GuardedAllocator::instance().violations(); }
