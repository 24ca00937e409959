// The arithmetic of one run of elements, for every storage type: W + k * delta and W - best.
//
// Everything is float32 inside: `widen` is exact, `narrow` rounds to nearest, ties to even, and keeps a NaN
// a NaN. The loops are written to become vector code under whatever instruction set their caller is compiled for.
#ifndef FFKERNELS_LOOPS_CPU_H
#define FFKERNELS_LOOPS_CPU_H

#include <stdint.h>

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FFK_X86 1
#else
#define FFK_X86 0
#endif

#if defined(__GNUC__)
#define FFK_INLINE inline __attribute__((always_inline))
#else
#define FFK_INLINE inline
#endif

namespace ffk {

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
  // The store to best comes last: ahead of the load of delta it would hold the whole loop up.
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
// Half precision with the processor's own conversions, eight at a time; the portable ones take many more.
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
    for (int64_t i = whole; i < n; ++i) w[i] = Float16::narrow(Float16::widen(base[i]) + k * Float16::widen(delta[i]));
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

}  // namespace ffk

#endif
