// Scales that keep squares of products in the range of the number type.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace repmtl {

// Returns 2^e such that |largest| * 2^e is in [0.5, 1), or as near as normal numbers come. Returns
// 1 for 0, and the least power where `largest` is not finite.
template <typename A>
A power_of_two(A largest) {
  if (largest == 0) return 1;
  constexpr int low = std::numeric_limits<A>::min_exponent - 1;
  constexpr int high = std::numeric_limits<A>::max_exponent - 2;
  if (!std::isfinite(largest)) return std::ldexp(A(1), low);
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(A(1), std::clamp(-exponent, low, high));
}

}  // namespace repmtl
