// Stage `saliency_grad`: the terms that are added to the product with the Gram matrix.
#pragma once

#include "stage.h"

namespace repmtl {

// Writes, for one task, output (B, C, N) = product + da 1^T + 1 dx^T + sum_k left_k right_k^T.
// product: (B, C, N), or (B, N, C) if `transposed`, or null for 0. da (B, C), dx (B, N) or null,
// left (K, B, C), right (B, K, N). `transposed` suits outputs whose channels lie side by side.
template <typename S>
void add_outer(const Shape& shape, int64_t vectors, const acc_t<S>* product, bool transposed,
               const acc_t<S>* da, const acc_t<S>* dx, const acc_t<S>* left, const acc_t<S>* right,
               const View<S>& output, const ParallelFor& parallel_for);

}  // namespace repmtl
