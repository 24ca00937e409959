// Alignment on a GPU, one launch per storage dtype of the weights:
//
//   out <- <g, d>, <g, g>, <d, d>   with d = W - best ; best <- W        reads 2N and g, writes N
//
// d is rounded to float32 (float64 for float64 weights), products and sums are float64, none of them contracted. The
// order of the additions is fixed: a block adds up its row, thread by thread, by shuffles and warp by warp. The block
// that ends last of 128 neighbours adds up theirs in the same way, and the one that ends last of all adds up those
// sums, and what the launches for other dtypes left in `out`. Which block is last is chance, but not what it adds.
//
// A row whose gradient has the dtype of its weight, and whose three addresses are multiples of 16, takes 16 bytes per
// access; any other takes single elements, in the same launch.
#include "ffkernels.h"
#include "groups_cuda.h"

using namespace ffk;

namespace {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
static_assert(FFK_SEGMENT == kThreads, "each thread adds up one row of a segment");

// ---- storage types: `Wide` is a 16-byte access, `each` calls term(W, best, g) for its elements one by one ----

struct Float32 {
  using Store = float;
  using Wide = float4;
  static constexpr int64_t code = FFK_FLOAT32;
  static __device__ float widen(float x) { return x; }
  template <class Each>
  static __device__ void each(float4 w, float4 best, float4 g, const Each& term) {
    term(w.x, best.x, g.x), term(w.y, best.y, g.y), term(w.z, best.z, g.z), term(w.w, best.w, g.w);
  }
};

template <class Words, int64_t kCode>
struct Pairs {
  using Store = uint16_t;
  using Wide = uint4;
  static constexpr int64_t code = kCode;
  static __device__ float widen(uint16_t x) { return Words::widen(x).x; }
  template <class Each>
  static __device__ void each(uint4 w, uint4 best, uint4 g, const Each& term) {
    pair(w.x, best.x, g.x, term), pair(w.y, best.y, g.y, term);
    pair(w.z, best.z, g.z, term), pair(w.w, best.w, g.w, term);
  }

 private:
  template <class Each>
  static __device__ void pair(uint32_t w, uint32_t best, uint32_t g, const Each& term) {
    const float2 a = Words::widen(w), b = Words::widen(best), c = Words::widen(g);
    term(a.x, b.x, c.x), term(a.y, b.y, c.y);
  }
};

using BFloat16 = Pairs<BFloat16Words, FFK_BFLOAT16>;
using Float16 = Pairs<Float16Words, FFK_FLOAT16>;

struct Float64 {
  using Store = double;
  using Wide = double2;
  static constexpr int64_t code = FFK_FLOAT64;
  static __device__ double widen(double x) { return x; }
  template <class Each>
  static __device__ void each(double2 w, double2 best, double2 g, const Each& term) {
    term(w.x, best.x, g.x), term(w.y, best.y, g.y);
  }
};

__device__ double difference(float a, float b) { return __fsub_rn(a, b); }
__device__ double difference(double a, double b) { return __dsub_rn(a, b); }

// ---- sums ----

struct Sums {
  double dot = 0.0, gradient = 0.0, difference = 0.0;

