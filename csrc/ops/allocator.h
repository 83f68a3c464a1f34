#pragma once

#include <cstdint>

namespace fastgen {

// Has PyTorch's tensors of the CPU allocated by one that keeps what is freed; false in a PyTorch of another version
// than that of this library's headers.
bool keep_freed_memory(int64_t major, int64_t minor);

}  // namespace fastgen
