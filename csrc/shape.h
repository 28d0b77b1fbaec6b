#pragma once

#include <cstdint>

namespace repmtl {

// Of the saliencies of all tasks.
struct Shape {
  int64_t tasks, batch, channels, positions;
};

}  // namespace repmtl
