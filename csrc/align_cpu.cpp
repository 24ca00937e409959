// Alignment on the CPU, one pass over all tensors:
//
//   sums <- <g, d>, <g, g>, <d, d>   with d = W - best ; best <- W
//
// d is rounded to float32 (to float64 for float64 weights). Products and sums are float64: the product of two float32
// is exact there, so only additions round, and gradients of any scale neither overflow nor vanish when squared.
//
// The order of the additions is part of the result, and that of ops/reference.py: a block of 1,024 elements is 16 runs
// of 8 vectors of 8 lanes. The vectors of a run are added up, then the runs, then the lanes and at last all blocks of
// the group by halves. Neither threads nor instruction sets show in the sums, and missing elements are zeros.
//
// Traffic in elements: read W, g and best, write best (4N). best has just been read, so its lines are in the cache:
// stores that bypass it bring nothing on 218 MB, and cost a fifth of the time on 6 MB.
#include <algorithm>
#include <cstring>

#include "ffkernels.h"
#include "groups_cpu.h"
#include "loops_cpu.h"

using namespace ffk;

namespace {

constexpr int64_t kLanes = 8, kVectors = 8, kRun = kLanes * kVectors, kBlock = FFK_BLOCK;

struct Float64 {
  using Store = double;
  static FFK_INLINE double widen(double x) { return x; }
};

struct Sums {
  double dot, gradient, difference;
};

struct LaneSums {
  double dot[kLanes], gradient[kLanes], difference[kLanes];
};

// ---- whole runs: adds n elements, a multiple of kRun, to the sums and copies W to best ----

template <class W, class G>
struct Portable {
  static void add(LaneSums& sums, const typename W::Store* w, typename W::Store* best, const typename G::Store* g,
                  int64_t n) {
    for (int64_t at = 0; at < n; at += kRun) {
      LaneSums run = {};
      for (int64_t v = at; v < at + kRun; v += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
          const double d = W::widen(w[v + lane]) - W::widen(best[v + lane]);
          const double gradient = G::widen(g[v + lane]);
          run.dot[lane] += gradient * d;
          run.gradient[lane] += gradient * gradient;
          run.difference[lane] += d * d;
        }
      for (int lane = 0; lane < kLanes; ++lane) {
        sums.dot[lane] += run.dot[lane];
        sums.gradient[lane] += run.gradient[lane];
        sums.difference[lane] += run.difference[lane];
      }
      std::memcpy(best + at, w + at, kRun * sizeof *w);
    }
  }
};

#if FFK_X86
// Four elements in the width in which they are subtracted. What compilers make of portable vectors of float, when they
// are converted to double, goes through the stack and takes three times as long.
FFK_F16C FFK_INLINE __m128 four(Float32, const float* at) { return _mm_loadu_ps(at); }
FFK_F16C FFK_INLINE __m128 four(BFloat16, const uint16_t* at) {
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(narrow), 16));
}
FFK_F16C FFK_INLINE __m128 four(Float16, const uint16_t* at) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}
FFK_F16C FFK_INLINE __m256d four(Float64, const double* at) { return _mm256_loadu_pd(at); }
FFK_F16C FFK_INLINE __m256d wide(__m128 x) { return _mm256_cvtps_pd(x); }
FFK_F16C FFK_INLINE __m256d wide(__m256d x) { return x; }
FFK_F16C FFK_INLINE __m256d difference(__m128 a, __m128 b) { return _mm256_cvtps_pd(_mm_sub_ps(a, b)); }
FFK_F16C FFK_INLINE __m256d difference(__m256d a, __m256d b) { return _mm256_sub_pd(a, b); }
FFK_F16C FFK_INLINE void add_to(double* sums, __m256d x) {
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), x));
}

// Half of the lanes in a register. Memory is what is waited for: AVX-512 has nothing to add.
template <class W, class G>
struct Avx2 {
  FFK_F16C static void add(LaneSums& sums, const typename W::Store* w, typename W::Store* best,
                           const typename G::Store* g, int64_t n) {
    for (int64_t at = 0; at < n; at += kRun) {
      __m256d dot[2] = {}, gradient[2] = {}, square[2] = {};
#pragma GCC unroll 1  // unrolled, it does not fit into the registers
      for (int v = 0; v < kVectors; ++v)
        for (int half = 0; half < 2; ++half, w += 4, best += 4, g += 4) {
          const __m256d d = difference(four(W{}, w), four(W{}, best));
          const __m256d slope = wide(four(G{}, g));
          std::memcpy(best, w, 4 * sizeof *w);
          dot[half] = _mm256_add_pd(dot[half], _mm256_mul_pd(slope, d));
          gradient[half] = _mm256_add_pd(gradient[half], _mm256_mul_pd(slope, slope));
          square[half] = _mm256_add_pd(square[half], _mm256_mul_pd(d, d));
        }
      for (int half = 0; half < 2; ++half) {
        add_to(sums.dot + 4 * half, dot[half]);
        add_to(sums.gradient + 4 * half, gradient[half]);
        add_to(sums.difference + 4 * half, square[half]);
      }
    }
  }
};
#endif

// ---- one block, of up to kBlock elements ----

