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
#include "ffkernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FFK_X86 1
#else
#define FFK_X86 0
#endif

#ifndef FFK_SOURCE_ID
#define FFK_SOURCE_ID ""
#endif

#if defined(__GNUC__)
#define FFK_INLINE inline __attribute__((always_inline))
#else
#define FFK_INLINE inline
#endif

namespace {

// ---- storage types: widen is exact, narrow rounds to nearest, ties to even ----

FFK_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

FFK_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// A choice made of masks: compilers keep `?:` between computed values as a branch, and a branch keeps the loop scalar.
FFK_INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

struct Float32 {
  using Store = float;
  static FFK_INLINE float widen(float x) { return x; }
  static FFK_INLINE float narrow(float x) { return x; }
  static FFK_INLINE uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }
  static float from_magnitude(uint32_t u) { return float_of(u); }
};

struct BFloat16 {
  using Store = uint16_t;
  static FFK_INLINE float widen(uint16_t x) { return float_of(uint32_t{x} << 16); }
  static FFK_INLINE uint16_t narrow(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(choose(x != x, 0x7fc0u, rounded));
  }
  static FFK_INLINE uint32_t magnitude(uint16_t x) { return x & 0x7fffu; }
  static float from_magnitude(uint32_t u) { return widen(static_cast<uint16_t>(u)); }
};

// Branch-free, so that the loops around it become vector code without half-precision instructions. Subnormal halves
// go through integers, which keeps them right when the caller runs with denormals flushed to zero.
struct Float16 {
  using Store = uint16_t;
  static FFK_INLINE float widen(uint16_t x) {
    const uint32_t sign = uint32_t{x & 0x8000u} << 16, magnitude = x & 0x7fffu;
    const uint32_t rebias = choose(magnitude >= 0x7c00u, 224u << 23, 112u << 23);
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    return float_of(sign | choose(magnitude < 0x400u, bits_of(subnormal), (magnitude << 13) + rebias));
  }
  static FFK_INLINE uint16_t narrow(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // 0.5 has the spacing of half's subnormals, so the addition itself rounds to them.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = choose(x != x, 0x7e00u, 0x7c00u);
    const uint32_t finite = choose(magnitude < 0x38800000u, subnormal, normal);
    return static_cast<uint16_t>(sign | choose(magnitude >= 0x47800000u, special, finite));
  }
  static FFK_INLINE uint32_t magnitude(uint16_t x) { return x & 0x7fffu; }
  static float from_magnitude(uint32_t u) { return widen(static_cast<uint16_t>(u)); }
};

// ---- stores that bypass the cache ----

// A destination that is only written would first be read into the cache by an ordinary store. Above the size where
// the tables leave the cache anyway that read is a quarter of the traffic of step; below it, bypassing is a loss.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// Elements per block of the streaming variants: what is staged stays in the first-level cache.
constexpr int64_t kBlock = 1024;

