#pragma once
#include "cuda_runtime.h"

struct __half2_raw {
  uint16_t x, y;
};

inline float half_value(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, sizeof h);
  return static_cast<float>(h);
}
inline uint16_t half_bits(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &h, sizeof bits);
  return bits;
}
inline float2 __half22float2(__half2_raw x) { return {half_value(x.x), half_value(x.y)}; }
inline __half2_raw __floats2half2_rn(float x, float y) { return {half_bits(x), half_bits(y)}; }
