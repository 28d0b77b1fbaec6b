#include "stages.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace repmtl::cuda {
namespace {

// Rows of a block of the Gram matrix. Elements right of its diagonal are computed in vain, and
// smaller products run slower.
constexpr int64_t kGramBlock = 640;
// Products of anchors in memory at a time.
constexpr int64_t kContrastBlock = 1 << 22;

// Calls an operator of PyTorch that returns one tensor.
template <typename... X>
Tensor call(const char* name, const char* overload, const X&... arguments) {
  std::array<StableIValue, sizeof...(X)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns the batched product (B, M, K) (B, K, N), not rounded to 16 bits.
Tensor batched_product(const Tensor& a, const Tensor& b) {
  const ScalarType type = accumulation_type(a);
  if (a.scalar_type() == type) return call("aten::bmm", "", a, b);
  return call("aten::bmm", "dtype", a, b, type);
}

Tensor mT(const Tensor& x) { return torch::stable::transpose(x, -2, -1); }

// Returns the power of two that multiplies the stored Gram matrix. Without it, elements are at most
// 4 depth. In float16 it brings them to at most 2^15, as far from the smallest numbers as possible;
// otherwise to at most 8, so that products with unscaled saliencies stay in range.
double storage_factor(const Tensor& saliency, int64_t depth) {
  if (saliency.scalar_type() == ScalarType::Half) {
    return std::exp2(-std::max(0.0, std::ceil(std::log2(depth)) - 13));
  }
  return std::exp2(-std::floor(std::log2(depth)));
}

// Whether the Gram matrix is that of positions (N, N), and not of channels (C, C).
bool is_n_side(const Shape& shape) { return shape.positions <= shape.channels; }

// Whether one kernel computes the complete stage.
bool is_small(const Shape& shape) {
  return is_n_side(shape) && shape.positions <= kSmallPositions && shape.tasks <= kSmallTasks;
}

}  // namespace

Statistics run_statistics(const Context& on, const Tensors& saliencies, const Shape& shape,
                          const Mask& mask, bool with_positions, bool with_channels) {
  const Tensor& first = saliencies[0];
  const ScalarType type = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch;
  Statistics result{empty_if(with_positions, first, {T, B, shape.positions}, type),
                    empty_if(with_channels, first, {T, B, shape.channels}, type),
                    empty_if(with_channels, first, {T, B}, type)};
  statistics(on, type_of(first), shape, views_of(saliencies).data(), mask,
             output_or_null(result.positions), output_or_null(result.channels),
             output_or_null(result.scale));
  return result;
}

Tensor run_affinity(const Context& on, const Tensors& saliencies, const Shape& shape,
                    const unsigned char* valid) {
  const Tensor& first = saliencies[0];
  Tensor products = empty(first, {shape.batch, shape.tasks, shape.tasks}, ScalarType::Double);
  affinity(on, type_of(first), shape, views_of(saliencies).data(), valid,
           static_cast<double*>(output(products)));
  return products;
}

Entropy run_entropy(const Context& on, const Tensor& x, const Mask& mask,
                    const EntropyOptions& options, bool with_grad) {
  const ScalarType type = x.scalar_type();
  Entropy result{empty(x, {}, type),
                 empty_if(with_grad, x, {x.size(0), x.size(1), x.size(2)}, type)};
  entropy(on, type_of(x), x.size(0), x.size(1), x.size(2), data(x), mask, options,
          output(result.value), output_or_null(result.grad));
  return result;
}

Anchors run_unit_anchors(const Context& on, const Tensor& a, double eps, bool with_grad) {
  const int64_t T = a.size(0), B = a.size(1), C = a.size(2);
  const ScalarType type = a.scalar_type();
  Anchors result{empty(a, {T, B, C}, type), empty(a, {B}, type),
                 empty_if(with_grad, a, {T, B, C}, type)};
  unit_anchors(on, type_of(a), T, B, C, data(a), eps, output(result.unit), output(result.factor),
               output_or_null(result.radial));
  return result;
}

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
  Contrast result{empty(u, {B}, u.scalar_type()), u};
  Tensor dots = u, columns = u;
  if (with_grad) columns = torch::stable::new_zeros(u, {2, B});
  Tensors peaks;
  for (int64_t b = 0; b < B; b += step) {
    dots = dots_of(b);
    peaks.push_back(empty(u, {2, samples(b)}, u.scalar_type()));
    Tensor part = torch::stable::narrow(result.logsumexp, 0, b, samples(b));
    log_sum_exp(on, type, T, B, b, samples(b), data(dots), temperature, output(part),
                output(peaks.back()), with_grad ? output(columns) : nullptr);
  }
  if (!with_grad) {
    result.grad = empty(u, {0}, u.scalar_type());
    return result;
  }
  for (int64_t b = 0; b < B; b += step) {
    if (step < B) dots = dots_of(b);  // otherwise the block of above still holds them
    weigh_dots(on, type, T, B, b, samples(b), output(dots), data(peaks[b / step]), data(columns),
               temperature);
    const Tensor du = call("aten::mm", "", dots, rows);
    if (step == B) {
      result.grad = torch::stable::view(du, {T, B, C});
    } else {
      if (b == 0) result.grad = empty(u, {T, B, C}, u.scalar_type());
      Tensor part = torch::stable::narrow(result.grad, 1, b, samples(b));
      torch::stable::copy_(part, torch::stable::view(du, {T, samples(b), C}));
    }
  }
  through_normalisation(on, type, T, B, C, data(u), data(anchors.factor), data(anchors.radial),
                        output(result.grad));
  return result;
}

