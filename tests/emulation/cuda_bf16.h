// Stands in for CUDA's header of this name. The types have no operators and no implicit
// conversions: arithmetic in 16 bits would have to be rounded as CUDA does.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x);
  explicit operator float() const;

  unsigned short cuda_emulation_bits;
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 result;
  result.cuda_emulation_bits = bits;
  return result;
}

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.cuda_emulation_bits; }

inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(unsigned(x.cuda_emulation_bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  if (isnan(x)) return __ushort_as_bfloat16(0x7FFF);  // CUDA's NaN
  const unsigned bits = __float_as_uint(x);
  const unsigned even = (bits >> 16) & 1;
  return __ushort_as_bfloat16(static_cast<unsigned short>((bits + 0x7FFF + even) >> 16));
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }

inline __nv_bfloat16::__nv_bfloat16(float x) : __nv_bfloat16(__float2bfloat16(x)) {}
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return make_float2(__bfloat162float(v.x), __bfloat162float(v.y));
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
