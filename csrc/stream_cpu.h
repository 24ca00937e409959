// Copies that bypass the cache.
//
// A destination that is only written is first read into the cache by ordinary stores: a fifth of the traffic of a step
// with checkpoint. Stores that bypass the cache save it, and pay once the tables do not stay in the cache between two
// moves. Where a store fills a whole cache line that is so from a few megabytes on; shorter ones, which the processor
// has to gather into lines, lose on tables that the last-level cache could have kept.
#ifndef FFKERNELS_STREAM_CPU_H
#define FFKERNELS_STREAM_CPU_H

#include <algorithm>
#include <cstring>

#include "loops_cpu.h"

namespace ffk {

// Bytes from `at` to the next multiple of `boundary`, at most `bytes`.
FFK_INLINE size_t to_boundary(const char* at, size_t boundary, size_t bytes) {
  return std::min(bytes, static_cast<size_t>(-reinterpret_cast<intptr_t>(at)) & (boundary - 1));
}

struct Stream {
  static constexpr int64_t above = int64_t{12} << 20;
  static FFK_INLINE void copy(void* to, const void* from, size_t bytes) {
#if FFK_X86
    char* dst = static_cast<char*>(to);
    const char* src = static_cast<const char*>(from);
    size_t i = to_boundary(dst, 16, bytes);
    std::memcpy(dst, src, i);
    for (; i + 16 <= bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
    std::memcpy(dst + i, src + i, bytes - i);
#else
    std::memcpy(to, from, bytes);
#endif
  }
};

#if FFK_X86
struct LineStream {
  static constexpr int64_t above = int64_t{4} << 20;
  __attribute__((target("avx512f"))) static void copy(void* to, const void* from, size_t bytes) {
    char* dst = static_cast<char*>(to);
    const char* src = static_cast<const char*>(from);
    size_t i = to_boundary(dst, 64, bytes);
    std::memcpy(dst, src, i);
    for (; i + 64 <= bytes; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
    std::memcpy(dst + i, src + i, bytes - i);
  }
};
#endif

// Bypassing stores are not ordered with others: to be called before the results are handed on.
FFK_INLINE void finish_streaming() {
#if FFK_X86
  _mm_sfence();
#endif
}

}  // namespace ffk

#endif
