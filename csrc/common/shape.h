#pragma once

#include <cstdint>

namespace repmtl {

// The sizes of the saliencies of all tasks: `tasks` tensors (batch, channels, positions).
struct Shape {
  int64_t tasks, batch, channels, positions;
};

}  // namespace repmtl
