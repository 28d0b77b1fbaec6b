// Scales that keep squares of products in range, and the norms of what was scaled.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace repmtl {

// 2^e with |largest| * 2^e in [0.5, 1), or as near as normal numbers come; 1 for 0. What is not
// finite gives the least.
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

template <typename A>
struct Guarded {
  A inverse;
  bool clamped;
};

// 1 / max(norm, eps scale^2), 0 for a norm of 0; norm is that of products of scaled operands. In
// double, which has numbers for the eps that float holds only as zero.
template <typename A>
Guarded<A> guarded_inverse(A norm, A scale, double eps) {
  const A least = static_cast<A>(eps * scale * scale);  // in this order: scale^2 may overflow
  if (norm == 0) return {A(0), true};
  return norm < least ? Guarded<A>{1 / least, true} : Guarded<A>{1 / norm, false};
}

}  // namespace repmtl
