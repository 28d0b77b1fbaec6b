// Stage `entropy`: TSR of the position means (eq. 5 and 6) and its gradient.
#pragma once

#include "stage.h"

namespace repmtl {

struct EntropyOptions {
  bool over_tasks;  // otherwise over the positions of a sample
  bool softmax;     // otherwise |x| / (sum |x| + eps)
  double temperature, eps;
};

// Returns the mean entropy of x (T, B, N), and writes its gradient to grad (T, B, N) unless null.
template <typename A>
A entropy(int64_t tasks, int64_t batch, int64_t positions, const A* x,
          const EntropyOptions& options, A* grad, const ParallelFor& parallel_for);

}  // namespace repmtl
