// What every CUDA kernel and entry point does with a table: 16-bit storage widened, addresses that are known to be
// global, accesses in rounds, and one launch per group.
#ifndef FFKERNELS_GROUPS_CUDA_H
#define FFKERNELS_GROUPS_CUDA_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ffkernels.h"

namespace ffk {

constexpr int kThreads = 128;
// Elements that a block has in flight at once; a row of the Python side's chunk size is one round.
constexpr int kRound = 2048;
constexpr int kNarrowUnroll = 4;

// ---- 16-bit storage: a 32-bit word holds a pair of values, a lone one is the low half ----

struct BFloat16Words {
  static __device__ float2 widen(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  }
  static __device__ uint32_t narrow(float2 x) {
    const __nv_bfloat162_raw y = __floats2bfloat162_rn(x.x, x.y);
    return uint32_t{y.x} | uint32_t{y.y} << 16;
  }
};

struct Float16Words {
  static __device__ float2 widen(uint32_t x) {
    const __half2_raw y{static_cast<uint16_t>(x), static_cast<uint16_t>(x >> 16)};
    return __half22float2(y);
  }
  static __device__ uint32_t narrow(float2 x) {
    const __half2_raw y = __floats2half2_rn(x.x, x.y);
    return uint32_t{y.x} | uint32_t{y.y} << 16;
  }
};

// ---- one chunk ----

// An address read from memory is generic to the compiler; this tells it that it lies in global memory, so that it emits
// LDG and STG instead of LD and ST, which would look the address space up.
template <class A>
__device__ A* global(int64_t address) {
  return static_cast<A*>(__cvta_global_to_generic(static_cast<size_t>(address)));
}

// Moves `count` units of A, U per thread and round: all loads of a round are issued before its first store. W is
// read soon, by the forward pass that follows; delta and best are not, so they are marked to leave the cache first.
template <class A, int U, class Load, class Store>
__device__ void rounds(int64_t count, const Load& load, const Store& store) {
  for (int64_t start = threadIdx.x; start < count; start += kThreads * U) {
    decltype(load(int64_t{0})) loaded[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (start + u * kThreads < count) loaded[u] = load(start + u * kThreads);
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (start + u * kThreads < count) store(start + u * kThreads, loaded[u]);
  }
}

// ---- launchers ----

constexpr int64_t kMaxRows = 0x7fffffff;  // gridDim.x

// Everything is checked before the first launch. Which device is current is the caller's business: this library has a
// runtime of its own, which need not know what another one in the process has chosen.
template <class Launch>
int32_t for_groups(const ffk_group* groups, int64_t count, int64_t last_dtype, void* stream, const Launch& launch) {
  for (int64_t g = 0; g < count; ++g) {
    if (groups[g].dtype < FFK_FLOAT32 || groups[g].dtype > last_dtype) return FFK_E_DTYPE;
    if (groups[g].count > kMaxRows) return FFK_E_ROWS;
  }
  for (int64_t g = 0; g < count; ++g) {
    if (groups[g].count == 0) continue;
    launch(groups[g], static_cast<unsigned>(groups[g].count), static_cast<cudaStream_t>(stream));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return 0;
}

// Loads kernels on the current device.
template <int N>
cudaError_t load_kernels(const void* const (&kernels)[N]) {
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) {
      cudaGetLastError();  // left pending, it would be blamed on the next launch
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t load_align_kernels();

}  // namespace ffk

#endif
