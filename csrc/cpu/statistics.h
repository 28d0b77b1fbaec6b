// Stage `statistics`: means over channels, means over positions and a scale, in one read.
#pragma once

#include "stage.h"

namespace repmtl {

// Reads `views`, one for each task, and writes
// positions (T, B, N) or null: the means over channels;
// channels (T, B, C) or null: the means over positions;
// scale (T, B) or null: the power of two that brings max |S_bt| into [0.5, 1), as far as there is
// one, and 1 for 0.
// mask (B, N) or null says which positions are present. The others count as zero, and not in a
// mean.
template <typename S>
void statistics(const Shape& shape, const View<const S>* views, acc_t<S>* positions,
                acc_t<S>* channels, acc_t<S>* scale, const unsigned char* mask,
                const ParallelFor& parallel_for);

}  // namespace repmtl
