#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat162_raw {
  uint16_t x, y;
};

inline uint16_t bfloat16_bits(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline __nv_bfloat162_raw __floats2bfloat162_rn(float x, float y) { return {bfloat16_bits(x), bfloat16_bits(y)}; }
