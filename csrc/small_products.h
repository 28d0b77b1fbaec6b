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
// (T, B, N, N), either null. mask (B, N) or null: S is zero where it is.
void small_gram(const Shape& shape, const View<const float>* views, const float* scale,
                const float* anchors, const unsigned char* mask, float* norm, float* positive, float* projection,
                float* matrix, const ParallelFor& parallel_for);

// What the gradient needs of the forward pass, of the stage before and of CSAGradient.
struct SmallGradient {
  const float *scale, *anchor_weight, *affinity_weight;            // (T, B)
  const float *factor, *radial_weight;                   // (B)
  const float *anchors, *radial, *contrast_grad;  // (T, B, C)
  const float* projection;                     // (T, B, T, N)
  const float* matrix;                         // (T, B, N, N)
  const float* negatives;                      // ()
  const float* position_grad;                  // (T, B, N) or null
  const unsigned char* mask;                   // (B, N) or null: S and its gradient are zero where it is
};

// The most tasks of it.
constexpr int64_t kSmallTasks = kSmall;

// The whole stage `saliency_grad`: outputs[i] (B, C, N) is that of task wanted[i].
void small_gradient(const Shape& shape, const View<const float>* views, const SmallGradient& g,
                    const std::vector<int64_t>& wanted, const View<float>* outputs,
                    const ParallelFor& parallel_for);

}  // namespace repmtl
