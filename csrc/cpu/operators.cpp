// Makes the stages operators of PyTorch, in its stable ABI: checks arguments and allocates results.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/binding.h"
#include "affinity.h"
#include "contrast.h"
#include "entropy.h"
#include "gradient.h"
#include "small_products.h"
#include "statistics.h"

namespace repmtl {
namespace {

struct TorchParallelFor final : ParallelFor {
  void run(int64_t count, int64_t grain, void (*f)(int64_t, int64_t, void*),
           void* context) const override {
    torch::stable::parallel_for(0, count, grain,
                                [&](int64_t begin, int64_t end) { f(begin, end, context); });
  }
};

const TorchParallelFor kParallelFor;

// Calls f(S{}) for the type of the saliencies.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, "expected floating-point saliencies of at most 64 bits");
  }
}

// Calls f(A{}) for the type of accumulators.
template <typename F>
void dispatch_accumulation(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, "expected float32 or float64");
  }
}

// Returns a tensor's memory. A lazy copy becomes a real one if A is not const.
template <typename A>
A* data(const Tensor& x) {
  if constexpr (std::is_const_v<A>) {
    return static_cast<A*>(x.const_data_ptr());
  } else {
    return static_cast<A*>(x.mutable_data_ptr());
  }
}

template <typename A>
const A* data_or_null(const std::optional<Tensor>& x) {
  return x ? data<const A>(*x) : nullptr;
}

void check_small(const Tensor& saliency, int64_t positions) {
  STD_TORCH_CHECK(saliency.scalar_type() == ScalarType::Float && positions <= kSmall,
                  "saliencies: expected float32 and at most ", kSmall, " positions");
}

// Returns the view (B, C, N) of a tensor (B, C, *spatial) with any strides.
template <typename S>
View<S> view_of(const Tensor& x) {
  View<S> view{data<S>(x), x.stride(0), x.stride(1), 1, {}};
  const auto [sizes, strides] = grid_of(x);
  if (sizes.size() == 1) view.position_stride = strides[0];
  if (sizes.size() < 2) return view;
  view.offsets.push_back(0);
  for (size_t d = 0; d < sizes.size(); ++d) {
    Sizes finer;
    finer.reserve(view.offsets.size() * sizes[d]);
    for (int64_t offset : view.offsets) {
      for (int64_t i = 0; i < sizes[d]; ++i) finer.push_back(offset + i * strides[d]);
    }
    view.offsets = std::move(finer);
  }
  return view;
}

std::tuple<Tensor, Tensor, Tensor> statistics_cpu(Tensors saliencies, bool with_positions,
                                                  bool with_channels, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(with_positions || with_channels, "expected positions, channels or both");
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  const ScalarType type = accumulation_type(first);
  const int64_t T = shape.tasks, B = shape.batch;
  const unsigned char* valid = mask_of(mask, shape, first);
  Tensor positions = empty_if(with_positions, first, {T, B, shape.positions}, type);
  Tensor channels = empty_if(with_channels, first, {T, B, shape.channels}, type);
  Tensor scale = empty_if(with_channels, first, {T, B}, type);
  dispatch(first.scalar_type(), [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    std::vector<View<const S>> views;
    for (const Tensor& s : saliencies) views.push_back(view_of<const S>(s));
    statistics<S>(shape, views.data(), with_positions ? data<A>(positions) : nullptr,
                  with_channels ? data<A>(channels) : nullptr,
                  with_channels ? data<A>(scale) : nullptr, valid, kParallelFor);
  });
  return {positions, channels, scale};
}

// Returns the products (B, T, T), float64.
Tensor affinity_cpu(Tensors saliencies, std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  const unsigned char* valid = mask_of(mask, shape, first);
  Tensor products = empty(first, {shape.batch, shape.tasks, shape.tasks}, ScalarType::Double);
  dispatch(first.scalar_type(), [&](auto example) {
    using S = decltype(example);
    std::vector<View<const S>> views;
    for (const Tensor& s : saliencies) views.push_back(view_of<const S>(s));
    affinity<S>(shape, views.data(), valid, data<double>(products), kParallelFor);
  });
  return products;
}

