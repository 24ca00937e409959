// What every CPU entry point does with a table: which instruction set it takes, and how rows are shared among threads.
#ifndef FFKERNELS_GROUPS_CPU_H
#define FFKERNELS_GROUPS_CPU_H

#include <algorithm>
#include <atomic>

#include "ffkernels.h"
#include "loops_cpu.h"
#include "stream_cpu.h"

namespace ffk {

inline int detect_isa() {
#if FFK_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  return 1;
#else
  return 0;
#endif
}

inline std::atomic<int> isa_in_use{detect_isa()};

inline bool known(const ffk_group* groups, int64_t count, int64_t last_dtype) {
  for (int64_t g = 0; g < count; ++g)
    if (groups[g].dtype < FFK_FLOAT32 || groups[g].dtype > last_dtype) return false;
  return true;
}

inline int64_t elements(const ffk_group& group) {
  int64_t total = 0;
  for (int64_t i = 0; i < group.count; ++i) total += group.rows[i].n;
  return total;
}

// Waking a thread costs more than moving a few thousand elements.
inline int useful_threads(const ffk_group& group, int32_t threads) {
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t useful = std::min<int64_t>(group.count, elements(group) / kElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
}

// Calls body(i) for every row i. `streaming`: it stores past the cache.
template <class Body>
void for_rows(const ffk_group& group, int32_t threads, bool streaming, const Body& body) {
  const int useful = useful_threads(group, threads);
  (void)useful;
#ifdef _OPENMP
  if (useful > 1) {
#pragma omp parallel num_threads(useful)
    {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < group.count; ++i) body(i);
      if (streaming) finish_streaming();
    }
    return;
  }
#endif
  for (int64_t i = 0; i < group.count; ++i) body(i);
  if (streaming) finish_streaming();
}

}  // namespace ffk

#endif
