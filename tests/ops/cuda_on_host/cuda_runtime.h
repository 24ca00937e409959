// Just enough of CUDA to run the .cu files of csrc on a CPU, one block after the other. The threads of a block take turns:
// each runs until it waits for the others or ends, so the result is what a GPU must give; and one address out of a tensor
// shows up in the same way. `kernel<<<blocks, threads, shared, stream>>>(arguments)` is rewritten to ON_HOST by the test.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

#define EXPORTED extern "C" __attribute__((weak, visibility("default")))

struct Index {
  unsigned x;
};
inline Index blockIdx, threadIdx;

// The threads of the running block, each with a stack of its own.
struct Block {
  static constexpr unsigned kMost = 128;
  static constexpr size_t kStack = 64 << 10;
  ucontext_t all, threads[kMost];
  char stacks[kMost][kStack];
  bool ended[kMost];
  std::function<void()> kernel;
};
inline Block block;

inline void run_thread() {
  block.kernel();
  block.ended[threadIdx.x] = true;
}

inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    ucontext_t& thread = block.threads[t];
    getcontext(&thread);
    thread.uc_stack.ss_sp = block.stacks[t];
    thread.uc_stack.ss_size = Block::kStack;
    thread.uc_link = &block.all;
    makecontext(&thread, run_thread, 0);
    block.ended[t] = false;
  }
  for (unsigned ended = 0; ended == 0;) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      swapcontext(&block.all, &block.threads[threadIdx.x]);
      ended += block.ended[threadIdx.x];
    }
    if (ended != 0 && ended != threads) abort();  // some wait for others that have ended: a GPU would hang, or worse
  }
}

inline void __syncthreads() { swapcontext(&block.threads[threadIdx.x], &block.all); }

// Blocks begin in any order on a GPU; here in theirs, or the last one first.
inline bool last_block_first = false;
EXPORTED void ffk_last_block_first(int32_t yes) { last_block_first = yes; }

template <class Kernel>
void on_host(unsigned blocks, unsigned threads, const Kernel& kernel) {
  if (threads > Block::kMost) abort();
  block.kernel = kernel;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = last_block_first ? blocks - 1 - b : b;
    run_block(threads);
  }
}
#define ON_HOST(blocks, threads, call) on_host(blocks, threads, [&] { call; })

inline double __shfl_down_sync(unsigned, double value, unsigned down) {
  static double of_threads[Block::kMost];
  of_threads[threadIdx.x] = value;
  __syncthreads();
  const unsigned from = threadIdx.x % 32 + down < 32 ? threadIdx.x + down : threadIdx.x;
  const double result = of_threads[from];
  __syncthreads();
  return result;
}
inline void __threadfence() {}
inline uint32_t atomicInc(uint32_t* at, uint32_t last) {
  const uint32_t before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
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
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

// A wide access to an address that is no multiple of its width is an error on a GPU. The compiler's alignment checks
// find it here, with this in the place of their runtime library.
inline int64_t misaligned_accesses = 0;
EXPORTED void __ubsan_handle_type_mismatch_v1(void*, void*) { ++misaligned_accesses; }
EXPORTED int64_t ffk_misaligned_accesses() { return misaligned_accesses; }

template <class A>
A __ldg(const A* at) {
  return *at;
}
template <class A>
A __ldcs(const A* at) {
  return *at;
}
template <class A>
A __ldcg(const A* at) {
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
inline cudaError_t pending = cudaSuccess;
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = pending;
  pending = cudaSuccess;
  return last;
}
EXPORTED int32_t ffk_pending_error() { return pending; }
EXPORTED void ffk_fail() { pending = cudaErrorNoKernelImageForDevice; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return pending; }
inline const char* cudaGetErrorString(cudaError_t) { return "none: this is a CPU"; }
