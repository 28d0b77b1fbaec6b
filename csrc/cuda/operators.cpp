// The CUDA kernels as operators of PyTorch, in its stable ABI: checks, views, allocation, and the
// stages in order. Large matrix products are PyTorch's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../binding.h"
#include "kernels.h"

// The tests register the kernels for the CPU, where headers of theirs emulate CUDA.
#ifndef REPMTL_DISPATCH_KEY
#define REPMTL_DISPATCH_KEY CUDA
#endif

// Declared by PyTorch's headers only where its own CUDA build is made.
#ifndef USE_CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the name in headers of PyTorch before 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace repmtl::cuda {
namespace {

// Rows of a block of the Gram matrix: what is right of its diagonal is computed for nothing, and
// smaller products run slower.
constexpr int64_t kGramBlock = 640;
// Products of anchors in memory at a time.
constexpr int64_t kContrastBlock = 1 << 22;

// Tensors are freed for the same stream: the next kernels to use their memory run later.
class Scratch final : public Workspace {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  void* take(int64_t bytes) override {
    constexpr int64_t kAlignment = 256, kArena = 1 << 20;  // one allocation for many small ones
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > left_) {
      left_ = std::max(bytes, kArena);
      tensors_.push_back(torch::stable::new_empty(like_, {left_}, ScalarType::Byte));
      next_ = static_cast<char*>(tensors_.back().mutable_data_ptr());
    }
    char* found = next_;
    next_ += bytes;
    left_ -= bytes;
    return found;
  }

 private:
  Tensor like_;
  Tensors tensors_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Makes the device of a tensor the current one, for one operator.
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

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::kDouble;
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: STD_TORCH_CHECK(false, "expected floating-point tensors of at most 64 bits");
  }
}

const void* data(const Tensor& x) { return x.const_data_ptr(); }
void* output(const Tensor& x) { return x.mutable_data_ptr(); }
// An output that was not asked for is an empty tensor.
void* output_or_null(const Tensor& x) { return x.numel() == 0 ? nullptr : output(x); }

// Vectors are read 16 bytes at a time: what does not start at a multiple of that is copied.
Tensor vectors(const char* name, const Tensor& x, const Sizes& sizes, const Tensor& like,
               ScalarType type) {
  check_contiguous(name, x, sizes, like, type);
  return reinterpret_cast<std::uintptr_t>(data(x)) % 16 == 0 ? x : torch::stable::clone(x);
}

View view_of(const Tensor& x, bool written = false) {
  View view{written ? output(x) : const_cast<void*>(data(x)), x.stride(0), x.stride(1), {0, 0, 0},
            {1, 1}};
  const auto [sizes, strides] = grid_of(x);
  if (sizes.size() == 1) view.stride[0] = strides[0];
  if (sizes.size() < 2) return view;
  // Right-aligned: of two dimensions the first is the middle one.
  view.stride[0] = 0;
  std::copy_backward(strides.begin(), strides.end(), view.stride + 3);
  std::copy_backward(sizes.end() - 2, sizes.end(), view.size + 2);
  return view;
}

std::vector<View> views_of(const Tensors& saliencies) {
  std::vector<View> views;
  for (const Tensor& s : saliencies) views.push_back(view_of(s));
  return views;
}

