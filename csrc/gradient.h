// Stage `saliency_grad`: what is added to the product with the Gram matrix.
#pragma once

#include "common.h"

namespace repmtl {

// output (B, C, N) = product + da 1^T + 1 dx^T + sum_k left_k right_k^T, for one task.
// product: (B, C, N), or (B, N, C) with `transposed`, or null for 0. da (B, C), dx (B, N) or null,
// left (K, B, C), right (B, K, N). Outputs whose channels lie side by side want `transposed`.
template <typename S>
void add_outer(const Shape& shape, int64_t vectors, const acc_t<S>* product, bool transposed,
               const acc_t<S>* da, const acc_t<S>* dx, const acc_t<S>* left,
               const acc_t<S>* right, const View<S>& output, const ParallelFor& parallel_for);

}  // namespace repmtl
