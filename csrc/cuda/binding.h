// Tensors as the kernels see them: streams, scratch memory, views, masks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/binding.h"
#include "kernels.h"

// PyTorch's headers declare it only where PyTorch itself is built with CUDA.
#ifndef USE_CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the name in headers of PyTorch before 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// Small pieces of scratch memory share allocations of this size. Tests give each piece its own, so
// that its bounds can be checked.
#ifndef REPMTL_ARENA
#define REPMTL_ARENA (1 << 20)
#endif

namespace repmtl::cuda {

// Scratch memory of one call. Freed tensors go back to the same stream, so the next kernels that
// get their memory run later.
class Scratch final : public Workspace {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  void* take(int64_t bytes) override {
    constexpr int64_t kAlignment = 256;
    if (bytes > left_) {
      left_ = std::max<int64_t>(bytes, REPMTL_ARENA);
      tensors_.push_back(torch::stable::new_empty(like_, {left_}, ScalarType::Byte));
      next_ = static_cast<char*>(tensors_.back().mutable_data_ptr());
    }
    char* taken = next_;
    const int64_t step = std::min(left_, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    next_ += step;
    left_ -= step;
    return taken;
  }

 private:
  Tensor like_;
  Tensors tensors_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Lives as long as one operator: makes the device of a tensor the current one, and frees the
// scratch memory at the end.
class Call {
 public:
  explicit Call(const Tensor& x)
      : guard_(x.get_device_index()),
        scratch_(x),
        context_{current_stream(x.get_device_index()), &scratch_} {}
  Call(const Call&) = delete;

  operator const Context&() const { return context_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Scratch scratch_;
  Context context_;
};

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::kDouble;
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: STD_TORCH_CHECK(false, "expected floating-point tensors of at most 64 bits");
  }
}

inline const void* data(const Tensor& x) { return x.const_data_ptr(); }
inline void* output(const Tensor& x) { return x.mutable_data_ptr(); }
// A result that is not wanted is an empty tensor.
inline void* output_or_null(const Tensor& x) { return x.numel() == 0 ? nullptr : output(x); }

// Checks vectors, which kernels read 16 bytes at a time, and copies those that do not start at a
// multiple of 16 bytes.
inline Tensor aligned(const char* name, const Tensor& x, const Sizes& sizes, const Tensor& like,
                      ScalarType type) {
  check_contiguous(name, x, sizes, like, type);
  return reinterpret_cast<std::uintptr_t>(data(x)) % 16 == 0 ? x : torch::stable::clone(x);
}

// Returns the view (B, C, N) of a tensor (B, C, *spatial).
inline View view_of(const Tensor& x, bool written = false) {
  void* memory = written ? output(x) : const_cast<void*>(data(x));
  View view{memory, x.stride(0), x.stride(1), {0, 0, 0}, {1, 1}};
  const auto [sizes, strides] = grid_of(x);
  if (sizes.size() == 1) view.stride[0] = strides[0];
  if (sizes.size() < 2) return view;
  // Right-aligned: a grid of two dimensions has the middle and the last one.
  view.stride[0] = 0;
  std::copy_backward(strides.begin(), strides.end(), view.stride + 3);
  std::copy_backward(sizes.end() - 2, sizes.end(), view.size + 2);
  return view;
}

inline std::vector<View> views_of(const Tensors& saliencies) {
  std::vector<View> views;
  for (const Tensor& s : saliencies) views.push_back(view_of(s));
  return views;
}

inline Mask counted_mask_of(const Context& on, const std::optional<Tensor>& mask,
                            const Tensor& first, const Shape& shape) {
  return counted_mask(on, type_of(first), shape.batch, shape.positions,
                      mask_of(mask, shape, first));
}

}  // namespace repmtl::cuda
