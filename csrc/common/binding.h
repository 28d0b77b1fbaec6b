// Checks of arguments and allocation, for the operators of both libraries.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "shape.h"

namespace repmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// Returns the type of the sums, similarities and losses for saliencies.
inline ScalarType accumulation_type(const Tensor& saliency) {
  const ScalarType type = saliency.scalar_type();
  return type == ScalarType::Double ? type : ScalarType::Float;
}

inline bool on_one_device(const Tensor& x, const Tensor& y) {
  return x.is_cuda() == y.is_cuda() && x.get_device_index() == y.get_device_index();
}

// Checks that x is contiguous, with these sizes and this type, on the device of `like`.
inline void check_contiguous(const char* name, const Tensor& x, const Sizes& sizes,
                             const Tensor& like, ScalarType type) {
  bool right = on_one_device(x, like) && x.is_contiguous() && x.scalar_type() == type &&
               x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; right && i < sizes.size(); ++i) right = x.size(i) == sizes[i];
  std::string shape;
  for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(right, name, ": expected a contiguous tensor of shape (", shape,
                  "), of the device and precision of the others");
}

// For tensors whose sizes divide, or whose elements are reduced.
inline void check_not_empty(const char* name, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) > 0, name, ": expected no size of 0, got one in dimension ", d);
  }
}

// Checks saliencies (B, C, *spatial), one for each task, and returns their sizes.
inline Shape shape_of(const Tensors& saliencies) {
  STD_TORCH_CHECK(!saliencies.empty(), "saliencies: expected at least one task");
  const Tensor& first = saliencies[0];
  for (const Tensor& s : saliencies) {
    bool right = on_one_device(s, first) && s.scalar_type() == first.scalar_type() &&
                 s.dim() == first.dim() && s.dim() >= 3 && s.dim() <= 5;
    for (int64_t d = 0; right && d < s.dim(); ++d) right = s.size(d) == first.size(d);
    STD_TORCH_CHECK(right,
                    "saliencies: expected tensors (B, C, *spatial) of one shape, with one to "
                    "three spatial dimensions, one dtype and device");
  }
  check_not_empty("saliencies", first);
  int64_t positions = 1;
  for (int64_t d = 2; d < first.dim(); ++d) positions *= first.size(d);
  return {static_cast<int64_t>(saliencies.size()), first.size(0), first.size(1), positions};
}

// Checks gradients: outputs[i] belongs to saliencies[tasks[i]].
inline void check_outputs(const Tensors& saliencies, const Tensors& outputs, const Sizes& tasks) {
  STD_TORCH_CHECK(outputs.size() == tasks.size(), "outputs: expected one for each of ",
                  tasks.size(), " tasks, got ", outputs.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    STD_TORCH_CHECK(tasks[i] >= 0 && tasks[i] < static_cast<int64_t>(saliencies.size()),
                    "tasks: expected numbers of saliencies, got ", tasks[i]);
    shape_of({saliencies[tasks[i]], outputs[i]});
  }
}

// Checks and returns a mask (B, N) of positions; null without one.
inline const unsigned char* mask_of(const std::optional<Tensor>& mask, const Shape& shape,
                                    const Tensor& like) {
  if (!mask) return nullptr;
  check_contiguous("mask", *mask, {shape.batch, shape.positions}, like, ScalarType::Bool);
  return static_cast<const unsigned char*>(mask->const_data_ptr());
}

// The sizes of products of anchors: dots (tasks, samples, tasks, batch).
struct Block {
  int64_t tasks, samples, batch;
};

// Checks dots (T, M, T, B), where row m is sample first + m of the batch.
inline Block block_of(const Tensor& dots, int64_t first, ScalarType type) {
  STD_TORCH_CHECK(dots.dim() == 4, "dots: expected (T, M, T, B), got ", dots.dim(), " dimensions");
  const Block block{dots.size(0), dots.size(1), dots.size(3)};
  check_contiguous("dots", dots, {block.tasks, block.samples, block.tasks, block.batch}, dots,
                   type);
  check_not_empty("dots", dots);
  STD_TORCH_CHECK(first >= 0 && first + block.samples <= block.batch,
                  "first: expected samples within the batch");
  return block;
}

// The positions of a tensor (B, C, *spatial) as a grid. Neighbouring dimensions that one stride
// covers are merged, and those of size 1 left out.
struct Grid {
  Sizes sizes, strides;
};

inline Grid grid_of(const Tensor& x) {
  Grid grid;
  for (int64_t d = 2; d < x.dim(); ++d) {
    if (x.size(d) == 1) continue;
    if (!grid.sizes.empty() && grid.strides.back() == x.size(d) * x.stride(d)) {
      grid.sizes.back() *= x.size(d);
      grid.strides.back() = x.stride(d);
    } else {
      grid.sizes.push_back(x.size(d));
      grid.strides.push_back(x.stride(d));
    }
  }
  return grid;
}

inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A tensor of size 0 stands for a result that nobody wants.
inline Tensor empty_if(bool wanted, const Tensor& like, const Sizes& sizes, ScalarType type) {
  return empty(like, wanted ? sizes : Sizes{0}, type);
}

}  // namespace repmtl
