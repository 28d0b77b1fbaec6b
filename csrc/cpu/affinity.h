// Stage `affinity`: inner products of the tasks' saliencies, in one read.
#pragma once

#include "stage.h"

namespace repmtl {

// Reads `views`, one for each task, and writes products (B, T, T): the sums of S_bt S_bu over
// channels and positions, symmetric to the bit. mask (B, N) or null says which positions are
// present; the others count as zero.
template <typename S>
void affinity(const Shape& shape, const View<const S>* views, const unsigned char* mask,
              double* products, const ParallelFor& parallel_for);

}  // namespace repmtl