// An operator of PyTorch that gives one tensor.
template <typename... X>
Tensor call(const char* name, const char* overload, const X&... arguments) {
  std::array<StableIValue, sizeof...(X)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Batched products (B, M, K) (B, K, N), not rounded to 16 bits.
Tensor batched_product(const Tensor& a, const Tensor& b) {
  const ScalarType type = accumulation_type(a);
  if (a.scalar_type() == type) return call("aten::bmm", "", a, b);
  return call("aten::bmm", "dtype", a, b, type);
}

Tensor mT(const Tensor& x) { return torch::stable::transpose(x, -2, -1); }

// The power of two on the stored Gram matrix, whose elements are at most 4 depth without. float16:
// at most 2^15, as far from the smallest numbers as possible; else at most 8, so that products with
// unscaled saliencies stay in range.
double storage_factor(const Tensor& saliency, int64_t depth) {
  if (saliency.scalar_type() == ScalarType::Half) {
    return std::exp2(-std::max(0.0, std::ceil(std::log2(depth)) - 13));
  }
  return std::exp2(-std::floor(std::log2(depth)));
}

bool is_n_side(const Shape& shape) { return shape.positions <= shape.channels; }

bool is_small(const Shape& shape) {
  return is_n_side(shape) && shape.positions <= kSmallPositions && shape.tasks <= kSmallTasks;
}

Mask counted_mask_of(const Context& on, const std::optional<Tensor>& mask, const Tensor& first,
                     const Shape& shape) {
  return counted_mask(on, type_of(first), shape.batch, shape.positions,
                      mask_of(mask, shape, first));
}

struct Statistics {
  Tensor positions, channels, scale;
};

Statistics run_statistics(const Context& on, const Tensors& saliencies, const Shape& shape,
                          const Mask& mask, bool with_positions, bool with_channels) {
  const Tensor& first = saliencies[0];
  const ScalarType type = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch;
  Statistics found{empty_if(with_positions, first, {T, B, shape.positions}, type),
                   empty_if(with_channels, first, {T, B, shape.channels}, type),
                   empty_if(with_channels, first, {T, B}, type)};
  statistics(on, type_of(first), shape, views_of(saliencies).data(), mask,
             output_or_null(found.positions), output_or_null(found.channels),
             output_or_null(found.scale));
  return found;
}

std::tuple<Tensor, Tensor, Tensor> statistics_op(Tensors saliencies, bool with_positions,
                                                 bool with_channels,
                                                 std::optional<Tensor> mask) {
  STD_TORCH_CHECK(with_positions || with_channels, "expected positions, channels or both");
  const Shape shape = shape_of(saliencies);
  const Call on(saliencies[0]);
  const Mask counted = counted_mask_of(on, mask, saliencies[0], shape);
  Statistics found = run_statistics(on, saliencies, shape, counted, with_positions, with_channels);
  return {found.positions, found.channels, found.scale};
}

struct Entropy {
  Tensor value, grad;
};

Entropy run_entropy(const Context& on, const Tensor& x, const Mask& mask,
                    const EntropyOptions& options, bool with_grad) {
  const ScalarType type = x.scalar_type();
  Entropy found{empty(x, {}, type),
                empty_if(with_grad, x, {x.size(0), x.size(1), x.size(2)}, type)};
  entropy(on, type_of(x), x.size(0), x.size(1), x.size(2), data(x), mask, options,
          output(found.value), output_or_null(found.grad));
  return found;
}

// (T, B, C) or the like, of accumulators.
void check_three(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected 3 dimensions, got ", x.dim());
  check_contiguous(name, x, {x.size(0), x.size(1), x.size(2)}, x, accumulation_type(x));
  check_not_empty(name, x);
}

std::tuple<Tensor, Tensor> entropy_op(Tensor x, bool over_tasks, bool softmax, double temperature,
                                      double eps, bool with_grad) {
  check_three("x", x);
  const Call on(x);
  Entropy found = run_entropy(on, x, {}, {over_tasks, softmax, temperature, 0, eps}, with_grad);
  return {found.value, found.grad};
}

struct Anchors {
  Tensor unit, factor, radial;
};

Anchors run_unit_anchors(const Context& on, const Tensor& a, double eps, bool with_grad) {
  const int64_t T = a.size(0), B = a.size(1), C = a.size(2);
  const ScalarType type = a.scalar_type();
  Anchors found{empty(a, {T, B, C}, type), empty(a, {B}, type),
                empty_if(with_grad, a, {T, B, C}, type)};
  unit_anchors(on, type_of(a), T, B, C, data(a), eps, output(found.unit), output(found.factor),
               output_or_null(found.radial));
  return found;
}

std::tuple<Tensor, Tensor, Tensor> unit_anchors_op(Tensor a, double eps, bool with_grad) {
  check_three("a", a);
  const Call on(a);
  Anchors found = run_unit_anchors(on, a, eps, with_grad);
  return {found.unit, found.factor, found.radial};
}

struct Block {
  int64_t tasks, samples, batch;
};

Block block_of(const Tensor& dots, int64_t first) {
  STD_TORCH_CHECK(dots.dim() == 4, "dots: expected (T, M, T, B), got ", dots.dim(), " dimensions");
  const Block block{dots.size(0), dots.size(1), dots.size(3)};
  check_contiguous("dots", dots, {block.tasks, block.samples, block.tasks, block.batch}, dots,
                   accumulation_type(dots));
  check_not_empty("dots", dots);
  STD_TORCH_CHECK(first >= 0 && first + block.samples <= block.batch,
                  "first: expected samples within the batch");
  return block;
}

// logsumexp (M), rows (2, M)
std::tuple<Tensor, Tensor> log_sum_exp_op(Tensor dots, int64_t first, double temperature,
                                          std::optional<Tensor> columns) {
  const Block block = block_of(dots, first);
  if (columns) check_contiguous("columns", *columns, {2, block.batch}, dots, dots.scalar_type());
  const Call on(dots);
  Tensor found = empty(dots, {block.samples}, dots.scalar_type());
  Tensor rows = empty(dots, {2, block.samples}, dots.scalar_type());
  log_sum_exp(on, type_of(dots), block.tasks, block.batch, first, block.samples, data(dots),
              temperature, output(found), output(rows), columns ? output(*columns) : nullptr);
  return {found, rows};
}

void weigh_dots_op(Tensor dots, Tensor rows, Tensor columns, int64_t first, double temperature) {
  const Block block = block_of(dots, first);
  check_contiguous("rows", rows, {2, block.samples}, dots, dots.scalar_type());
  check_contiguous("columns", columns, {2, block.batch}, dots, dots.scalar_type());
  const Call on(dots);
  weigh_dots(on, type_of(dots), block.tasks, block.batch, first, block.samples, output(dots),
             data(rows), data(columns), temperature);
}

void through_normalisation_op(Tensor du, Tensor u, Tensor factor, Tensor radial) {
  check_three("du", du);
  const int64_t T = du.size(0), B = du.size(1), C = du.size(2);
  check_contiguous("u", u, {T, B, C}, du, du.scalar_type());
  check_contiguous("factor", factor, {B}, du, du.scalar_type());
  check_contiguous("radial", radial, {T, B, C}, du, du.scalar_type());
  const Call on(du);
  through_normalisation(on, type_of(du), T, B, C, data(u), data(factor), data(radial), output(du));
}

struct Contrast {
  Tensor logsumexp, grad;
};

// Among the samples at hand.
Contrast run_contrast(const Context& on, const Anchors& anchors, double temperature,
                      bool with_grad) {
  const Tensor& u = anchors.unit;
  const int64_t T = u.size(0), B = u.size(1), C = u.size(2);
  const Type type = type_of(u);
  const Tensor rows = torch::stable::view(u, {T * B, C});
  const int64_t step = std::min(B, std::max<int64_t>(1, kContrastBlock / (T * T * B)));
  const auto samples = [&](int64_t b) { return std::min(step, B - b); };
  const auto dots_of = [&](int64_t b) {
    Tensor block = u;
    if (step < B) block = torch::stable::contiguous(torch::stable::narrow(block, 1, b, samples(b)));
    const Tensor flat = torch::stable::view(block, {T * samples(b), C});
    return call("aten::mm", "", flat, mT(rows));
  };
  Contrast found{empty(u, {B}, u.scalar_type()), u};
  Tensor dots = u, columns = u;
  if (with_grad) columns = torch::stable::new_zeros(u, {2, B});
  Tensors peaks;
  for (int64_t b = 0; b < B; b += step) {
    dots = dots_of(b);
    peaks.push_back(empty(u, {2, samples(b)}, u.scalar_type()));
    Tensor part = torch::stable::narrow(found.logsumexp, 0, b, samples(b));
    log_sum_exp(on, type, T, B, b, samples(b), data(dots), temperature, output(part),
                output(peaks.back()), with_grad ? output(columns) : nullptr);
  }
  if (!with_grad) {
    found.grad = empty(u, {0}, u.scalar_type());
    return found;
  }
  for (int64_t b = 0; b < B; b += step) {
    if (step < B) dots = dots_of(b);  // else those of above are still there
    weigh_dots(on, type, T, B, b, samples(b), output(dots), data(peaks[b / step]),
               data(columns), temperature);
    const Tensor du = call("aten::mm", "", dots, rows);
    if (step == B) {
      found.grad = torch::stable::view(du, {T, B, C});
    } else {
      if (b == 0) found.grad = empty(u, {T, B, C}, u.scalar_type());
      Tensor part = torch::stable::narrow(found.grad, 1, b, samples(b));
      torch::stable::copy_(part, torch::stable::view(du, {T, samples(b), C}));
    }
  }
  through_normalisation(on, type, T, B, C, data(u), data(anchors.factor), data(anchors.radial),
                        output(found.grad));
  return found;
}

struct Gram {
  Tensor similarity, inverse, slope, projection, matrix;
};

// Dense saliencies of one task: (B, R, K), whose Gram matrix is (B, R, R).
Tensor gram_rows(const Tensor& dense, const Shape& shape, bool channels_first) {
  return is_n_side(shape) == channels_first ? mT(dense) : dense;
}

void large_gram(const Context& on, const Tensors& saliencies, const Shape& shape,
                const Mask& mask, const Tensor& scale, const Tensor& u, double eps, double multiple,
                const Similarities& out, Gram& found, bool with_grad) {
  const Tensor& first = saliencies[0];
  const Type type = type_of(first);
  const ScalarType sums = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  const int64_t R = std::min(C, N);
  const std::vector<View> views = views_of(saliencies);

  const Tensor w = empty(first, {T, B, T, N}, sums);
  const Vectors anchors{data(u), T, 0, C, B * C};
  products(on, type, shape, views.data(), mask, true, anchors, data(scale), output(w));
  if (is_n_side(shape)) {
    if (with_grad) found.projection = w;
  } else if (with_grad) {
    const Vectors back{data(w), T, B * T * N, T * N, N};
    products(on, type, shape, views.data(), mask, false, back, data(scale),
             output(found.projection));
  }

  const int64_t blocks = (R + kGramBlock - 1) / kGramBlock;
  const int64_t step = ((R + blocks - 1) / blocks + kGramTile - 1) / kGramTile * kGramTile;
  int64_t parts = 0;
  for (int64_t i = 0; i < R; i += step) {
    parts += gram_parts(std::min(step, R - i), std::min(i + step, R));
  }
  const Tensor squares = empty(first, {T, B, parts}, sums);
  for (int64_t t = 0; t < T; ++t) {
    const bool channels_first = !channels_are_adjacent(views[t], shape);
    const Tensor dense =
        empty(first, channels_first ? Sizes{B, C, N} : Sizes{B, N, C}, first.scalar_type());
    const Tensor scale_of_task = torch::stable::select(scale, 0, t);
    scaled_copy(on, type, shape, views[t], mask, data(scale_of_task), output(dense));
    const Tensor rows = gram_rows(dense, shape, channels_first);
    const Tensor squares_of_task = torch::stable::select(squares, 0, t);
    void* matrix = nullptr;
    if (with_grad) matrix = output(torch::stable::select(found.matrix, 0, t));
    int64_t part = 0;
    for (int64_t i = 0; i < R; i += step) {
      const int64_t j = std::min(i + step, R);
      Tensor some = rows, before = rows;
      some = torch::stable::narrow(some, 1, i, j - i);
      before = torch::stable::narrow(before, 1, 0, j);
      const Tensor block = batched_product(some, mT(before));
      gram_block(on, type, B, R, i, j - i, data(block), multiple, matrix, output(squares_of_task),
                 part, parts);
      part += gram_parts(j - i, j);
    }
  }
  gram_finish(on, type, T, B, data(squares), parts, data(w), T * N, data(scale), eps, out);
}

Gram run_gram(const Context& on, const Tensors& saliencies, const Shape& shape,
              const Mask& mask, const Tensor& scale, const Tensor& u, double eps, bool with_grad) {
  const Tensor& first = saliencies[0];
  const ScalarType sums = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch;
  const int64_t R = std::min(shape.channels, shape.positions);
  Gram found{empty(first, {T, B}, sums), empty(first, {T, B}, sums), empty(first, {T, B}, sums),
             empty_if(with_grad, first, {T, B, T, R}, sums),
             empty_if(with_grad, first, {T, B, R, R}, first.scalar_type())};
  const Similarities out{output(found.similarity), output(found.inverse), output(found.slope)};
  const double multiple = storage_factor(first, std::max(shape.channels, shape.positions));
  if (is_small(shape)) {
    small_gram(on, type_of(first), shape, views_of(saliencies).data(), mask, data(scale), data(u),
               eps, multiple, out, output_or_null(found.projection), output_or_null(found.matrix));
  } else {
    large_gram(on, saliencies, shape, mask, scale, u, eps, multiple, out, found, with_grad);
  }
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gram_op(Tensors saliencies, Tensor scale,
                                                           Tensor anchors, double eps,
                                                           bool with_grad,
                                                           std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  const int64_t T = shape.tasks, B = shape.batch;
  check_contiguous("scale", scale, {T, B}, first, accumulation_type(first));
  anchors = vectors("anchors", anchors, {T, B, shape.channels}, first, accumulation_type(first));
  const Call on(first);
  const Mask uncounted{mask_of(mask, shape, first), nullptr};
  Gram found = run_gram(on, saliencies, shape, uncounted, scale, anchors, eps, with_grad);
  return {found.similarity, found.inverse, found.slope, found.projection, found.matrix};
}

// What the gradient needs of the forward pass and of the incoming gradient.
struct GradientOf {
  Tensor scale, anchors, factor, radial, contrast_grad, projection, matrix;
  Tensor anchor_weight, affinity_weight, radial_weight, negatives;
  std::optional<Tensor> position_grad;
};

void run_saliency_grad(const Context& on, const Tensors& saliencies, const Tensors& outputs,
                       const Sizes& tasks, const Shape& shape, const Mask& mask,
                       const GradientOf& g) {
  const Tensor& first = saliencies[0];
  const Type type = type_of(first);
  const ScalarType sums = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  const std::vector<View> views = views_of(saliencies);
  const double multiple = storage_factor(first, std::max(C, N));

  Tensor w = g.projection, y = g.projection;
  if (is_n_side(shape)) {
    y = empty(first, {T, B, T, C}, sums);
    const Vectors back{data(w), T, B * T * N, T * N, N};
    products(on, type, shape, views.data(), mask, false, back, data(g.scale), output(y));
  } else {
    w = empty(first, {T, B, T, N}, sums);
    const Vectors anchors{data(g.anchors), T, 0, C, B * C};
    products(on, type, shape, views.data(), mask, true, anchors, data(g.scale), output(w));
  }
  const Tensor da = empty(first, {T, B, C}, sums);
  anchor_gradient(on, type, shape, mask,
                  {data(g.negatives), data(g.contrast_grad), data(g.factor), data(g.anchor_weight), data(y),
                   data(g.radial_weight), data(g.radial)},
                  output(da));
  const Coefficients coefficients{data(g.scale), data(g.anchor_weight), data(g.affinity_weight)};
  const Outer outer{data(da), g.position_grad ? data(*g.position_grad) : nullptr,
                    T, data(g.anchors), data(w)};
  if (is_small(shape)) {
    std::vector<View> from, to;
    for (size_t i = 0; i < tasks.size(); ++i) {
      from.push_back(views[tasks[i]]);
      to.push_back(view_of(outputs[i], true));
    }
    small_gradient(on, type, shape, static_cast<int64_t>(tasks.size()), tasks.data(), from.data(),
                   to.data(), mask, data(g.matrix), multiple, coefficients, outer);
    return;
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Tensor matrix = torch::stable::select(g.matrix, 0, tasks[i]);
    const View to = view_of(outputs[i], true);
    const bool transposed = channels_are_adjacent(to, shape);
    Tensor s;  // (B, C, N)
    if (mask.valid && is_n_side(shape)) {  // a sum over positions, of which some may be NaN
      const View& view = views[tasks[i]];
      const bool channels_first = !channels_are_adjacent(view, shape);
      s = empty(first, channels_first ? Sizes{B, C, N} : Sizes{B, N, C}, first.scalar_type());
      scaled_copy(on, type, shape, view, mask, nullptr, output(s));
      if (!channels_first) s = mT(s);
    } else {
      s = torch::stable::reshape(saliencies[tasks[i]], {B, C, N});
    }
    // The Gram matrix is symmetric.
    const Tensor rows = transposed ? mT(s) : s;
    const bool matrix_is_right = is_n_side(shape) != transposed;
    const Tensor product =
        matrix_is_right ? batched_product(rows, matrix) : batched_product(matrix, rows);
    add_outer(on, type, shape, tasks[i], to, mask, data(product), multiple, coefficients, outer);
  }
}

void check_gradient(const Tensor& first, const Shape& shape, GradientOf& g) {
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  const int64_t R = std::min(C, N);
  const ScalarType sums = accumulation_type(first);
  check_contiguous("scale", g.scale, {T, B}, first, sums);
  g.anchors = vectors("anchors", g.anchors, {T, B, C}, first, sums);
  check_contiguous("factor", g.factor, {B}, first, sums);
  check_contiguous("radial", g.radial, {T, B, C}, first, sums);
  check_contiguous("contrast_grad", g.contrast_grad, {T, B, C}, first, sums);
  g.projection = vectors("projection", g.projection, {T, B, T, R}, first, sums);
  check_contiguous("matrix", g.matrix, {T, B, R, R}, first, first.scalar_type());
  check_contiguous("anchor_weight", g.anchor_weight, {T, B}, first, sums);
  check_contiguous("affinity_weight", g.affinity_weight, {T, B}, first, sums);
  check_contiguous("radial_weight", g.radial_weight, {B}, first, sums);
  check_contiguous("negatives", g.negatives, {}, first, sums);
  if (g.position_grad) {
    g.position_grad = vectors("position_grad", *g.position_grad, {T, B, N}, first, sums);
  }
}

void saliency_grad_op(Tensors saliencies, Tensors outputs, Sizes tasks,
                      Tensor scale, Tensor anchors, Tensor factor, Tensor radial,
                      Tensor contrast_grad, Tensor projection, Tensor matrix, Tensor anchor_weight,
                      Tensor affinity_weight, Tensor radial_weight, Tensor negatives,
                      std::optional<Tensor> position_grad, std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  check_outputs(saliencies, outputs, tasks);
  GradientOf g{scale, anchors, factor, radial, contrast_grad, projection,   matrix,
                     anchor_weight,  affinity_weight,    radial_weight,    negatives, position_grad};
  check_gradient(saliencies[0], shape, g);
  if (tasks.empty()) return;
  const Call on(saliencies[0]);
  const Mask counted = counted_mask_of(on, mask, saliencies[0], shape);
  run_saliency_grad(on, saliencies, outputs, tasks, shape, counted, g);
}

// What is saved for the backward pass, after the two losses: see Saved in _ground/record.py.
enum SavedTensor {
  kPositionGrad, kScale, kAnchors, kFactor, kRadial, kContrastGrad, kWeight, kSimilarity, kInverse,
  kSlope, kProjection, kMatrix, kSavedTensors
};

Tensors losses_op(Tensors saliencies, std::optional<Tensor> present, std::optional<Tensor> mask,
                  bool tsr, bool csa, bool over_tasks, bool softmax, double tsr_temperature,
                  double tsr_floor, double csa_temperature, double eps, bool with_grad) {
  STD_TORCH_CHECK(tsr || csa, "expected tsr, csa or both");
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  const int64_t T = shape.tasks, B = shape.batch;
  if (present) check_contiguous("present", *present, {T, B}, first, ScalarType::Bool);
  const Call on(first);
  const Mask counted = counted_mask_of(on, mask, first, shape);
  std::vector<std::optional<Tensor>> found(2 + kSavedTensors);
  std::optional<Tensor>* saved = found.data() + 2;
  const Statistics means = run_statistics(on, saliencies, shape, counted, tsr, csa);
  if (tsr) {
    Entropy entropy = run_entropy(
        on, means.positions, counted,
        {over_tasks, softmax, tsr_temperature, tsr_floor, eps}, with_grad);
    found[0] = entropy.value;
    if (with_grad) saved[kPositionGrad] = entropy.grad;
  }
  // One tensor each: operators may not return the same tensor twice.
  const auto results = [&] {
    Tensors all;
    for (const auto& x : found) all.push_back(x ? *x : empty(first, {0}, first.scalar_type()));
    return all;
  };
  if (!csa) return results();
  const Anchors anchors = run_unit_anchors(on, means.channels, eps, with_grad);
  const Contrast contrast = run_contrast(on, anchors, csa_temperature, with_grad);
  const Gram gram =
      run_gram(on, saliencies, shape, counted, means.scale, anchors.unit, eps, with_grad);
  const ScalarType sums = accumulation_type(first);
  const Tensor weight = empty(first, {T, B}, sums);
  const Tensor loss = empty(first, {}, sums);
  found[1] = loss;
  const auto* bytes = present ? static_cast<const unsigned char*>(data(*present)) : nullptr;
  csa_value(on, type_of(first), T, B, data(contrast.logsumexp), data(gram.similarity), bytes,
            csa_temperature, output(weight), output(loss));
  if (!with_grad) return results();
  saved[kScale] = means.scale;
  saved[kAnchors] = anchors.unit;
  saved[kFactor] = anchors.factor;
  saved[kRadial] = anchors.radial;
  saved[kContrastGrad] = contrast.grad;
  saved[kWeight] = weight;
  saved[kSimilarity] = gram.similarity;
  saved[kInverse] = gram.inverse;
  saved[kSlope] = gram.slope;
  saved[kProjection] = gram.projection;
  saved[kMatrix] = gram.matrix;
  return results();
}

void losses_backward_op(Tensor grad_csa, std::optional<Tensor> position_grad,
                        std::optional<Tensor> mask, Tensors saliencies, Tensors outputs,
                        Sizes tasks, Tensors saved) {
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  check_outputs(saliencies, outputs, tasks);
  STD_TORCH_CHECK(saved.size() == kSavedTensors, "saved: expected ", int{kSavedTensors},
                  " tensors, got ", saved.size());
  if (tasks.empty()) return;
  const int64_t T = shape.tasks, B = shape.batch;
  const ScalarType sums = accumulation_type(first);
  GradientOf g{saved[kScale], saved[kAnchors], saved[kFactor], saved[kRadial],
               saved[kContrastGrad], saved[kProjection], saved[kMatrix],
               empty(first, {T, B}, sums), empty(first, {T, B}, sums), empty(first, {B}, sums),
               grad_csa, position_grad};
  check_gradient(first, shape, g);
  for (const SavedTensor i : {kWeight, kSimilarity, kInverse, kSlope}) {
    check_contiguous("saved", saved[i], {T, B}, first, sums);
  }
  const Call on(first);
  const Mask counted = counted_mask_of(on, mask, first, shape);
  coefficients(on, type_of(first), T, B, data(grad_csa), data(saved[kWeight]),
               data(saved[kSimilarity]), data(saved[kInverse]), data(saved[kSlope]),
               output(g.anchor_weight), output(g.affinity_weight), output(g.radial_weight));
  run_saliency_grad(on, saliencies, outputs, tasks, shape, counted, g);
}

// Why the device of a tensor can't run the kernels, or an empty string.
std::string why_not_op(Tensor x) {
  const Call on(x);
  return why_not();
}

// What this was compiled from; setup.py defines it.
std::string sources() { return REPMTL_SOURCES; }

}  // namespace
}  // namespace repmtl::cuda