std::tuple<Tensor, Tensor> entropy_cpu(Tensor x, bool over_tasks, bool softmax, double temperature,
                                       double eps, bool with_grad) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (T, B, N), got ", x.dim(), " dimensions");
  const int64_t T = x.size(0), B = x.size(1), N = x.size(2);
  check_contiguous("x", x, {T, B, N}, x, x.scalar_type());
  check_not_empty("x", x);
  Tensor value = empty(x, {}, x.scalar_type());
  Tensor grad = empty_if(with_grad, x, {T, B, N}, x.scalar_type());
  dispatch_accumulation(x, [&](auto example) {
    using A = decltype(example);
    const EntropyOptions options{over_tasks, softmax, temperature, eps};
    *data<A>(value) = entropy<A>(T, B, N, data<const A>(x), options,
                                 with_grad ? data<A>(grad) : nullptr, kParallelFor);
  });
  return {value, grad};
}

// Returns u (T, B, C), factor (B) and radial (T, B, C), which is empty without a gradient.
std::tuple<Tensor, Tensor, Tensor> unit_anchors_cpu(Tensor a, double eps, bool with_grad) {
  STD_TORCH_CHECK(a.dim() == 3, "a: expected (T, B, C), got ", a.dim(), " dimensions");
  const int64_t T = a.size(0), B = a.size(1), C = a.size(2);
  const ScalarType type = a.scalar_type();
  check_contiguous("a", a, {T, B, C}, a, type);
  check_not_empty("a", a);
  Tensor u = empty(a, {T, B, C}, type), factor = empty(a, {B}, type);
  Tensor radial = empty_if(with_grad, a, {T, B, C}, type);
  dispatch_accumulation(a, [&](auto example) {
    using A = decltype(example);
    unit_anchors<A>(T, B, C, data<const A>(a), eps, data<A>(u), data<A>(factor),
                    with_grad ? data<A>(radial) : nullptr, kParallelFor);
  });
  return {u, factor, radial};
}

// Returns logsumexp (M) and rows (2, M).
std::tuple<Tensor, Tensor> log_sum_exp_cpu(Tensor dots, int64_t first, double temperature,
                                           std::optional<Tensor> columns) {
  const Block block = block_of(dots, first, dots.scalar_type());
  const ScalarType type = dots.scalar_type();
  if (columns) check_contiguous("columns", *columns, {2, block.batch}, dots, type);
  Tensor logsumexp = empty(dots, {block.samples}, type);
  Tensor rows = empty(dots, {2, block.samples}, type);
  dispatch_accumulation(dots, [&](auto example) {
    using A = decltype(example);
    log_sum_exp<A>(block.tasks, block.batch, first, block.samples, data<const A>(dots), temperature,
                   data<A>(logsumexp), data<A>(rows), columns ? data<A>(*columns) : nullptr,
                   kParallelFor);
  });
  return {logsumexp, rows};
}

void weigh_dots_cpu(Tensor dots, Tensor rows, Tensor columns, int64_t first, double temperature) {
  const Block block = block_of(dots, first, dots.scalar_type());
  check_contiguous("rows", rows, {2, block.samples}, dots, dots.scalar_type());
  check_contiguous("columns", columns, {2, block.batch}, dots, dots.scalar_type());
  dispatch_accumulation(dots, [&](auto example) {
    using A = decltype(example);
    weigh_dots<A>(block.tasks, block.batch, first, block.samples, data<A>(dots),
                  data<const A>(rows), data<const A>(columns), temperature, kParallelFor);
  });
}

void through_normalisation_cpu(Tensor du, Tensor u, Tensor factor, Tensor radial) {
  STD_TORCH_CHECK(du.dim() == 3, "du: expected (T, B, C), got ", du.dim(), " dimensions");
  const int64_t T = du.size(0), B = du.size(1), C = du.size(2);
  const ScalarType type = du.scalar_type();
  check_contiguous("du", du, {T, B, C}, du, type);
  check_contiguous("u", u, {T, B, C}, du, type);
  check_contiguous("factor", factor, {B}, du, type);
  check_contiguous("radial", radial, {T, B, C}, du, type);
  dispatch_accumulation(du, [&](auto example) {
    using A = decltype(example);
    through_normalisation<A>(T, B, C, data<const A>(u), data<const A>(factor),
                             data<const A>(radial), data<A>(du), kParallelFor);
  });
}

