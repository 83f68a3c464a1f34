// Stores a computed block to a tensor: past the caches (streaming stores) if it would be evicted before it is read.
// Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

// Whether the `bytes` that a call reads and writes are evicted from the last-level cache before they are used again.
// The bound is half of a common cache.
inline bool leaves_cache(int64_t bytes) { return bytes > (16 << 20); }

template <class T>
inline void store_block(T* p, const Acc<T>* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(p + i, in[i]);
}

// Where to compute a block: in the tensor itself if it has the accumulation type and is not streamed, else in a buffer.
template <class T>
inline Acc<T>* staging(T* p, Acc<T>* buffer, bool streams = false) {
  if constexpr (std::is_same_v<T, Acc<T>>)
    if (!streams) return p;
  return buffer;
}

// Moves a block from the place that `staging` returned to the tensor: past the caches if `streams`.
template <class T>
inline void flush(T* p, const Acc<T>* in, int64_t count, [[maybe_unused]] bool streams = false) {
  if (static_cast<const void*>(p) == in) return;
  int64_t i = 0;
#if defined(__x86_64__) && FASTGEN_VECTOR_BYTES >= 32
  if constexpr (std::is_same_v<T, float>)
    if (streams) {
      constexpr int64_t size = FASTGEN_VECTOR_BYTES / sizeof(float);
      for (; i < count && reinterpret_cast<uintptr_t>(p + i) % FASTGEN_VECTOR_BYTES; ++i) p[i] = in[i];
      for (; i + size <= count; i += size) {
#if FASTGEN_VECTOR_BYTES == 64
        _mm512_stream_ps(p + i, _mm512_loadu_ps(in + i));
#else
        _mm256_stream_ps(p + i, _mm256_loadu_ps(in + i));
#endif
      }
    }
#endif
  store_block(p + i, in + i, count - i);
}

// Called after a task's streamed stores, so that the thread that waits for the task sees them.
inline void finish_streams([[maybe_unused]] bool streams) {
#if defined(__x86_64__)
  if (streams) _mm_sfence();
#endif
}

}  // namespace fastgen::cpu::FASTGEN_ISA
