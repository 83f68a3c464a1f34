// Measuring how long something takes.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>

namespace fastgen::plan {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The shortest time of `repeats` calls.
inline double least_seconds(int64_t repeats, const std::function<void()>& body) {
  double shortest = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    body();
    shortest = std::min(shortest, seconds_since(start));
  }
  return shortest;
}

}  // namespace fastgen::plan
