// Number types and arithmetic of both libraries, without PyTorch.
#pragma once

#include <cstdint>

// Marks a function that CUDA kernels call too.
#ifdef __CUDACC__
#define REPMTL_DEVICE __device__ __forceinline__
#else
#define REPMTL_DEVICE inline
#endif

namespace repmtl {

// The type of the sums, similarities and losses for saliencies of type S.
template <typename S>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename S>
using acc_t = typename Accumulation<S>::type;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename A>
struct Guarded {
  A inverse;
  bool clamped;
};

// Returns 1 / max(norm, eps scale^2), and 0 for a norm of 0. The norm is that of products of scaled
// operands. The bound is computed in double, since float holds some eps only as zero.
template <typename A>
REPMTL_DEVICE Guarded<A> guarded_inverse(A norm, A scale, double eps) {
  const A least = static_cast<A>(eps * scale * scale);  // in this order: scale^2 may overflow
  if (norm == 0) return {A(0), true};
  return norm < least ? Guarded<A>{1 / least, true} : Guarded<A>{1 / norm, false};
}

}  // namespace repmtl
