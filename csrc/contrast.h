// Stage `contrast`: unit anchors (eq. 8) and the negatives' half of CSA (eq. 9). The products of
// anchors are the library's; these are the parts before, between and after them.
#pragma once

#include "common.h"

namespace repmtl {

// Unit anchors of the channels' means a (T, B, C): u (T, B, C) = factor (B) * a, with Frobenius norm
// 1 of sum_t u u^T, or a norm of at least eps before. radial (T, B, C) or null: what normalisation
// takes out of a gradient.
template <typename A>
void unit_anchors(int64_t tasks, int64_t batch, int64_t channels, const A* a, double eps, A* u,
                  A* factor, A* radial, const ParallelFor& parallel_for);

// dots (T, M, T, B): products u_t,first+m . u_vk, with r_mk = sum_tv dots^2. The peaks of a set of r
// are two numbers: the largest, at least 0, and the sum of exp((r - largest) / temperature).
//
// logsumexp (M): of r_mk / temperature over k != first + m; rows (2, M): the peaks of the same.
// columns (2, B) or null: peaks over m, of the samples before, become those with these samples too.
template <typename A>
void log_sum_exp(int64_t tasks, int64_t batch, int64_t first, int64_t samples, const A* dots,
                 double temperature, A* logsumexp, A* rows, A* columns,
                 const ParallelFor& parallel_for);

// Multiplies dots (T, M, T, B) with 2 / (temperature B) (softmax_m[k] + softmax_k[m]), so that
// another product with u gives the gradient. Both are taken from r_mk, the second by the peaks of its
// column: r_km is another sum, and at low temperatures its rounding would be all that is seen.
template <typename A>
void weigh_dots(int64_t tasks, int64_t batch, int64_t first, int64_t samples, A* dots,
                const A* rows, const A* columns, double temperature,
                const ParallelFor& parallel_for);

// du (T, B, C), the gradient at u, becomes that at a: factor (du - (sum_t du . u) radial).
template <typename A>
void through_normalisation(int64_t tasks, int64_t batch, int64_t channels, const A* u,
                           const A* factor, const A* radial, A* du, const ParallelFor& parallel_for);

}  // namespace repmtl