void add_outer_cpu(std::optional<Tensor> product, bool transposed, Tensor da,
                   std::optional<Tensor> dx, Tensor left, Tensor right, Tensor output) {
  const Shape shape = shape_of({output});
  const int64_t B = shape.batch, C = shape.channels, N = shape.positions;
  const ScalarType type = accumulation_type(output);
  const Sizes sizes = transposed ? Sizes{B, N, C} : Sizes{B, C, N};
  if (product) check_contiguous("product", *product, sizes, output, type);
  STD_TORCH_CHECK(left.dim() == 3, "left: expected (K, B, C), got ", left.dim(), " dimensions");
  const int64_t K = left.size(0);
  check_contiguous("da", da, {B, C}, output, type);
  if (dx) check_contiguous("dx", *dx, {B, N}, output, type);
  check_contiguous("left", left, {K, B, C}, output, type);
  check_contiguous("right", right, {B, K, N}, output, type);
  dispatch(output.scalar_type(), [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    add_outer<S>(shape, K, data_or_null<A>(product), transposed, data<const A>(da),
                 data_or_null<A>(dx), data<const A>(left), data<const A>(right), view_of<S>(output),
                 kParallelFor);
  });
}

// Returns norm (T, B), positive (T, B), projection (T, B, T, N) and matrix (T, B, N, N). The last
// two are empty without a gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> small_gram_cpu(Tensors saliencies, Tensor scale,
                                                          Tensor anchors, bool with_grad,
                                                          std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  const Tensor& first = saliencies[0];
  check_small(first, N);
  check_contiguous("scale", scale, {T, B}, first, ScalarType::Float);
  check_contiguous("anchors", anchors, {T, B, C}, first, ScalarType::Float);
  const unsigned char* valid = mask_of(mask, shape, first);
  Tensor norm = empty(first, {T, B}, ScalarType::Float);
  Tensor positive = empty(first, {T, B}, ScalarType::Float);
  Tensor projection = empty_if(with_grad, first, {T, B, T, N}, ScalarType::Float);
  Tensor matrix = empty_if(with_grad, first, {T, B, N, N}, ScalarType::Float);
  std::vector<View<const float>> views;
  for (const Tensor& s : saliencies) views.push_back(view_of<const float>(s));
  const auto gram = N == 1 ? pooled_gram : small_gram;
  gram(shape, views.data(), data<const float>(scale), data<const float>(anchors), valid,
       data<float>(norm), data<float>(positive), with_grad ? data<float>(projection) : nullptr,
       with_grad ? data<float>(matrix) : nullptr, kParallelFor);
  return {norm, positive, projection, matrix};
}

void small_gradient_cpu(Tensors saliencies, Tensors outputs, Sizes tasks, Tensor scale,
                        Tensor anchors, Tensor factor, Tensor radial, Tensor contrast_grad,
                        Tensor projection, Tensor matrix, Tensor anchor_weight,
                        Tensor affinity_weight, Tensor radial_weight, Tensor negatives,
                        std::optional<Tensor> position_grad, std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  check_small(saliencies[0], N);
  STD_TORCH_CHECK(T <= kSmallTasks, "saliencies: expected at most ", kSmallTasks, " tasks");
  check_outputs(saliencies, outputs, tasks);
  const auto check = [&](const char* name, const Tensor& x, const Sizes& sizes) {
    check_contiguous(name, x, sizes, saliencies[0], ScalarType::Float);
    return data<const float>(x);
  };
  const SmallGradient g{check("scale", scale, {T, B}),
                        check("anchor_weight", anchor_weight, {T, B}),
                        check("affinity_weight", affinity_weight, {T, B}),
                        check("factor", factor, {B}),
                        check("radial_weight", radial_weight, {B}),
                        check("anchors", anchors, {T, B, C}),
                        check("radial", radial, {T, B, C}),
                        check("contrast_grad", contrast_grad, {T, B, C}),
                        check("projection", projection, {T, B, T, N}),
                        check("matrix", matrix, {T, B, N, N}),
                        check("negatives", negatives, {}),
                        position_grad ? check("position_grad", *position_grad, {T, B, N}) : nullptr,
                        mask_of(mask, shape, saliencies[0])};
  std::vector<View<const float>> views;
  std::vector<View<float>> views_of_outputs;
  for (const Tensor& s : saliencies) views.push_back(view_of<const float>(s));
  for (const Tensor& s : outputs) views_of_outputs.push_back(view_of<float>(s));
  const auto gradient = N == 1 ? pooled_gradient : small_gradient;
  gradient(shape, views.data(), g, tasks, views_of_outputs.data(), kParallelFor);
}

