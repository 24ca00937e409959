// The weight moves of Fast Forward on a GPU: one launch per storage dtype, whatever the number of tensors.
//
//   checkpoint   best <- W                                                   reads N, writes N
//   delta        delta <- W - best ; best <- W                               reads 2N, writes 2N
//   step         base = accept ? W : best ; best <- base ; W <- base + k * delta
//                accept: reads 2N, writes 2N; not accepted: reads 2N, writes N; k == 0: reads N, writes N
//
// Arithmetic is float32 whatever the storage: the product is rounded, the sum is rounded, then once more to the storage
// dtype. __fmul_rn and __fadd_rn are never contracted to fma. k == 0 copies bits.
//
// One block moves one row of the table, that is one chunk of one tensor. Where its three addresses are multiples of 16
// it moves 16 bytes per access and the last few elements one by one; else all one by one. The branch is the same for
// all threads of a block, so aligned and misaligned tensors share a launch.
#include "ffkernels.h"
#include "groups_cuda.h"

#ifndef FFK_SOURCE_ID
#define FFK_SOURCE_ID ""
#endif

using namespace ffk;

namespace {

// ---- storage types: arithmetic on 32-bit words, which hold one float or a pair of 16-bit values ----

struct Float32 {
  using Store = uint32_t;
  static __device__ uint32_t advance(uint32_t base, uint32_t delta, float k) {
    return __float_as_uint(__fadd_rn(__uint_as_float(base), __fmul_rn(k, __uint_as_float(delta))));
  }
  static __device__ uint32_t subtract(uint32_t a, uint32_t b) {
    return __float_as_uint(__fsub_rn(__uint_as_float(a), __uint_as_float(b)));
  }
};

template <class Words>
struct Pairs {
  using Store = uint16_t;
  static __device__ uint32_t advance(uint32_t base, uint32_t delta, float k) {
    const float2 b = Words::widen(base), d = Words::widen(delta);
    return Words::narrow(make_float2(__fadd_rn(b.x, __fmul_rn(k, d.x)), __fadd_rn(b.y, __fmul_rn(k, d.y))));
  }
  static __device__ uint32_t subtract(uint32_t a, uint32_t b) {
    const float2 x = Words::widen(a), y = Words::widen(b);
    return Words::narrow(make_float2(__fsub_rn(x.x, y.x), __fsub_rn(x.y, y.y)));
  }
};

using BFloat16 = Pairs<BFloat16Words>;
using Float16 = Pairs<Float16Words>;

// The same arithmetic for every width of access; a lone 16-bit value is the low half of a word.
template <class T>
__device__ uint4 advance(uint4 b, uint4 d, float k) {
  return make_uint4(T::advance(b.x, d.x, k), T::advance(b.y, d.y, k), T::advance(b.z, d.z, k), T::advance(b.w, d.w, k));
}
template <class T>
__device__ typename T::Store advance(typename T::Store b, typename T::Store d, float k) {
  return static_cast<typename T::Store>(T::advance(b, d, k));
}

template <class T>
__device__ uint4 subtract(uint4 a, uint4 b) {
  return make_uint4(T::subtract(a.x, b.x), T::subtract(a.y, b.y), T::subtract(a.z, b.z), T::subtract(a.w, b.w));
}
template <class T>
__device__ typename T::Store subtract(typename T::Store a, typename T::Store b) {
  return static_cast<typename T::Store>(T::subtract(a, b));
}

// ---- one chunk ----

template <class A>
struct Two {
  A first, second;
};

template <class A>
struct Units {
  A *w, *delta, *best;
  int64_t count;

  template <int U>
  __device__ void checkpoint() const {
    rounds<A, U>(count, [&](int64_t i) { return w[i]; }, [&](int64_t i, A x) { __stcs(best + i, x); });
  }

  template <int U>
  __device__ void restore() const {
    rounds<A, U>(count, [&](int64_t i) { return __ldcs(best + i); }, [&](int64_t i, A x) { w[i] = x; });
  }

  template <class T, int U>
  __device__ void difference() const {
    rounds<A, U>(
        count, [&](int64_t i) { return Two<A>{w[i], __ldcs(best + i)}; },
        [&](int64_t i, const Two<A>& x) {
          __stcs(delta + i, subtract<T>(x.first, x.second));
          __stcs(best + i, x.first);
        });
  }

  template <class T, int U>
  __device__ void accepted(float k) const {
    rounds<A, U>(
        count, [&](int64_t i) { return Two<A>{w[i], __ldcs(delta + i)}; },
        [&](int64_t i, const Two<A>& x) {
          __stcs(best + i, x.first);
          w[i] = advance<T>(x.first, x.second, k);
        });
  }

