#include "plan/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastgen::plan {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Body = std::function<void(int64_t, int64_t)>;

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) std::thread([this, i] { work(i); }).detach();
  }

  // One job at a time: the caller holds `busy`.
  std::mutex busy;

  void run(int helpers, int64_t count, int64_t chunk, const Body& body) {
    job = {count, chunk, &body};
    const int64_t pieces = ceil_div(count, chunk);
    finished.store(0, std::memory_order_relaxed);
    error = nullptr;
    const uint64_t next = (state.load(std::memory_order_relaxed) >> 32) + 1;
    state.store(next << 32 | static_cast<uint64_t>(helpers) << kPieceBits | static_cast<uint64_t>(pieces),
                std::memory_order_seq_cst);
    if (sleeping.load(std::memory_order_seq_cst)) {
      {
        const std::lock_guard<std::mutex> lock(sleep);
      }
      awake.notify_all();
    }
    take_pieces();
    for (int64_t spins = 0; finished.load(std::memory_order_acquire) != pieces; ++spins) {
      pause();
      if (spins > 4096) std::this_thread::yield();  // a worker's processor is busy elsewhere
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  struct Job {
    int64_t count, chunk;
    const Body* body;
  };

  // The job's number, how many workers may join, and how many pieces are left, in one word: a late worker cannot take a
  // piece of the next job by mistake.
  std::atomic<uint64_t> state{0};
  std::atomic<int64_t> finished{0};
  std::atomic<int> sleeping{0};
  std::mutex sleep, failing;
  std::condition_variable awake;
  std::exception_ptr error;
  Job job{};

  static constexpr int kPieceBits = 20;
  static uint64_t pieces_left(uint64_t state) { return state & ((1 << kPieceBits) - 1); }
  static bool may_join(uint64_t state, int worker) {
    return pieces_left(state) && worker < static_cast<int>((state & 0xffffffff) >> kPieceBits);
  }

  // The job stays alive, and `job` unchanged, until every piece that was taken is finished.
  void take_pieces() {
    uint64_t seen = state.load(std::memory_order_acquire);
    while (pieces_left(seen)) {
      if (!state.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
      const int64_t at = ceil_div(job.count, job.chunk) - static_cast<int64_t>(pieces_left(seen));
      try {
        (*job.body)(at* job.chunk, std::min(job.count, (at + 1) * job.chunk));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing);
        error = std::current_exception();
      }
      finished.fetch_add(1, std::memory_order_release);
      seen = state.load(std::memory_order_acquire);
    }
  }

  void work(int worker) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
      while (!may_join(state.load(std::memory_order_acquire), worker)) {
        for (int i = 0; i < 64 && !may_join(state.load(std::memory_order_relaxed), worker); ++i) pause();
        if (std::chrono::steady_clock::now() < until) continue;
        std::unique_lock<std::mutex> lock(sleep);
        sleeping.fetch_add(1, std::memory_order_seq_cst);
        awake.wait(lock, [&] { return may_join(state.load(std::memory_order_seq_cst), worker); });
        sleeping.fetch_sub(1, std::memory_order_seq_cst);
      }
      take_pieces();
    }
  }
};

// Pools are never destroyed, their threads detached. A child process has none of its parent's threads, so it creates
// its own pool.
std::atomic<Pool*> current{nullptr};

void in_child() {
  current.store(nullptr, std::memory_order_release);
  sharing().unlock();
}

[[maybe_unused]] const int registered = pthread_atfork([] { sharing().lock(); }, [] { sharing().unlock(); }, in_child);

Pool& pool() {
  if (Pool* existing = current.load(std::memory_order_acquire)) return *existing;
  Pool* const own = new Pool(thread_count() - 1);
  Pool* other = nullptr;
  return current.compare_exchange_strong(other, own) ? *own : *other;
}

}  // namespace

std::mutex& sharing() {
  static std::mutex& lock = *new std::mutex;  // never destroyed: threads may outlive the statics
  return lock;
}

int thread_count() {
  static const int count = [] {
    const char* requested = getenv("FASTGEN_THREADS");
    if (requested && atoi(requested) > 0) return std::min(atoi(requested), 1024);
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof(set), &set)) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }();
  return count;
}

void run_parallel(int threads, int64_t count, const Body& body) {
  if (count <= 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads > 1) {
    Pool& all = pool();
    const std::unique_lock<std::mutex> lock(all.busy, std::try_to_lock);
    if (lock) return all.run(threads - 1, count, std::max<int64_t>(1, count / (threads * 8)), body);
  }
  body(0, count);
}

}  // namespace fastgen::plan