STABLE_TORCH_LIBRARY(repmtl_cuda, m) {
  m.def("statistics(Tensor[] saliencies, bool positions, bool channels, Tensor? mask=None) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("entropy(Tensor x, bool over_tasks, bool softmax, float temperature, float eps, "
        "bool with_grad) -> (Tensor, Tensor)");
  m.def("unit_anchors(Tensor a, float eps, bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def("log_sum_exp(Tensor dots, int first, float temperature, Tensor(a!)? columns) -> "
        "(Tensor, Tensor)");
  m.def("weigh_dots(Tensor(a!) dots, Tensor rows, Tensor columns, int first, float temperature) -> "
        "()");
  m.def("through_normalisation(Tensor(a!) du, Tensor u, Tensor factor, Tensor radial) -> ()");
  m.def("gram(Tensor[] saliencies, Tensor scale, Tensor anchors, float eps, bool with_grad, "
        "Tensor? mask=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("saliency_grad(Tensor[] saliencies, Tensor(a!)[] outputs, int[] tasks, Tensor scale, "
        "Tensor anchors, Tensor factor, Tensor radial, Tensor contrast_grad, Tensor projection, "
        "Tensor matrix, Tensor anchor_weight, Tensor affinity_weight, Tensor radial_weight, Tensor negatives, "
        "Tensor? position_grad, Tensor? mask=None) -> ()");
  m.def("losses(Tensor[] saliencies, Tensor? present, Tensor? mask, bool tsr, bool csa, "
        "bool over_tasks, bool softmax, float tsr_temperature, float tsr_floor, "
        "float csa_temperature, float eps, bool with_grad) -> Tensor[]");
  m.def("losses_backward(Tensor grad_csa, Tensor? position_grad, Tensor? mask, "
        "Tensor[] saliencies, Tensor(a!)[] outputs, int[] tasks, Tensor[] saved) -> ()");
  m.def("sources() -> str");
  m.def("why_not(Tensor x) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(repmtl_cuda, CompositeExplicitAutograd, m) {
  m.impl("sources", TORCH_BOX(&repmtl::cuda::sources));
}

#define REPMTL_IMPLEMENT(key) STABLE_TORCH_LIBRARY_IMPL(repmtl_cuda, key, m)
REPMTL_IMPLEMENT(REPMTL_DISPATCH_KEY) {
  m.impl("statistics", TORCH_BOX(&repmtl::cuda::statistics_op));
  m.impl("entropy", TORCH_BOX(&repmtl::cuda::entropy_op));
  m.impl("unit_anchors", TORCH_BOX(&repmtl::cuda::unit_anchors_op));
  m.impl("log_sum_exp", TORCH_BOX(&repmtl::cuda::log_sum_exp_op));
  m.impl("weigh_dots", TORCH_BOX(&repmtl::cuda::weigh_dots_op));
  m.impl("through_normalisation", TORCH_BOX(&repmtl::cuda::through_normalisation_op));
  m.impl("gram", TORCH_BOX(&repmtl::cuda::gram_op));
  m.impl("saliency_grad", TORCH_BOX(&repmtl::cuda::saliency_grad_op));
  m.impl("losses", TORCH_BOX(&repmtl::cuda::losses_op));
  m.impl("losses_backward", TORCH_BOX(&repmtl::cuda::losses_backward_op));
  m.impl("why_not", TORCH_BOX(&repmtl::cuda::why_not_op));
}