FFK_INLINE void stream(void* to, const void* from, size_t bytes) {
#if FFK_X86
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  const size_t head = std::min(bytes, static_cast<size_t>(-reinterpret_cast<intptr_t>(dst) & 15));
  std::memcpy(dst, src, head);
  size_t i = head;
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
  std::memcpy(dst + i, src + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

FFK_INLINE void finish_streaming() {
#if FFK_X86
  _mm_sfence();
#endif
}

// ---- one chunk ----

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

template <class S>
FFK_INLINE void copy(S* to, const S* from, int64_t n, bool streaming) {
  const size_t bytes = static_cast<size_t>(n) * sizeof(S);
  if (streaming)
    stream(to, from, bytes);
  else
    std::memcpy(to, from, bytes);
}

template <class T>
struct Loops {
  using S = typename T::Store;
  static FFK_INLINE void add(S* __restrict w, const S* __restrict delta, int64_t n, float k) {
    for (int64_t i = 0; i < n; ++i) w[i] = T::narrow(T::widen(w[i]) + k * T::widen(delta[i]));
  }
  static FFK_INLINE void add_to(S* __restrict w, const S* __restrict base, const S* __restrict delta, int64_t n,
                                float k) {
    for (int64_t i = 0; i < n; ++i) w[i] = T::narrow(T::widen(base[i]) + k * T::widen(delta[i]));
  }
  // All loads before all stores: a store to best ahead of the load of delta held this loop up by a third.
  static FFK_INLINE void add_saving(S* __restrict w, S* __restrict best, const S* __restrict delta, int64_t n,
                                    float k) {
    for (int64_t i = 0; i < n; ++i) {
      const S base = w[i];
      w[i] = T::narrow(T::widen(base) + k * T::widen(delta[i]));
      best[i] = base;
    }
  }
  static FFK_INLINE void subtract(S* __restrict delta, const S* __restrict w, S* __restrict best, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const S now = w[i];
      delta[i] = T::narrow(T::widen(now) - T::widen(best[i]));
      best[i] = now;
    }
  }
};

#if FFK_X86
// Half precision with the processor's own conversions, eight at a time; the portable ones take several times as long.
#define FFK_F16C __attribute__((target("avx2,f16c")))
struct F16cLoops {
  using S = uint16_t;
  FFK_F16C static FFK_INLINE __m256 load(const S* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  FFK_F16C static FFK_INLINE void store(S* to, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  FFK_F16C static FFK_INLINE __m256 sum(const S* base, const S* delta, __m256 k) {
    return _mm256_add_ps(load(base), _mm256_mul_ps(k, load(delta)));
  }
  FFK_F16C static void add_to(S* w, const S* base, const S* delta, int64_t n, float k) {
    const int64_t whole = n & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) store(w + i, sum(base + i, delta + i, _mm256_set1_ps(k)));
    for (int64_t i = whole; i < n; ++i)
      w[i] = Float16::narrow(Float16::widen(base[i]) + k * Float16::widen(delta[i]));
  }
  FFK_F16C static void add(S* w, const S* delta, int64_t n, float k) { add_to(w, w, delta, n, k); }
  FFK_F16C static void add_saving(S* w, S* best, const S* delta, int64_t n, float k) {
    const int64_t whole = n & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) {
      const __m256 moved = sum(w + i, delta + i, _mm256_set1_ps(k));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(best + i), _mm_loadu_si128(reinterpret_cast<__m128i*>(w + i)));
      store(w + i, moved);
    }
    Loops<Float16>::add_saving(w + whole, best + whole, delta + whole, n - whole, k);
  }
  FFK_F16C static void subtract(S* delta, const S* w, S* best, int64_t n) {
    const int64_t whole = n & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) {
      store(delta + i, _mm256_sub_ps(load(w + i), load(best + i)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(best + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i)));
    }
    Loops<Float16>::subtract(delta + whole, w + whole, best + whole, n - whole);
  }
};
#endif

template <class T, class L>
FFK_INLINE void step_chunk(const ffk_row& row, const Call& call) {
  using S = typename T::Store;
  const Chunk<T> c(row);
  if (call.k == 0.0f) {
    if (call.accept)
      copy(c.best, c.w, c.n, call.streaming);
    else
      copy(c.w, c.best, c.n, call.streaming);
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
        stream(c.best + at, c.w + at, static_cast<size_t>(n) * sizeof(S));
        L::add(c.w + at, c.delta + at, n, call.k);
      } else {
        L::add_to(staged, c.best + at, c.delta + at, n, call.k);
        stream(c.w + at, staged, static_cast<size_t>(n) * sizeof(S));
      }
    }
  }
}

