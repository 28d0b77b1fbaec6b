// Stands in for CUDA's header of this name. The types have no operators and no implicit
// conversions: arithmetic in 16 bits would have to be rounded as CUDA does.
#pragma once

#include "cuda_runtime.h"

struct __half {
  __half() = default;
  explicit __half(float x);
  explicit operator float() const;

  unsigned short cuda_emulation_bits;
};
typedef __half half;

struct alignas(4) __half2 {
  __half x, y;
};
typedef __half2 half2;

inline __half __ushort_as_half(unsigned short bits) {
  __half result;
  result.cuda_emulation_bits = bits;
  return result;
}

inline unsigned short __half_as_ushort(__half x) { return x.cuda_emulation_bits; }

inline float __half2float(__half x) {
  const unsigned bits = x.cuda_emulation_bits, sign = (bits & 0x8000) << 16;
  if ((bits & 0x7C00) == 0x7C00) return __uint_as_float(sign | 0x7F800000 | (bits & 0x3FF) << 13);
  // The exponent's bias is 15, and 127 in float: the product is exact, for subnormal numbers too.
  const float magnitude = __uint_as_float((bits & 0x7FFF) << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

inline __half __float2half(float x) {
  if (isnan(x)) return __ushort_as_half(0x7FFF);  // CUDA's NaN
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  unsigned bits;
  if (magnitude >= 65520) {  // halfway between the largest number and what would follow
    bits = 0x7C00;
  } else if (magnitude < 0x1p-14f) {
    // Added to 0.5, a multiple of 2^-24 is a multiple of the last place: the sum rounds.
    bits = __float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f);
  } else {
    const unsigned wide = __float_as_uint(magnitude);
    const unsigned even = (wide >> 13) & 1;
    bits = (wide + 0xFFF + even - (112u << 23)) >> 13;
  }
  return __ushort_as_half(static_cast<unsigned short>(sign | bits));
}

inline __half __float2half_rn(float x) { return __float2half(x); }

inline __half::__half(float x) : __half(__float2half(x)) {}
inline __half::operator float() const { return __half2float(*this); }

inline float2 __half22float2(__half2 v) {
  return make_float2(__half2float(v.x), __half2float(v.y));
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
