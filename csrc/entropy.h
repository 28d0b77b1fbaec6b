// Stage `entropy`: TSR of the position means (eq. 5 and 6) and its gradient.
#pragma once

#include "common.h"

namespace repmtl {

struct EntropyOptions {
  bool over_tasks;  // else over the positions of a sample
  bool softmax;     // else |x| / (sum |x| + eps)
  double temperature, eps;
};

// x, grad: (T, B, N), grad may be null. Returns the mean entropy.
template <typename A>
A entropy(int64_t tasks, int64_t batch, int64_t positions, const A* x, const EntropyOptions& options,
          A* grad, const ParallelFor& parallel_for);

}  // namespace repmtl
