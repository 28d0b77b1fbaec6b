// Stage `statistics`: means over channels and over positions and a scale, in one read.
#pragma once

#include "common.h"

namespace repmtl {

// positions: (T, B, N) or null; channels: (T, B, C) or null; scale: (T, B) or null, the power of two
// that brings max |S_bt| into [0.5, 1), as far as there is one; 1 for 0. `views`: T of them. `mask`:
// (B, N) or null, which positions are there; those that are not count as zero, and not in a mean.
template <typename S>
void statistics(const Shape& shape, const View<const S>* views, acc_t<S>* positions, acc_t<S>* channels,
                acc_t<S>* scale, const unsigned char* mask, const ParallelFor& parallel_for);

}  // namespace repmtl
