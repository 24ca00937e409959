// Just enough of CUDA to run step_cuda.cu on a CPU, one thread of one block after the other. Its kernels have no
// communication between threads, so the result is what a GPU must give; and one address out of a tensor shows up
// in the same way. `kernel<<<blocks, threads, shared, stream>>>(arguments)` is rewritten to ON_HOST by the test.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx;

template <class Kernel>
void on_host(unsigned blocks, unsigned threads, const Kernel& kernel) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
}
#define ON_HOST(blocks, threads, call) on_host(blocks, threads, [&] { call; })

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

// A wide access to an address that is no multiple of its width is an error on a GPU. The compiler's alignment checks
// find it here, with this in the place of their runtime library.
static int64_t misaligned_accesses = 0;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { ++misaligned_accesses; }
extern "C" __attribute__((visibility("default"))) int64_t ffk_misaligned_accesses() { return misaligned_accesses; }

template <class A>
A __ldg(const A* at) {
  return *at;
}
template <class A>
A __ldcs(const A* at) {
  return *at;
}
template <class A>
void __stcs(A* at, A value) {
  *at = value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
// As on a GPU, an error that nobody asks for stays pending. The test can leave one there, as a launch would.
static cudaError_t pending = cudaSuccess;
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = pending;
  pending = cudaSuccess;
  return last;
}
extern "C" __attribute__((visibility("default"))) int32_t ffk_pending_error() { return pending; }
extern "C" __attribute__((visibility("default"))) void ffk_fail() { pending = cudaErrorNoKernelImageForDevice; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return pending; }
inline const char* cudaGetErrorString(cudaError_t) { return "none: this is a CPU"; }
