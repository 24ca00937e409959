// The weight moves of Fast Forward on the CPU, one pass over all tensors.
//
//   checkpoint   best <- W
//   delta        delta <- W - best ; best <- W
//   step         base = accept ? W : best ; best <- base ; W <- base + k * delta
//
// Arithmetic is float32 whatever the storage: the product is rounded, the sum is rounded, then once more to the
// storage dtype. Contraction to fma would skip the first rounding, so this file must be built with -ffp-contract=off.
// Traffic of step with accept, in elements: read W and delta, write W and best (4N); without accept best is only
// read (3N); k == 0 leaves out delta and whichever side already holds base (2N).
//
// Each body is written once and compiled for several instruction sets; the processor picks at run time.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "ffkernels.h"
#include "groups_cpu.h"
#include "loops_cpu.h"
#include "stream_cpu.h"

#ifndef FFK_SOURCE_ID
#define FFK_SOURCE_ID ""
#endif

using namespace ffk;

namespace {

// Elements per block of the streaming variants: what is staged stays in the first-level cache.
constexpr int64_t kBlock = 1024;

struct Call {
  bool accept;
  bool streaming;
  float k;
};

template <class T>
struct Chunk {
  using Store = typename T::Store;
  Store *w, *delta, *best;
  int64_t n;
  explicit FFK_INLINE Chunk(const ffk_row& row)
      : w(reinterpret_cast<Store*>(row.w)),
        delta(reinterpret_cast<Store*>(row.delta)),
        best(reinterpret_cast<Store*>(row.best)),
        n(row.n) {}
};

template <class Stream, class S>
FFK_INLINE void copy(S* to, const S* from, int64_t n, bool streaming) {
  const size_t bytes = static_cast<size_t>(n) * sizeof(S);
  if (streaming)
    Stream::copy(to, from, bytes);
  else
    std::memcpy(to, from, bytes);
}

template <class T, class L, class Stream>
FFK_INLINE void step_chunk(const ffk_row& row, const Call& call) {
  using S = typename T::Store;
  const Chunk<T> c(row);
  if (call.k == 0.0f) {
    if (call.accept)
      copy<Stream>(c.best, c.w, c.n, call.streaming);
    else
      copy<Stream>(c.w, c.best, c.n, call.streaming);
  } else if (!call.streaming) {
    if (call.accept)
      L::add_saving(c.w, c.best, c.delta, c.n, call.k);
    else
      L::add_to(c.w, c.best, c.delta, c.n, call.k);
  } else {
    S staged[kBlock];
    for (int64_t at = 0; at < c.n; at += kBlock) {
      const int64_t n = std::min(kBlock, c.n - at);
      if (call.accept) {
        copy<Stream>(c.best + at, c.w + at, n, true);
        L::add(c.w + at, c.delta + at, n, call.k);
      } else {
        L::add_to(staged, c.best + at, c.delta + at, n, call.k);
        copy<Stream>(c.w + at, staged, n, true);
      }
    }
  }
}

template <class T, class L, class Stream>
FFK_INLINE void delta_chunk(const ffk_row& row, const Call& call) {
  using S = typename T::Store;
  const Chunk<T> c(row);
  if (!call.streaming) return L::subtract(c.delta, c.w, c.best, c.n);
  S staged[kBlock];
  for (int64_t at = 0; at < c.n; at += kBlock) {
    const int64_t n = std::min(kBlock, c.n - at);
    L::subtract(staged, c.w + at, c.best + at, n);
    copy<Stream>(c.delta + at, staged, n, true);
  }
}

// Magnitudes compare as integers: any infinity is above every number and any NaN above infinity.
template <class T>
FFK_INLINE uint32_t absmax_chunk(const ffk_row& row) {
  const Chunk<T> c(row);
  uint32_t largest = 0;
  for (int64_t i = 0; i < c.n; ++i) largest = std::max(largest, T::magnitude(c.delta[i]));
  return largest;
}

struct Kernels {
  void (*step)(const ffk_row&, const Call&);
  void (*delta)(const ffk_row&, const Call&);
  uint32_t (*absmax)(const ffk_row&);
  float (*from_magnitude)(uint32_t);
  int64_t itemsize, stream_above;
};

#define FFK_DEFINE_ISA(NAME, TARGET)                                                                         \
  template <class T, class L, class Stream>                                                                  \
  struct NAME {                                                                                              \
    TARGET static void step(const ffk_row& row, const Call& call) { step_chunk<T, L, Stream>(row, call); }   \
    TARGET static void delta(const ffk_row& row, const Call& call) { delta_chunk<T, L, Stream>(row, call); } \
    TARGET static uint32_t absmax(const ffk_row& row) { return absmax_chunk<T>(row); }                       \
    static constexpr Kernels kernels() {                                                                     \
      return {step, delta, absmax, T::from_magnitude, sizeof(typename T::Store), Stream::above};             \
    }                                                                                                        \
  };

FFK_DEFINE_ISA(Baseline, )
#if FFK_X86
FFK_DEFINE_ISA(Avx2, __attribute__((target("avx2"))))
FFK_DEFINE_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

// By instruction set, then by ffk_dtype. Float32 waits for memory, so wider registers bring it nothing; bfloat16
// computes enough to gain from them.
constexpr Kernels kKernels[][3] = {
    {Baseline<Float32, Loops<Float32>, Stream>::kernels(), Baseline<BFloat16, Loops<BFloat16>, Stream>::kernels(),
     Baseline<Float16, Loops<Float16>, Stream>::kernels()},
#if FFK_X86
    {Avx2<Float32, Loops<Float32>, Stream>::kernels(), Avx2<BFloat16, Loops<BFloat16>, Stream>::kernels(),
     Avx2<Float16, F16cLoops, Stream>::kernels()},
    {Avx2<Float32, Loops<Float32>, LineStream>::kernels(), Avx512<BFloat16, Loops<BFloat16>, LineStream>::kernels(),
     Avx2<Float16, F16cLoops, LineStream>::kernels()},
#endif
};

int64_t bytes(const ffk_group* groups, int64_t count, const Kernels* kernels) {
  int64_t total = 0;
  for (int64_t g = 0; g < count; ++g) total += elements(groups[g]) * kernels[groups[g].dtype].itemsize;
  return total;
}

int32_t step(const ffk_group* groups, int64_t count, bool accept, float k, int32_t threads) {
  if (!known(groups, count, FFK_FLOAT16)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[isa_in_use.load(std::memory_order_relaxed)];
  const int64_t size = bytes(groups, count, kernels);
  for (int64_t g = 0; g < count; ++g) {
    const Kernels& kernel = kernels[groups[g].dtype];
    const Call call{accept, size > kernel.stream_above, k};
    for_rows(groups[g], threads, call.streaming, [&](int64_t i) { kernel.step(groups[g].rows[i], call); });
  }
  return 0;
}

}  // namespace

extern "C" {

int32_t ffk_abi(void) { return FFK_ABI; }

const char* ffk_source_id(void) { return FFK_SOURCE_ID; }

int32_t ffk_cpu_threaded(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int32_t ffk_cpu_isa(int32_t limit) {
  if (limit >= 0) isa_in_use.store(std::min<int>(limit, detect_isa()));
  return isa_in_use.load();
}

int32_t ffk_cpu_checkpoint(const ffk_group* groups, int64_t count, int32_t threads) {
  return step(groups, count, true, 0.0f, threads);
}

int32_t ffk_cpu_step(const ffk_group* groups, int64_t count, int32_t accept, float k, int32_t threads) {
  return step(groups, count, accept != 0, k, threads);
}

int32_t ffk_cpu_delta(const ffk_group* groups, int64_t count, int32_t threads) {
  if (!known(groups, count, FFK_FLOAT16)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[isa_in_use.load(std::memory_order_relaxed)];
  const int64_t size = bytes(groups, count, kernels);
  for (int64_t g = 0; g < count; ++g) {
    const Kernels& kernel = kernels[groups[g].dtype];
    const Call call{true, size > kernel.stream_above, 0.0f};
    for_rows(groups[g], threads, call.streaming, [&](int64_t i) { kernel.delta(groups[g].rows[i], call); });
  }
  return 0;
}

int32_t ffk_cpu_absmax(const ffk_group* groups, int64_t count, int32_t threads, float* out) {
  if (!known(groups, count, FFK_FLOAT16)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[isa_in_use.load(std::memory_order_relaxed)];
  float largest = 0.0f;
  for (int64_t g = 0; g < count; ++g) {
    const Kernels& kernel = kernels[groups[g].dtype];
    std::atomic<uint32_t> shared{0};
    for_rows(groups[g], threads, false, [&](int64_t i) {
      const uint32_t found = kernel.absmax(groups[g].rows[i]);
      uint32_t seen = shared.load(std::memory_order_relaxed);
      while (found > seen && !shared.compare_exchange_weak(seen, found, std::memory_order_relaxed)) {
      }
    });
    const float of_group = kernel.from_magnitude(shared.load());
    if (!(of_group <= largest)) largest = of_group;
    if (largest != largest) break;
  }
  *out = largest;
  return 0;
}

}  // extern "C"
