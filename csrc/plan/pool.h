// Threads that wait awake for a moment, so that the layers of a network follow each other without a call to the kernel.
#pragma once

#include <mutex>

#include "cpu/parallel.h"
#include "shared/problems.h"

namespace fastgen::plan {

// The process's threads, as many as the processors it may use unless FASTGEN_THREADS says otherwise.
int thread_count();

// Held for a moment where threads change what they share. A fork waits for it: no child inherits it locked by a thread
// that it has not.
std::mutex& sharing();

// Runs body(begin, end) over a partition of [0, count) on `threads` of them at most, the calling one included. Calls
// from several threads at a time each run; one of them has the pool's help. What a body throws is thrown here.
void run_parallel(int threads, int64_t count, const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace fastgen::plan