  template <class T, int U>
  __device__ void refused(float k) const {
    rounds<A, U>(
        count, [&](int64_t i) { return Two<A>{__ldcs(best + i), __ldcs(delta + i)}; },
        [&](int64_t i, const Two<A>& x) { w[i] = advance<T>(x.first, x.second, k); });
  }
};

template <class A, class Store>
__device__ Units<A> units(const longlong2& w_delta, const longlong2& best_n, int64_t from) {
  constexpr int64_t kPer = sizeof(A) / sizeof(Store);
  const int64_t skip = from * static_cast<int64_t>(sizeof(Store));
  return {global<A>(w_delta.x + skip), global<A>(w_delta.y + skip), global<A>(best_n.x + skip), (best_n.y - from) / kPer};
}

// Calls `body(units, unroll)` on the wide part of this block's row and on what is left.
template <class Store, class Body>
__device__ void for_row(const ffk_row* rows, const Body& body) {
  const longlong2* row = reinterpret_cast<const longlong2*>(rows + blockIdx.x);
  const longlong2 w_delta = __ldg(row), best_n = __ldg(row + 1);
  constexpr int kWide = sizeof(uint4) / sizeof(Store);
  if (((w_delta.x | w_delta.y | best_n.x) & 15) == 0) {
    const Units<uint4> wide = units<uint4, Store>(w_delta, best_n, 0);
    body.template operator()<kRound / kWide / kThreads>(wide);
    body.template operator()<1>(units<Store, Store>(w_delta, best_n, wide.count * kWide));
  } else {
    body.template operator()<kNarrowUnroll>(units<Store, Store>(w_delta, best_n, 0));
  }
}

struct Checkpoint {
  template <int U, class A>
  __device__ void operator()(const Units<A>& chunk) const {
    chunk.template checkpoint<U>();
  }
};

template <class T>
struct Delta {
  template <int U, class A>
  __device__ void operator()(const Units<A>& chunk) const {
    chunk.template difference<T, U>();
  }
};

template <class T>
struct Step {
  bool accept;
  float k;
  template <int U, class A>
  __device__ void operator()(const Units<A>& chunk) const {
    if (k == 0.0f) {
      if (accept)
        chunk.template checkpoint<U>();
      else
        chunk.template restore<U>();
    } else if (accept) {
      chunk.template accepted<T, U>(k);
    } else {
      chunk.template refused<T, U>(k);
    }
  }
};

template <class Store>
__global__ void __launch_bounds__(kThreads) checkpoint_kernel(const ffk_row* rows) {
  for_row<Store>(rows, Checkpoint{});
}

template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(const ffk_row* rows) {
  for_row<typename T::Store>(rows, Delta<T>{});
}

// accept_at and k_at, where given, hold what an earlier kernel of the stream decided.
template <class T>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const ffk_row* rows, const int32_t* accept_at, const float* k_at, int32_t accept, float k) {
  if (accept_at != nullptr) accept = *accept_at;
  if (k_at != nullptr) k = *k_at;
  for_row<typename T::Store>(rows, Step<T>{accept != 0, k});
}

}  // namespace

extern "C" {

int32_t ffk_cuda_abi(void) { return FFK_ABI; }

const char* ffk_cuda_source_id(void) { return FFK_SOURCE_ID; }

const char* ffk_cuda_error_string(int32_t code) {
  if (code == FFK_E_DTYPE) return "a group has a dtype that is none of ffk_dtype";
  if (code == FFK_E_ROWS) return "a group has more rows than one launch can take";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int32_t ffk_cuda_prepare(void) {
  const void* const kernels[] = {
      reinterpret_cast<const void*>(checkpoint_kernel<uint32_t>), reinterpret_cast<const void*>(checkpoint_kernel<uint16_t>),
      reinterpret_cast<const void*>(delta_kernel<Float32>),       reinterpret_cast<const void*>(delta_kernel<BFloat16>),
      reinterpret_cast<const void*>(delta_kernel<Float16>),       reinterpret_cast<const void*>(step_kernel<Float32>),
      reinterpret_cast<const void*>(step_kernel<BFloat16>),       reinterpret_cast<const void*>(step_kernel<Float16>),
  };
  const cudaError_t error = load_kernels(kernels);
  return error == cudaSuccess ? load_align_kernels() : error;
}

int32_t ffk_cuda_checkpoint(const ffk_group* groups, int64_t count, void* stream) {
  return for_groups(groups, count, FFK_FLOAT16, stream, [](const ffk_group& group, unsigned rows, cudaStream_t on) {
    if (group.dtype == FFK_FLOAT32)
      checkpoint_kernel<uint32_t><<<rows, kThreads, 0, on>>>(group.rows);
    else
      checkpoint_kernel<uint16_t><<<rows, kThreads, 0, on>>>(group.rows);
  });
}

int32_t ffk_cuda_delta(const ffk_group* groups, int64_t count, void* stream) {
  return for_groups(groups, count, FFK_FLOAT16, stream, [](const ffk_group& group, unsigned rows, cudaStream_t on) {
    if (group.dtype == FFK_FLOAT32)
      delta_kernel<Float32><<<rows, kThreads, 0, on>>>(group.rows);
    else if (group.dtype == FFK_BFLOAT16)
      delta_kernel<BFloat16><<<rows, kThreads, 0, on>>>(group.rows);
    else
      delta_kernel<Float16><<<rows, kThreads, 0, on>>>(group.rows);
  });
}

int32_t ffk_cuda_step(const ffk_group* groups, int64_t count, const int32_t* accept_at, const float* k_at,
                      int32_t accept, float k, void* stream) {
  return for_groups(groups, count, FFK_FLOAT16, stream, [=](const ffk_group& group, unsigned rows, cudaStream_t on) {
    if (group.dtype == FFK_FLOAT32)
      step_kernel<Float32><<<rows, kThreads, 0, on>>>(group.rows, accept_at, k_at, accept, k);
    else if (group.dtype == FFK_BFLOAT16)
      step_kernel<BFloat16><<<rows, kThreads, 0, on>>>(group.rows, accept_at, k_at, accept, k);
    else
      step_kernel<Float16><<<rows, kThreads, 0, on>>>(group.rows, accept_at, k_at, accept, k);
  });
}

}  // extern "C"
