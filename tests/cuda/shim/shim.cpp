// Runs CUDA kernels on the CPU. The threads of a block are fibres that take turns: each runs until it waits for a
// barrier or for its warp. Blocks run one after another, the last one first, so that a block which relies on an earlier
// one fails.
//
// The kernels are compiled with -fsanitize=thread, so that each of their memory accesses calls a function at the end of
// this file (that sanitizer's own library is not linked). These functions look for races in shared memory: two accesses
// race if different threads make them, at least one writes, and there is no barrier of the block (or, within a warp, of
// the warp) between them. The address sanitizer's library, which is loaded, reports accesses out of bounds to them.
#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace shim {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;

struct Copy {
  unsigned char* to;
  unsigned char from[16];
};

struct Fibre {
  void* at[5];  // where it continues, from __builtin_setjmp
  bool started = false;
  ucontext_t context;  // where it starts
  std::unique_ptr<char[]> stack{new char[kStack]};
  Position position;
  int number;  // of the thread in its block
  enum { running, at_block_barrier, in_warp, done } state;
  std::vector<std::vector<Copy>> copies;  // groups under way, the oldest first; the last one still grows
};

// The operation in which the lanes of a warp are.
struct Warp {
  int arrived = 0;
  unsigned epoch = 0;  // barriers of the warp so far
  std::vector<unsigned char> inputs, results;
};

// The last accesses to a byte of shared memory. Epoch 0: none.
struct Access {
  unsigned block_epoch = 0, warp_epoch = 0;
  int thread = -1;
};
struct Shadow {
  Access written, read;
  bool read_by_others = false;  // by more than one thread since
};

struct Block {
  std::span<Fibre> fibres;
  std::vector<Warp> warps;
  unsigned char* shared;
  std::vector<Shadow> shadow;
  unsigned epoch = 0;  // barriers and blocks so far
  int at_barrier = 0, left = 0;
  void* scheduler[5];
  Fibre* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;
};

thread_local Block* block = nullptr;
thread_local std::vector<Fibre> fibres;  // of all launches

// Not swapcontext: it makes system calls, and the address sanitizer cleans a whole stack at each.
[[gnu::noinline]] void jump(void** to) { __builtin_longjmp(to, 1); }
[[gnu::noinline]] void change(void** from, void** to) {
  if (!__builtin_setjmp(from)) jump(to);
}
[[gnu::noinline]] void begin(void** from, const ucontext_t* to) {
  if (!__builtin_setjmp(from)) setcontext(to);
}

void wait_as(decltype(Fibre::state) state) {
  Fibre& fibre = *block->current;
  fibre.state = state;
  change(fibre.at, block->scheduler);
}

void run_fibre() {
  for (;;) {  // one block after another
    (*block->kernel)();
    --block->left;
    wait_as(Fibre::done);
  }
}

Warp& current_warp() { return block->warps[block->current->number / kLanes]; }

void open_barrier() {
  ++block->epoch;
  block->at_barrier = 0;
  for (Fibre& fibre : block->fibres)
    if (fibre.state == Fibre::at_block_barrier) fibre.state = Fibre::running;
}

void open_warp(int warp) {
  block->warps[warp].arrived = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (Fibre& fibre = block->fibres[warp * kLanes + lane]; fibre.state == Fibre::in_warp) fibre.state = Fibre::running;
}

void run_block(const Position& position, int threads) {
  block->left = threads;
  for (int t = 0; t < threads; ++t) {
    Fibre& fibre = block->fibres[t];
    fibre.position = position;
    fibre.position.thread = dim3(t, 0, 0);
    fibre.number = t;
    fibre.state = Fibre::running;
    fibre.copies.assign(1, {});
  }
  while (block->left) {
    bool ran = false;
    for (Fibre& fibre : block->fibres) {
      if (fibre.state != Fibre::running) continue;
      ran = true;
      block->current = &fibre;
      if (fibre.started) {
        change(block->scheduler, fibre.at);
      } else {
        fibre.started = true;
        getcontext(&fibre.context);
        fibre.context.uc_stack = {fibre.stack.get(), 0, kStack};
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, run_fibre, 0);
        begin(block->scheduler, &fibre.context);
      }
      if (!block->error.empty()) throw std::runtime_error(block->error);
    }
    if (block->at_barrier && block->at_barrier == block->left) {
      if (block->left < threads) throw std::runtime_error("a thread ended while others of its block wait at a barrier");
      open_barrier();
    } else if (!ran && block->left) {
      throw std::runtime_error("deadlock: not all threads of a warp or block reach its operation");
    }
  }
}

}  // namespace