inline double fold(double (&x)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

template <template <class, class> class Runs, class W, class G>
Sums block(const void* weights, void* kept, const void* gradients, int64_t n) {
  const auto* w = static_cast<const typename W::Store*>(weights);
  auto* best = static_cast<typename W::Store*>(kept);
  const auto* g = static_cast<const typename G::Store*>(gradients);
  LaneSums sums = {};
  const int64_t whole = n - n % kRun;
  Runs<W, G>::add(sums, w, best, g, whole);
  if (whole < n) {
    typename W::Store w_end[kRun] = {}, best_end[kRun] = {};
    typename G::Store g_end[kRun] = {};
    const size_t left = static_cast<size_t>(n - whole);
    std::memcpy(w_end, w + whole, left * sizeof *w);
    std::memcpy(best_end, best + whole, left * sizeof *w);
    std::memcpy(g_end, g + whole, left * sizeof *g);
    Runs<W, G>::add(sums, w_end, best_end, g_end, kRun);
    std::memcpy(best + whole, w_end, left * sizeof *w);
  }
  return {fold(sums.dot), fold(sums.gradient), fold(sums.difference)};
}

template <class T>
void widen(double* to, const void* from, int64_t n) {
  const auto* x = static_cast<const typename T::Store*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = T::widen(x[i]);
}

struct Kernels {
  Sums (*same)(const void* w, void* best, const void* g, int64_t n);     // g in the dtype of W
  Sums (*widened)(const void* w, void* best, const void* g, int64_t n);  // g in float64
  void (*widen)(double* to, const void* from, int64_t n);
  int64_t itemsize;
};

template <template <class, class> class Runs, class T>
constexpr Kernels kernels() {
  return {block<Runs, T, T>, block<Runs, T, Float64>, widen<T>, sizeof(typename T::Store)};
}

// By instruction set, then by ffk_dtype.
constexpr Kernels kKernels[][4] = {
    {kernels<Portable, Float32>(), kernels<Portable, BFloat16>(), kernels<Portable, Float16>(),
     kernels<Portable, Float64>()},
#if FFK_X86
    {kernels<Avx2, Float32>(), kernels<Avx2, BFloat16>(), kernels<Avx2, Float16>(), kernels<Avx2, Float64>()},
#endif
};

// ---- rows and groups ----

void align_row(const Kernels* kernels, int64_t dtype, const ffk_row& row, const ffk_gradient& gradient, int64_t start,
               Sums* sums) {
  const Kernels& kernel = kernels[dtype];
  const char* w = reinterpret_cast<const char*>(row.w);
  char* best = reinterpret_cast<char*>(row.best);
  const char* g = reinterpret_cast<const char*>(gradient.at);
  for (int64_t at = 0; at < row.n; at += kBlock, ++sums) {
    const int64_t n = std::min(kBlock, row.n - at), skip = at * kernel.itemsize;
    if (g == nullptr) {
      static const double zeros[kBlock] = {};
      // Not even times an infinite d does a missing gradient count.
      *sums = {0.0, 0.0, kernel.same(w + skip, best + skip, zeros, n).difference};
    } else if (gradient.dtype == dtype) {
      *sums = kernel.same(w + skip, best + skip, g + start * kernel.itemsize + skip, n);
    } else {
      const Kernels& other = kernels[gradient.dtype];
      double wide[kBlock];
      other.widen(wide, g + (start + at) * other.itemsize, n);
      *sums = kernel.widened(w + skip, best + skip, wide, n);
    }
  }
}

int64_t blocks(const ffk_row& row) { return (row.n + kBlock - 1) / kBlock; }

void add(Sums& to, const Sums& x) {
  to.dot += x.dot;
  to.gradient += x.gradient;
  to.difference += x.difference;
}

Sums fold(Sums* sums, int64_t n) {
  int64_t half = 1;
  while (half < n) half *= 2;
  for (half /= 2; half > 0; n = std::min(n, half), half /= 2)
    for (int64_t i = 0; i + half < n; ++i) add(sums[i], sums[i + half]);
  return sums[0];
}

}  // namespace

extern "C" int32_t ffk_cpu_align(const ffk_group* groups, int64_t count, const ffk_gradient* gradients, double* scratch,
                                 double* out, int32_t threads) {
  if (!known(groups, count, FFK_FLOAT64)) return FFK_E_DTYPE;
  const Kernels* kernels = kKernels[std::min(isa_in_use.load(std::memory_order_relaxed), 1)];
  Sums* sums = reinterpret_cast<Sums*>(scratch);
  Sums total = {};
  for (int64_t g = 0; g < count; ++g) {
    const ffk_group& group = groups[g];
    if (group.count == 0) continue;
    for_rows(group, threads, false, [&](int64_t i) {
      const ffk_place& place = group.places[i];
      align_row(kernels, group.dtype, group.rows[i], gradients[place.tensor], place.start, sums + place.block);
    });
    const int64_t last = group.count - 1;
    add(total, fold(sums, group.places[last].block + blocks(group.rows[last])));
  }
  out[0] = total.dot;
  out[1] = total.gradient;
  out[2] = total.difference;
  return 0;
}