// Returns the digest of the sources, which the build defines.
std::string sources() { return REPMTL_SOURCES; }

}  // namespace
}  // namespace repmtl

STABLE_TORCH_LIBRARY(repmtl_native, m) {
  m.def("statistics(Tensor[] saliencies, bool positions, bool channels, "
        "Tensor? mask=None) -> (Tensor, Tensor, Tensor)");
  m.def("affinity(Tensor[] saliencies, Tensor? mask=None) -> Tensor");
  m.def("entropy(Tensor x, bool over_tasks, bool softmax, float temperature, float eps, "
        "bool with_grad) -> (Tensor, Tensor)");
  m.def("unit_anchors(Tensor a, float eps, bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def("log_sum_exp(Tensor dots, int first, float temperature, Tensor(a!)? columns) -> "
        "(Tensor, Tensor)");
  m.def("weigh_dots(Tensor(a!) dots, Tensor rows, Tensor columns, int first, float temperature) -> "
        "()");
  m.def("through_normalisation(Tensor(a!) du, Tensor u, Tensor factor, Tensor radial) -> ()");
  m.def("add_outer(Tensor? product, bool transposed, Tensor da, Tensor? dx, Tensor left, "
        "Tensor right, Tensor(a!) output) -> ()");
  m.def("small_products_are_fast() -> bool");
  m.def("sources() -> str");
  m.def("small_gram(Tensor[] saliencies, Tensor scale, Tensor anchors, bool with_grad, "
        "Tensor? mask=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("small_gradient(Tensor[] saliencies, Tensor(a!)[] outputs, int[] tasks, Tensor scale, "
        "Tensor anchors, Tensor factor, Tensor radial, Tensor contrast_grad, Tensor projection, "
        "Tensor matrix, Tensor anchor_weight, Tensor affinity_weight, Tensor radial_weight, Tensor "
        "negatives, "
        "Tensor? position_grad, Tensor? mask=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(repmtl_native, CompositeExplicitAutograd, m) {
  m.impl("small_products_are_fast", TORCH_BOX(&repmtl::small_products_are_fast));
  m.impl("sources", TORCH_BOX(&repmtl::sources));
}

STABLE_TORCH_LIBRARY_IMPL(repmtl_native, CPU, m) {
  m.impl("statistics", TORCH_BOX(&repmtl::statistics_cpu));
  m.impl("affinity", TORCH_BOX(&repmtl::affinity_cpu));
  m.impl("entropy", TORCH_BOX(&repmtl::entropy_cpu));
  m.impl("unit_anchors", TORCH_BOX(&repmtl::unit_anchors_cpu));
  m.impl("log_sum_exp", TORCH_BOX(&repmtl::log_sum_exp_cpu));
  m.impl("weigh_dots", TORCH_BOX(&repmtl::weigh_dots_cpu));
  m.impl("through_normalisation", TORCH_BOX(&repmtl::through_normalisation_cpu));
  m.impl("add_outer", TORCH_BOX(&repmtl::add_outer_cpu));
  m.impl("small_gram", TORCH_BOX(&repmtl::small_gram_cpu));
  m.impl("small_gradient", TORCH_BOX(&repmtl::small_gradient_cpu));
}