const Position& here() { return block->current->position; }
void* shared_memory() { return block->shared; }

void launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % kLanes || threads > 1024 || shared_bytes > (99 << 10))
    throw std::runtime_error("not every GPU from sm_80 on runs a block of this size");
  if (grid.x > 2147483647u || grid.y > 65535u || grid.z > 65535u)
    throw std::runtime_error("no GPU runs a grid of this size");
  Block state;
  if (static_cast<int>(fibres.size()) < threads) fibres.resize(threads);
  state.fibres = {fibres.data(), static_cast<size_t>(threads)};
  state.warps.resize(threads / kLanes);
  state.shadow.resize(shared_bytes);
  state.kernel = &kernel;
  struct Free {
    void operator()(void* p) const { free(p); }
  };
  const size_t bytes = (shared_bytes + 127) / 128 * 128;
  const std::unique_ptr<void, Free> shared(aligned_alloc(128, std::max<size_t>(bytes, 128)));
  state.shared = static_cast<unsigned char*>(shared.get());
  block = &state;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = grid.x; x-- > 0;) {
          memset(state.shared, 0xff, bytes);  // NaN in every type
          ++state.epoch;
          run_block({dim3(0, 0, 0), dim3(x, y, z), dim3(threads)}, threads);
        }
  } catch (...) {
    block = nullptr;
    fibres.clear();  // they are suspended inside the kernel
    throw;
  }
  block = nullptr;
}

void sync_block() {
  ++block->at_barrier;
  wait_as(Fibre::at_block_barrier);
}

void with_warp(const void* value, size_t size, void* result, size_t result_size,
               const std::function<void(const unsigned char*, unsigned char*)>& combine) {
  Warp& warp = current_warp();
  const int lane = block->current->number % kLanes;
  warp.inputs.resize(size * kLanes);
  memcpy(warp.inputs.data() + lane * size, value, size);
  if (++warp.arrived == kLanes) {
    warp.results.resize(result_size * kLanes);
    combine(warp.inputs.data(), warp.results.data());
    open_warp(block->current->number / kLanes);
  } else {
    wait_as(Fibre::in_warp);
  }
  memcpy(result, warp.results.data() + lane * result_size, result_size);
  // No lane may overwrite the results before all lanes have read theirs.
  if (++warp.arrived == kLanes) open_warp(block->current->number / kLanes);
  else wait_as(Fibre::in_warp);
}

void sync_warp() {
  char nothing = 0, result;
  with_warp(&nothing, 1, &result, 1, [](const unsigned char*, unsigned char* results) {
    memset(results, 0, kLanes);
    ++current_warp().epoch;
  });
}

// A copy may arrive at any time between its start and the wait for it: it counts as a write at both times, and
// between them the target is NaN.
extern "C" void __tsan_write16(void*);
extern "C" void __tsan_read16(void*);

void copy_async(void* to, const void* from, bool valid) {
  Copy copy{static_cast<unsigned char*>(to), {}};
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
    block->error = "a copy is not aligned";
  if (valid) {
    __tsan_read16(const_cast<void*>(from));
    memcpy(copy.from, from, sizeof(copy.from));
  }
  memset(to, 0xff, sizeof(copy.from));
  __tsan_write16(to);
  block->current->copies.back().push_back(copy);
}

void commit_copies() { block->current->copies.emplace_back(); }

void wait_for_copies(int left) {
  auto& groups = block->current->copies;
  while (static_cast<int>(groups.size()) - 1 > left) {
    for (const Copy& copy : groups.front()) {
      memcpy(copy.to, copy.from, sizeof(copy.from));
      __tsan_write16(copy.to);
    }
    groups.erase(groups.begin());
  }
}

void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) block->error = "a row of a matrix is not aligned to 16 bytes";
  __tsan_read16(const_cast<void*>(row));
  struct Row {
    uint16_t values[8];
  } value;
  memcpy(&value, row, sizeof(value));
  with_warp(&value, sizeof(value), to, sizeof(to), [](const unsigned char* inputs, unsigned char* results) {
    const Row* const rows = reinterpret_cast<const Row*>(inputs);
    uint16_t* out = reinterpret_cast<uint16_t*>(results);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int i = 0; i < 2; ++i) *out++ = rows[matrix * 8 + lane / 4].values[lane % 4 * 2 + i];
  });
}

