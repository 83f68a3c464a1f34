// The parallel-for that a caller passes to a kernel.
#pragma once

#include <cstdint>
#include <functional>

namespace fastgen::cpu {

// Runs body(begin, end) over a partition of [0, count), on at most `threads` threads.
struct ParallelFor {
  int threads;
  std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)> run;

  void operator()(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body) const {
    run(count, body);
  }
};

}  // namespace fastgen::cpu