namespace {

// Returns dense saliencies of one task as (B, R, K), whose Gram matrix is (B, R, R).
Tensor gram_rows(const Tensor& dense, const Shape& shape, bool channels_first) {
  return is_n_side(shape) == channels_first ? mT(dense) : dense;
}

void large_gram(const Context& on, const Tensors& saliencies, const Shape& shape, const Mask& mask,
                const Tensor& scale, const Tensor& u, double eps, double multiple,
                const Similarities& out, Gram& gram, bool with_grad) {
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
    if (with_grad) gram.projection = w;
  } else if (with_grad) {
    const Vectors back{data(w), T, B * T * N, T * N, N};
    products(on, type, shape, views.data(), mask, false, back, data(scale),
             output(gram.projection));
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
    if (with_grad) matrix = output(torch::stable::select(gram.matrix, 0, t));
    int64_t part = 0;
    for (int64_t i = 0; i < R; i += step) {
      const int64_t j = std::min(i + step, R);
      Tensor left = rows, right = rows;
      left = torch::stable::narrow(left, 1, i, j - i);
      right = torch::stable::narrow(right, 1, 0, j);
      const Tensor block = batched_product(left, mT(right));
      gram_block(on, type, B, R, i, j - i, data(block), multiple, matrix, output(squares_of_task),
                 part, parts);
      part += gram_parts(j - i, j);
    }
  }
  gram_finish(on, type, T, B, data(squares), parts, data(w), T * N, data(scale), eps, out);
}

}  // namespace

Gram run_gram(const Context& on, const Tensors& saliencies, const Shape& shape, const Mask& mask,
              const Tensor& scale, const Tensor& u, double eps, bool with_grad) {
  const Tensor& first = saliencies[0];
  const ScalarType sums = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch;
  const int64_t R = std::min(shape.channels, shape.positions);
  Gram result{empty(first, {T, B}, sums), empty(first, {T, B}, sums), empty(first, {T, B}, sums),
              empty_if(with_grad, first, {T, B, T, R}, sums),
              empty_if(with_grad, first, {T, B, R, R}, first.scalar_type())};
  const Similarities out{output(result.similarity), output(result.inverse), output(result.slope)};
  const double multiple = storage_factor(first, std::max(shape.channels, shape.positions));
  if (is_small(shape)) {
    small_gram(on, type_of(first), shape, views_of(saliencies).data(), mask, data(scale), data(u),
               eps, multiple, out, output_or_null(result.projection),
               output_or_null(result.matrix));
  } else {
    large_gram(on, saliencies, shape, mask, scale, u, eps, multiple, out, result, with_grad);
  }
  return result;
}

void check_gradient(const Tensor& first, const Shape& shape, GradientInputs& g) {
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  const int64_t R = std::min(C, N);
  const ScalarType sums = accumulation_type(first);
  check_contiguous("scale", g.scale, {T, B}, first, sums);
  g.anchors = aligned("anchors", g.anchors, {T, B, C}, first, sums);
  check_contiguous("factor", g.factor, {B}, first, sums);
  check_contiguous("radial", g.radial, {T, B, C}, first, sums);
  check_contiguous("contrast_grad", g.contrast_grad, {T, B, C}, first, sums);
  g.projection = aligned("projection", g.projection, {T, B, T, R}, first, sums);
  check_contiguous("matrix", g.matrix, {T, B, R, R}, first, first.scalar_type());
  check_contiguous("anchor_weight", g.anchor_weight, {T, B}, first, sums);
  check_contiguous("affinity_weight", g.affinity_weight, {T, B}, first, sums);
  check_contiguous("radial_weight", g.radial_weight, {B}, first, sums);
  check_contiguous("negatives", g.negatives, {}, first, sums);
  if (g.position_grad) {
    g.position_grad = aligned("position_grad", *g.position_grad, {T, B, N}, first, sums);
  }
}

void run_saliency_grad(const Context& on, const Tensors& saliencies, const Tensors& outputs,
                       const Sizes& tasks, const Shape& shape, const Mask& mask,
                       const GradientInputs& g) {
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
                  {data(g.negatives), data(g.contrast_grad), data(g.factor), data(g.anchor_weight),
                   data(y), data(g.radial_weight), data(g.radial)},
                  output(da));
  const Coefficients coefficients{data(g.scale), data(g.anchor_weight), data(g.affinity_weight)};
  const Outer outer{data(da), g.position_grad ? data(*g.position_grad) : nullptr, T,
                    data(g.anchors), data(w)};
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
    Tensor s;                              // (B, C, N)
    if (mask.valid && is_n_side(shape)) {  // the sum over positions must not see NaN at masked ones
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

}  // namespace repmtl::cuda
