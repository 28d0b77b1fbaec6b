// Stages `gram` and `saliency_grad` for a small Gram matrix: few positions, such as 7 x 7. The
// saliencies of one task and sample then fit the second cache, and all products that read them
// follow each other there, which a library's batched product can't do.
#pragma once

#include "stage.h"

namespace repmtl {

// The largest number of positions.
constexpr int64_t kSmall = 64;

// Returns whether the functions below are compiled for this machine's vectors. If not, a library's
// products are faster.
bool small_products_are_fast();

// Writes, for S^ = scale S with S (T, B, C, N) and N <= kSmall, and anchors u (T, B, C):
// norm (T, B) of the Gram matrix S^^T S^; positive (T, B) = sum_u |S^^T u_u|^2;
// projection (T, B, T, N) = S^^T u_u; matrix (T, B, N, N). The last two may be null.
// scale (T, B); mask (B, N) or null: S is zero where the mask is.
void small_gram(const Shape& shape, const View<const float>* views, const float* scale,
                const float* anchors, const unsigned char* mask, float* norm, float* positive,
                float* projection, float* matrix, const ParallelFor& parallel_for);

// The inputs of the gradient: results of the forward pass and of the stage before, and the weights
// of CSAGradient.
struct SmallGradient {
  const float *scale, *anchor_weight, *affinity_weight;  // (T, B)
  const float *factor, *radial_weight;                   // (B)
  const float *anchors, *radial, *contrast_grad;         // (T, B, C)
  const float* projection;                               // (T, B, T, N)
  const float* matrix;                                   // (T, B, N, N)
  const float* negatives;                                // ()
  const float* position_grad;                            // (T, B, N) or null
  const unsigned char* mask;  // (B, N) or null: S and its gradient are zero where it is
};

// The largest number of tasks.
constexpr int64_t kSmallTasks = kSmall;

// Writes outputs[i] (B, C, N), the gradient of task wanted[i]: the complete stage `saliency_grad`.
void small_gradient(const Shape& shape, const View<const float>* views, const SmallGradient& g,
                    const std::vector<int64_t>& wanted, const View<float>* outputs,
                    const ParallelFor& parallel_for);

// The same two functions for a single position, whose Gram matrix is a number: products and sums of
// rows of channels.
void pooled_gram(const Shape& shape, const View<const float>* views, const float* scale,
                 const float* anchors, const unsigned char* mask, float* norm, float* positive,
                 float* projection, float* matrix, const ParallelFor& parallel_for);

void pooled_gradient(const Shape& shape, const View<const float>* views, const SmallGradient& g,
                     const std::vector<int64_t>& wanted, const View<float>* outputs,
                     const ParallelFor& parallel_for);

}  // namespace repmtl
