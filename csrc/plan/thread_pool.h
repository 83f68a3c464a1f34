// Threads that spin for a moment before they sleep, so that the layers of a network follow each other without a system
// call.
#pragma once

#include <mutex>

#include "cpu/parallel.h"
#include "shared/problems.h"

namespace fastgen::plan {

// The process's threads, as many as the processors it may use unless FASTGEN_THREADS says otherwise.
int thread_count();

// Held briefly where threads change shared state. A fork waits for it, so that no child inherits it locked by a thread
// that does not exist there.
std::mutex& sharing();

// Runs body(begin, end) over a partition of [0, count) on at most `threads` threads, the calling one included. Several
// threads may call it at a time: one of them uses the pool, the others run without it. Rethrows an exception of a body.
void run_parallel(int threads, int64_t count, const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace fastgen::plan
