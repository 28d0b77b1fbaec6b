// Stage `contrast`: unit anchors (eq. 8) and the negatives' half of CSA (eq. 9). PyTorch computes
// the products of anchors; these functions are what comes before, between and after the products.
#pragma once

#include "stage.h"

namespace repmtl {

// Makes unit anchors u = factor * a from the means over positions a. The Frobenius norm of
// sum_t u u^T is 1, unless the norm for `a` is below eps. `radial` is the part that normalisation
// takes out of a gradient.
// a, u (T, B, C); factor (B); radial (T, B, C) or null.
template <typename A>
void unit_anchors(int64_t tasks, int64_t batch, int64_t channels, const A* a, double eps, A* u,
                  A* factor, A* radial, const ParallelFor& parallel_for);

// Similarities are r_mk = sum_tv dots^2, where dots (T, M, T, B) holds the products of anchors
// u_t,first+m . u_vk. The peaks of a set of similarities are two numbers: the largest, at least 0,
// and the sum of exp((r - largest) / temperature).
//
// Writes logsumexp (M) of r_mk / temperature over k != first + m, and rows (2, M), the peaks of the
// same sets. columns (2, B) or null holds the peaks over the samples of earlier blocks; this block
// is added to them.
template <typename A>
void log_sum_exp(int64_t tasks, int64_t batch, int64_t first, int64_t samples, const A* dots,
                 double temperature, A* logsumexp, A* rows, A* columns,
                 const ParallelFor& parallel_for);

// Multiplies dots (T, M, T, B) with 2 / (temperature B) (softmax_m[k] + softmax_k[m]), so that
// another product with u gives the gradient. Both softmaxes are computed from r_mk, the second with
// the peaks of its column: r_km is another sum, and at low temperatures the difference in rounding
// would dominate.
// rows (2, M) and columns (2, B) are the peaks of `log_sum_exp`.
template <typename A>
void weigh_dots(int64_t tasks, int64_t batch, int64_t first, int64_t samples, A* dots,
                const A* rows, const A* columns, double temperature,
                const ParallelFor& parallel_for);

// Turns du (T, B, C), the gradient at u, into the gradient at a: factor (du - (sum_t du . u)
// radial). u, radial (T, B, C); factor (B).
template <typename A>
void through_normalisation(int64_t tasks, int64_t batch, int64_t channels, const A* u,
                           const A* factor, const A* radial, A* du,
                           const ParallelFor& parallel_for);

}  // namespace repmtl