namespace {

struct Fragments {
  uint32_t a[4], b[2];
};

// total += a b for all lanes; `a_at` and `b_at` find an element of a matrix among the lanes' fragments.
template <class AtA, class AtB>
void multiply_fragments(float (&total)[4], const Fragments& value, int depth, const AtA& a_at, const AtB& b_at) {
  float sums[4];
  with_warp(&value, sizeof(value), sums, sizeof(sums), [&](const unsigned char* inputs, unsigned char* results) {
    const Fragments* const warp = reinterpret_cast<const Fragments*>(inputs);
    float* const out = reinterpret_cast<float*>(results);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < depth; ++k) sum += a_at(warp, row, k) * b_at(warp, k, column);
        out[lane * 4 + i] = sum;
      }
  });
  for (int i = 0; i < 4; ++i) total[i] += sums[i];
}

float half_of(uint32_t pair, int which, bool bfloat16) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  if (bfloat16) return __bfloat162float({bits});
  _Float16 value;
  memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

float float_of(uint32_t bits) {
  bits &= 0xffffe000u;  // the product ignores the low bits
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

void multiply_16_bits(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  Fragments value;
  memcpy(value.a, a, sizeof(a));
  memcpy(value.b, b, sizeof(b));
  multiply_fragments(
      total, value, 16,
      [=](const Fragments* warp, int row, int k) {
        return half_of(warp[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2, bfloat16);
      },
      [=](const Fragments* warp, int k, int column) {
        return half_of(warp[column * 4 + k % 8 / 2].b[k / 8], k % 2, bfloat16);
      });
}

void multiply_tf32(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments value;
  memcpy(value.a, a, sizeof(a));
  memcpy(value.b, b, sizeof(b));
  multiply_fragments(
      total, value, 8,
      [](const Fragments* warp, int row, int k) { return float_of(warp[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
      [](const Fragments* warp, int k, int column) { return float_of(warp[column * 4 + k % 4].b[k / 4]); });
}

uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

namespace {

bool ordered(const Access& before, int thread) {
  return before.block_epoch != block->epoch || before.thread == thread ||
         (before.thread / kLanes == thread / kLanes && before.warp_epoch != block->warps[thread / kLanes].epoch);
}

void note_access(void* address, size_t size, bool writes) {
  if (__asan_region_is_poisoned(address, size)) {
    void* const frame = __builtin_frame_address(0);
    __asan_report_error(__builtin_return_address(0), frame, frame, address, writes, size);
  }
  if (!block || !block->current) return;
  const auto offset = static_cast<size_t>(static_cast<unsigned char*>(address) - block->shared);
  if (offset >= block->shadow.size()) return;
  const int thread = block->current->number;
  const Access now{block->epoch, block->warps[thread / kLanes].epoch, thread};
  for (size_t i = offset; i < std::min(offset + size, block->shadow.size()); ++i) {
    Shadow& byte = block->shadow[i];
    const bool after_read =
        ordered(byte.read, thread) && !(byte.read_by_others && byte.read.block_epoch == block->epoch);
    if (!ordered(byte.written, thread) || (writes && !after_read)) {
      const int other = !ordered(byte.written, thread) ? byte.written.thread : byte.read.thread;
      block->error = std::string("threads ") + std::to_string(other) + " and " + std::to_string(thread) +
                     " race for byte " + std::to_string(i) + " of shared memory";
    }
    if (writes) {
      byte.written = now;
    } else {
      const bool same = byte.read.block_epoch == now.block_epoch;
      byte.read_by_others = same && (byte.read_by_others || !ordered(byte.read, thread));
      byte.read = now;
    }
  }
}

}  // namespace
}  // namespace shim

// The functions that -fsanitize=thread calls for each access.
extern "C" {
#define FASTGEN_ACCESS(size)                                                                   \
  void __tsan_read##size(void* address) { shim::note_access(address, size, false); }           \
  void __tsan_write##size(void* address) { shim::note_access(address, size, true); }           \
  void __tsan_unaligned_read##size(void* address) { shim::note_access(address, size, false); } \
  void __tsan_unaligned_write##size(void* address) { shim::note_access(address, size, true); }
FASTGEN_ACCESS(1)
FASTGEN_ACCESS(2)
FASTGEN_ACCESS(4)
FASTGEN_ACCESS(8)
FASTGEN_ACCESS(16)
void __tsan_read_range(void* address, size_t size) { shim::note_access(address, size, false); }
void __tsan_write_range(void* address, size_t size) { shim::note_access(address, size, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
