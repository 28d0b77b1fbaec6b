#include "rows.h"

#include "vectors.h"

namespace repmtl {
namespace {

template <typename S>
REPMTL_INLINE void widen_body(const S* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename A>
REPMTL_INLINE void keep_body(const unsigned char* __restrict mask, int64_t count,
                             A* __restrict row) {
  for (int64_t i = 0; i < count; ++i) row[i] = mask[i] ? row[i] : A(0);
}

template <typename A>
REPMTL_INLINE void copy_body(const A* __restrict from, const unsigned char* __restrict mask,
                             int64_t count, A* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    const A x = from[i];  // whatever the mask says: a loop with branches has no vectors
    to[i] = mask[i] ? x : A(0);
  }
}

template <typename A>
REPMTL_INLINE A dot_body(const A* x, const A* y, int64_t count) {
  constexpr int kSums = 4;
  Vector<A> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) {
      sums[k] += load(x + i + k * kLanes) * load(y + i + k * kLanes);
    }
  }
  double sum = sum_of(widened((sums[0] + sums[1]) + (sums[2] + sums[3])));
  for (; i < count; ++i) sum += x[i] * y[i];
  return static_cast<A>(sum);
}

template <typename A>
REPMTL_INLINE void add_body(const A* __restrict row, A weight, int64_t count, A* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += weight * row[i];
}

}  // namespace

REPMTL_CLONES void widen_row(const bfloat16* from, int64_t count, float* to) {
  widen_body(from, count, to);
}

REPMTL_CLONES void widen_row(const float16* from, int64_t count, float* to) {
  widen_body(from, count, to);
}

REPMTL_CLONES void keep(const unsigned char* mask, int64_t count, float* row) {
  keep_body(mask, count, row);
}

REPMTL_CLONES void keep(const unsigned char* mask, int64_t count, double* row) {
  keep_body(mask, count, row);
}

REPMTL_CLONES void copy_present(const float* from, const unsigned char* mask, int64_t count,
                                float* to) {
  copy_body(from, mask, count, to);
}

REPMTL_CLONES void copy_present(const double* from, const unsigned char* mask, int64_t count,
                                double* to) {
  copy_body(from, mask, count, to);
}

REPMTL_CLONES float dot(const float* x, const float* y, int64_t count) {
  return dot_body(x, y, count);
}

REPMTL_CLONES double dot(const double* x, const double* y, int64_t count) {
  return dot_body(x, y, count);
}

REPMTL_CLONES void add_row(const float* row, float weight, int64_t count, float* to) {
  add_body(row, weight, count, to);
}

REPMTL_CLONES void add_row(const double* row, double weight, int64_t count, double* to) {
  add_body(row, weight, count, to);
}

}  // namespace repmtl