template <class T, class L>
FFK_INLINE void delta_chunk(const ffk_row& row, const Call& call) {
  using S = typename T::Store;
  const Chunk<T> c(row);
  if (!call.streaming) return L::subtract(c.delta, c.w, c.best, c.n);
  S staged[kBlock];
  for (int64_t at = 0; at < c.n; at += kBlock) {
    const int64_t n = std::min(kBlock, c.n - at);
    L::subtract(staged, c.w + at, c.best + at, n);
    stream(c.delta + at, staged, static_cast<size_t>(n) * sizeof(S));
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

// ---- instruction sets ----

struct Kernels {
  void (*step)(const ffk_row&, const Call&);
  void (*delta)(const ffk_row&, const Call&);
  uint32_t (*absmax)(const ffk_row&);
  float (*from_magnitude)(uint32_t);
  int64_t itemsize;
};

#define FFK_DEFINE_ISA(NAME, TARGET)                                                              \
  template <class T, class L = Loops<T>>                                                          \
  struct NAME {                                                                                   \
    TARGET static void step(const ffk_row& row, const Call& call) { step_chunk<T, L>(row, call); }   \
    TARGET static void delta(const ffk_row& row, const Call& call) { delta_chunk<T, L>(row, call); } \
    TARGET static uint32_t absmax(const ffk_row& row) { return absmax_chunk<T>(row); }            \
    static constexpr Kernels kernels() {                                                          \
      return {step, delta, absmax, T::from_magnitude, sizeof(typename T::Store)};                 \
    }                                                                                             \
  };

#define FFK_ISA_KERNELS(NAME, HALF_LOOPS) \
  { NAME<Float32>::kernels(), NAME<BFloat16>::kernels(), NAME<Float16, HALF_LOOPS>::kernels() }

FFK_DEFINE_ISA(Baseline, )
#if FFK_X86
FFK_DEFINE_ISA(Avx2, __attribute__((target("avx2"))))
FFK_DEFINE_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
constexpr Kernels kKernels[][3] = {FFK_ISA_KERNELS(Baseline, Loops<Float16>), FFK_ISA_KERNELS(Avx2, F16cLoops), FFK_ISA_KERNELS(Avx512, F16cLoops)};
#else
constexpr Kernels kKernels[][3] = {FFK_ISA_KERNELS(Baseline, Loops<Float16>)};
#endif

int detect_isa() {
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

std::atomic<int> isa_in_use{detect_isa()};

// ---- a whole table ----

bool known(const ffk_group* groups, int64_t count) {
  for (int64_t g = 0; g < count; ++g)
    if (groups[g].dtype < FFK_FLOAT32 || groups[g].dtype > FFK_FLOAT16) return false;
  return true;
}

int64_t elements(const ffk_group& group) {
  int64_t total = 0;
  for (int64_t i = 0; i < group.count; ++i) total += group.rows[i].n;
  return total;
}

int64_t bytes(const ffk_group* groups, int64_t count, const Kernels* kernels) {
  int64_t total = 0;
  for (int64_t g = 0; g < count; ++g) total += elements(groups[g]) * kernels[groups[g].dtype].itemsize;
  return total;
}

// Waking a thread costs more than moving a few thousand elements.
int useful_threads(const ffk_group& group, int32_t threads) {
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t useful = std::min<int64_t>(group.count, elements(group) / kElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
}

template <class Body>
void for_rows(const ffk_group& group, int32_t threads, bool streaming, const Body& body) {
  const int useful = useful_threads(group, threads);
  (void)useful;
#ifdef _OPENMP
  if (useful > 1) {
#pragma omp parallel num_threads(useful)
    {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < group.count; ++i) body(group.rows[i]);
      if (streaming) finish_streaming();
    }
    return;
  }
#endif
  for (int64_t i = 0; i < group.count; ++i) body(group.rows[i]);
  if (streaming) finish_streaming();
}

int32_t step(const ffk_group* groups, int64_t count, bool accept, float k, int32_t threads) {
  if (!known(groups, count)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[isa_in_use.load(std::memory_order_relaxed)];
  const Call call{accept, bytes(groups, count, kernels) > kStreamBytes, k};
  for (int64_t g = 0; g < count; ++g) {
    const auto run = kernels[groups[g].dtype].step;
    for_rows(groups[g], threads, call.streaming, [&](const ffk_row& row) { run(row, call); });
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
  if (!known(groups, count)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[isa_in_use.load(std::memory_order_relaxed)];
  const Call call{true, bytes(groups, count, kernels) > kStreamBytes, 0.0f};
  for (int64_t g = 0; g < count; ++g) {
    const auto run = kernels[groups[g].dtype].delta;
    for_rows(groups[g], threads, call.streaming, [&](const ffk_row& row) { run(row, call); });
  }
  return 0;
}

int32_t ffk_cpu_absmax(const ffk_group* groups, int64_t count, int32_t threads, float* out) {
  if (!known(groups, count)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[isa_in_use.load(std::memory_order_relaxed)];
  float largest = 0.0f;
  for (int64_t g = 0; g < count; ++g) {
    const Kernels& kernel = kernels[groups[g].dtype];
    std::atomic<uint32_t> shared{0};
    for_rows(groups[g], threads, false, [&](const ffk_row& row) {
      const uint32_t found = kernel.absmax(row);
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
