#include "gradient.h"

#include <algorithm>
#include <type_traits>

namespace repmtl {
namespace {

// Elements of a row at a time: they fit the first cache with all that is added to them.
constexpr int64_t kBlock = 512;

// The terms of one row: constant + vector + sum_k weights[k * weight_stride] * rows_k, where rows_k
// starts at rows + k * row_stride.
template <typename A>
struct Terms {
  A constant;
  const A* vector;  // or null
  const A *weights, *rows;
  int64_t weight_stride, row_stride, vectors;
};

// row (count) = (kAdd ? row : 0) + constant + the kTerms outer products from k on, in one loop.
template <int kTerms, bool kAdd, typename A>
REPMTL_INLINE void add_terms(const Terms<A>& terms, int64_t k, A constant, int64_t begin,
                             int64_t count, A* __restrict row) {
  A weights[kTerms + 1];
  const A* rows[kTerms + 1];
  for (int j = 0; j < kTerms; ++j) {
    weights[j] = terms.weights[(k + j) * terms.weight_stride];
    rows[j] = terms.rows + (k + j) * terms.row_stride + begin;
  }
  for (int64_t i = 0; i < count; ++i) {
    A value = kAdd ? row[i] + constant : constant;
    for (int j = 0; j < kTerms; ++j) value += weights[j] * rows[j][i];
    row[i] = value;
  }
}

// row (count) = product (count) or null + terms, from element `begin` of the terms on.
template <typename A>
REPMTL_INLINE void add_body(const A* __restrict product, const Terms<A>& terms, int64_t begin,
                            int64_t count, A* __restrict row) {
  int64_t k = std::min<int64_t>(terms.vectors, 4);
  switch (k) {
    case 0: add_terms<0, false>(terms, 0, terms.constant, begin, count, row); break;
    case 1: add_terms<1, false>(terms, 0, terms.constant, begin, count, row); break;
    case 2: add_terms<2, false>(terms, 0, terms.constant, begin, count, row); break;
    case 3: add_terms<3, false>(terms, 0, terms.constant, begin, count, row); break;
    default: add_terms<4, false>(terms, 0, terms.constant, begin, count, row);
  }
  for (; k < terms.vectors; ++k) add_terms<1, true>(terms, k, A(0), begin, count, row);
  if (const A* vector = terms.vector) {
    for (int64_t i = 0; i < count; ++i) row[i] += vector[begin + i];
  }
  if (product) {
    for (int64_t i = 0; i < count; ++i) row[i] += product[i];
  }
}

REPMTL_CLONES void add(const float* product, const Terms<float>& terms, int64_t begin,
                       int64_t count, float* row) {
  add_body(product, terms, begin, count, row);
}

REPMTL_CLONES void add(const double* product, const Terms<double>& terms, int64_t begin,
                       int64_t count, double* row) {
  add_body(product, terms, begin, count, row);
}

}  // namespace

template <typename S>
void add_outer(const Shape& shape, int64_t vectors, const acc_t<S>* product, bool transposed,
               const acc_t<S>* da, const acc_t<S>* dx, const acc_t<S>* left, const acc_t<S>* right,
               const View<S>& output, const ParallelFor& parallel_for) {
  using A = acc_t<S>;
  const int64_t batch = shape.batch, C = shape.channels, N = shape.positions;
  transposed = transposed || N == 1;  // the same memory, and longer rows
  const int64_t count = transposed ? N : C, length = transposed ? C : N;
  const bool direct = std::is_same_v<S, A> &&
                      (transposed ? output.channel_stride == 1 : output.positions_are_adjacent());
  parallel_for(batch * count, grain_of(length), [&](int64_t begin, int64_t end) {
    A buffer[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / count, r = i % count;
      Terms<A> terms;
      terms.vectors = vectors;
      if (transposed) {
        terms.constant = dx ? dx[i] : A(0);
        terms.vector = da + b * C;
        terms.weights = right + b * vectors * N + r;
        terms.weight_stride = N;
        terms.rows = left + b * C;
        terms.row_stride = batch * C;
      } else {
        terms.constant = da[i];
        terms.vector = dx ? dx + b * N : nullptr;
        terms.weights = left + b * C + r;
        terms.weight_stride = batch * C;
        terms.rows = right + b * vectors * N;
        terms.row_stride = N;
      }
      for (int64_t j = 0; j < length; j += kBlock) {
        const int64_t block = std::min(kBlock, length - j);
        A* row = buffer;
        if constexpr (std::is_same_v<S, A>) {
          if (direct) row = transposed ? output.at(b, j, r) : output.at(b, r, j);
        }
        add(product ? product + i * length + j : nullptr, terms, j, block, row);
        if (direct) continue;
        for (int64_t k = 0; k < block; ++k) {
          *(transposed ? output.at(b, j + k, r) : output.at(b, r, j + k)) = static_cast<S>(row[k]);
        }
      }
    }
  });
}

#define INSTANTIATE(S)                                                                       \
  template void add_outer(const Shape&, int64_t, const acc_t<S>*, bool, const acc_t<S>*,     \
                          const acc_t<S>*, const acc_t<S>*, const acc_t<S>*, const View<S>&, \
                          const ParallelFor&);
REPMTL_FOR_SALIENCY_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace repmtl