  __device__ void term(double d, double g) {
    dot = __dadd_rn(dot, __dmul_rn(g, d));
    gradient = __dadd_rn(gradient, __dmul_rn(g, g));
    difference = __dadd_rn(difference, __dmul_rn(d, d));
  }
  __device__ void add(const Sums& x) {
    dot = __dadd_rn(dot, x.dot);
    gradient = __dadd_rn(gradient, x.gradient);
    difference = __dadd_rn(difference, x.difference);
  }
  // What other blocks have written is in the second cache, not in that of this multiprocessor.
  static __device__ Sums load(const double* at) {
    Sums x;
    x.dot = __ldcg(at), x.gradient = __ldcg(at + 1), x.difference = __ldcg(at + 2);
    return x;
  }
  __device__ void store(double* at) const { at[0] = dot, at[1] = gradient, at[2] = difference; }
};

// Adds up the threads' sums; thread 0 has the result.
__device__ void add_up_block(Sums& sums) {
  __shared__ double of_warps[kWarps][3];
#pragma unroll
  for (int down = kWarp / 2; down > 0; down /= 2) {
    Sums other;
    other.dot = __shfl_down_sync(0xffffffffu, sums.dot, down);
    other.gradient = __shfl_down_sync(0xffffffffu, sums.gradient, down);
    other.difference = __shfl_down_sync(0xffffffffu, sums.difference, down);
    sums.add(other);
  }
  if (threadIdx.x % kWarp == 0) sums.store(of_warps[threadIdx.x / kWarp]);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) {
      const double* x = of_warps[warp];
      Sums other;
      other.dot = x[0], other.gradient = x[1], other.difference = x[2];
      sums.add(other);
    }
}

// Whether this block is the last of `members` to come here, with all that the others have written in sight. The ticket
// is back at 0 then, for the next launch.
__device__ bool last_of(uint32_t* ticket, uint32_t members) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, members - 1) == members - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ---- one row ----

__device__ double element(const ffk_gradient& gradient, int64_t i) {
  if (gradient.at == 0) return 0.0;
  if (gradient.dtype == FFK_FLOAT32) return global<const float>(gradient.at)[i];
  if (gradient.dtype == FFK_FLOAT64) return global<const double>(gradient.at)[i];
  const uint32_t bits = global<const uint16_t>(gradient.at)[i];
  return gradient.dtype == FFK_BFLOAT16 ? BFloat16Words::widen(bits).x : Float16Words::widen(bits).x;
}

template <class Store>
struct Loaded {
  Store w, best;
  double g;
};

template <class T, int U>
__device__ void narrow(const ffk_row& row, const ffk_gradient& gradient, int64_t start, int64_t from, Sums& sums) {
  using Store = typename T::Store;
  const Store* w = global<const Store>(row.w) + from;
  Store* best = global<Store>(row.best) + from;
  rounds<Store, U>(
      row.n - from,
      [&](int64_t i) { return Loaded<Store>{w[i], __ldcs(best + i), element(gradient, start + from + i)}; },
      [&](int64_t i, const Loaded<Store>& x) {
        __stcs(best + i, x.w);
        sums.term(difference(T::widen(x.w), T::widen(x.best)), x.g);
      });
}

template <class Wide>
struct Three {
  Wide w, best, g;
};

template <class T>
__device__ void wide(const ffk_row& row, int64_t gradient, Sums& sums) {
  using Wide = typename T::Wide;
  constexpr int kPer = sizeof(Wide) / sizeof(typename T::Store);
  // All of a full row is on its way at once; of float64 a quarter, as more does not fit into the registers.
  constexpr int kUnits = sizeof(typename T::Store) == 8 ? 2 : kRound / kPer / kThreads;
  const Wide *w = global<const Wide>(row.w), *g = global<const Wide>(gradient);
  Wide* best = global<Wide>(row.best);
  // The optimizer reads W and the gradient next; best is not read before the next step, and leaves the cache first.
  rounds<Wide, kUnits>(
      row.n / kPer, [&](int64_t i) { return Three<Wide>{w[i], __ldcs(best + i), g[i]}; },
      [&](int64_t i, const Three<Wide>& x) {
        __stcs(best + i, x.w);
        T::each(x.w, x.best, x.g,
                [&](auto after, auto before, auto slope) { sums.term(difference(after, before), slope); });
      });
}

template <class T>
__device__ Sums align_row(const ffk_row& row, const ffk_gradient& gradient, int64_t start) {
  using Store = typename T::Store;
  constexpr int64_t kPer = sizeof(typename T::Wide) / sizeof(Store);
  const int64_t g = gradient.at + start * static_cast<int64_t>(sizeof(Store));
  Sums sums;
  if (gradient.at != 0 && gradient.dtype == T::code && ((row.w | row.best | g) & 15) == 0) {
    wide<T>(row, g, sums);
    narrow<T, 1>(row, gradient, start, row.n / kPer * kPer, sums);
  } else {
    narrow<T, kNarrowUnroll>(row, gradient, start, 0, sums);
    if (gradient.at == 0) sums.dot = 0.0;  // not even times an infinite d does a missing gradient count
  }
  return sums;
}

