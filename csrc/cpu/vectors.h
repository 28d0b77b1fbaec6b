// Vectors of kLanes numbers, which may be longer than the machine's.
#pragma once

#include <cstdint>
#include <cstring>

#include "stage.h"

namespace repmtl {

constexpr int64_t kLanes = 8;

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t bits __attribute__((vector_size(kLanes * sizeof(float))));
  static constexpr int32_t kMagnitude = 0x7fffffff;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kLanes * sizeof(double))));
  typedef int64_t bits __attribute__((vector_size(kLanes * sizeof(double))));
  static constexpr int64_t kMagnitude = 0x7fffffffffffffff;
};
template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
REPMTL_INLINE Vector<A> load(const A* from) {
  Vector<A> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename V, typename A>
REPMTL_INLINE void store(const V& x, A* to) {
  static_assert(sizeof x == kLanes * sizeof(A));
  std::memcpy(to, &x, sizeof x);
}

template <typename V>
REPMTL_INLINE Vector<double> widened(const V& x) {
  return __builtin_convertvector(x, Vector<double>);
}

REPMTL_INLINE Vector<float> magnitude(const Vector<float>& x) {
  using Of = VectorOf<float>;
  return (Of::type)((Of::bits)x & Of::kMagnitude);
}

REPMTL_INLINE Vector<double> magnitude(const Vector<double>& x) {
  using Of = VectorOf<double>;
  return (Of::type)((Of::bits)x & Of::kMagnitude);
}

// Returns the larger numbers, and those of x where those of y are NaN.
template <typename V>
REPMTL_INLINE V larger(const V& x, const V& y) {
  return x < y ? y : x;
}

REPMTL_INLINE double sum_of(const Vector<double>& x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

}  // namespace repmtl
