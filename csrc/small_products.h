// Stages `gram` and `saliency_grad` where a Gram matrix is small: few positions, such as 7 x 7. The
// saliencies of one task and sample then fit the second cache, and products that share them are
// made one after the other there, which a library's batched product can't do.
#pragma once

#include "common.h"

namespace repmtl {

// The largest number of positions.
constexpr int64_t kSmall = 64;

// Whether these are compiled for vectors that this machine has; else a library is faster.
bool small_products_are_fast();

// For S^ = scale S (T, B, C, N), N <= kSmall, anchors u (T, B, C): norm (T, B) of the Gram matrix
// S^^T S^, positive (T, B) = sum_u |S^^T u_u|^2; projection (T, B, T, N) = S^^T u_u, matrix
// (T, B, N, N), either null.
void small_gram(const Shape& shape, const View<const float>* views, const float* scale,
                const float* anchors, float* norm, float* positive, float* projection,
                float* matrix, const ParallelFor& parallel_for);

// One task's output (B, C, N) = S matrix + da 1^T + 1 dx^T + sum_k left_k right_k^T.
// matrix (B, N, N), da (B, C), dx (B, N) or null, left (K, B, C), right (B, K, N).
void small_gradient(const Shape& shape, int64_t rank, const View<const float>& view,
                    const float* matrix, const float* da, const float* dx, const float* left,
                    const float* right, const View<float>& output, const ParallelFor& parallel_for);

}  // namespace repmtl