struct Arguments {
  const ffk_row* rows;
  const ffk_place* places;
  const ffk_gradient* gradients;
  unsigned count;
  double* scratch;
  uint32_t* tickets;
  double* out;
  bool first;  // of the launches that add to `out`
};

template <class T>
__global__ void __launch_bounds__(kThreads) align_kernel(const Arguments a) {
  const longlong2* row = reinterpret_cast<const longlong2*>(a.rows + blockIdx.x);
  const longlong2 w_delta = __ldg(row), best_n = __ldg(row + 1);
  const ffk_place* place = a.places + blockIdx.x;
  const int64_t tensor = place->tensor, start = place->start;
  const longlong2 gradient = __ldg(reinterpret_cast<const longlong2*>(a.gradients + tensor));

  Sums sums = align_row<T>({w_delta.x, w_delta.y, best_n.x, best_n.y}, {gradient.x, gradient.y}, start);
  add_up_block(sums);

  const unsigned segment = blockIdx.x / FFK_SEGMENT, segments = (a.count + FFK_SEGMENT - 1) / FFK_SEGMENT;
  const unsigned begin = segment * FFK_SEGMENT, left = a.count - begin;
  const unsigned members = left < FFK_SEGMENT ? left : FFK_SEGMENT;
  if (threadIdx.x == 0) sums.store(a.scratch + 3 * int64_t{blockIdx.x});
  if (!last_of(a.tickets + 1 + segment, members)) return;

  sums = Sums();
  if (threadIdx.x < members) sums = Sums::load(a.scratch + 3 * int64_t{begin + threadIdx.x});
  add_up_block(sums);
  double* of_segments = a.scratch + 3 * int64_t{a.count};
  if (threadIdx.x == 0) sums.store(of_segments + 3 * int64_t{segment});
  if (!last_of(a.tickets, segments)) return;

  sums = Sums();
  for (unsigned s = threadIdx.x; s < segments; s += kThreads) sums.add(Sums::load(of_segments + 3 * int64_t{s}));
  add_up_block(sums);
  if (threadIdx.x == 0) {
    Sums total;
    if (!a.first) total = Sums::load(a.out);
    total.add(sums);
    total.store(a.out);
  }
}

}  // namespace

cudaError_t ffk::load_align_kernels() {
  const void* const kernels[] = {
      reinterpret_cast<const void*>(align_kernel<Float32>), reinterpret_cast<const void*>(align_kernel<BFloat16>),
      reinterpret_cast<const void*>(align_kernel<Float16>), reinterpret_cast<const void*>(align_kernel<Float64>)};
  return load_kernels(kernels);
}

extern "C" int32_t ffk_cuda_align(const ffk_group* groups, int64_t count, const ffk_gradient* gradients,
                                  double* scratch, uint32_t* tickets, double* out, void* stream) {
  bool first = true;
  return for_groups(groups, count, FFK_FLOAT64, stream, [&](const ffk_group& group, unsigned rows, cudaStream_t on) {
    const Arguments arguments{group.rows, group.places, gradients, rows, scratch, tickets, out, first};
    if (group.dtype == FFK_FLOAT32)
      align_kernel<Float32><<<rows, kThreads, 0, on>>>(arguments);
    else if (group.dtype == FFK_BFLOAT16)
      align_kernel<BFloat16><<<rows, kThreads, 0, on>>>(arguments);
    else if (group.dtype == FFK_FLOAT16)
      align_kernel<Float16><<<rows, kThreads, 0, on>>>(arguments);
    else
      align_kernel<Float64><<<rows, kThreads, 0, on>>>(arguments);
    first = false;
  });
}
