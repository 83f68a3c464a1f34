#pragma once

#include <cstdint>

namespace fastgen {

// Replaces PyTorch's CPU allocator with one that caches freed memory. Returns false if PyTorch's version is not that of
// the headers this library was compiled with.
bool keep_freed_memory(int64_t major, int64_t minor);

}  // namespace fastgen
