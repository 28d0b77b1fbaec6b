// exp and log without branches or calls, which compilers turn into vector code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "stage.h"

namespace repmtl {

REPMTL_INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

REPMTL_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ln 2 as a number of few digits, whose multiples are exact, and the rest.
constexpr float kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;

// Returns exp(x) within 1.5 units of the last digit. The polynomials here are those of Cephes.
REPMTL_INLINE float exp_of(float x) {
  // Beyond these bounds the result is 0 or infinity. NaN passes the comparisons.
  float bounded = x < -104.0f ? -104.0f : x;
  bounded = bounded > 89.0f ? 89.0f : bounded;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = bounded * 1.44269504f + kShift;
  const float k = shifted - kShift;
  const float r = bounded - k * kLn2 - k * kLn2Rest;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  // 2^k in two factors: one alone would lose results below the normal numbers.
  const int32_t n = bits_of(shifted) - bits_of(kShift), half = n >> 1;
  return y * float_of(static_cast<uint32_t>(half + 127) << 23) *
         float_of(static_cast<uint32_t>(n - half + 127) << 23);
}

// Returns log(x) for x >= 0 within 1.5 units of the last digit.
REPMTL_INLINE float log_of(float x) {
  const bool subnormal = x < std::numeric_limits<float>::min();
  const float factor = subnormal ? 8388608.0f : 1.0f;
  const int32_t bits = bits_of(x * factor);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // of a mantissa from sqrt(1/2) to sqrt(2)
  const float exponent = static_cast<float>(e) - (subnormal ? 23.0f : 0.0f);
  const float f = float_of(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  const float rest = p * f * square + exponent * kLn2Rest - 0.5f * square;
  const float log = f + rest + exponent * kLn2;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return x == 0 ? -kInfinity : x < kInfinity ? log : x;  // NaN is not below infinity
}

REPMTL_INLINE double exp_of(double x) { return std::exp(x); }
REPMTL_INLINE double log_of(double x) { return std::log(x); }

}  // namespace repmtl
