// The stages as operators of PyTorch, in its stable ABI: checks, views and allocation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "contrast.h"
#include "entropy.h"
#include "gradient.h"
#include "small_products.h"
#include "statistics.h"

namespace repmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct TorchParallelFor final : ParallelFor {
  void run(int64_t count, int64_t grain, void (*f)(int64_t, int64_t, void*),
           void* context) const override {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      f(begin, end, context);
    });
  }
};

const TorchParallelFor kParallelFor;

// f(S{}) for the type of the saliencies.
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

template <typename F>
void dispatch_accumulation(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, "expected float32 or float64");
  }
}

ScalarType accumulation_type(const Tensor& saliency) {
  const ScalarType type = saliency.scalar_type();
  return type == ScalarType::Double ? type : ScalarType::Float;
}

// Its memory, to write where A is not const: a lazy copy becomes a real one then.
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

void check_contiguous(const char* name, const Tensor& x, const std::vector<int64_t>& sizes,
                      ScalarType type) {
  bool right = x.is_cpu() && x.is_contiguous() && x.scalar_type() == type &&
               x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; right && i < sizes.size(); ++i) right = x.size(i) == sizes[i];
  std::string shape;
  for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(right, name, ": expected a contiguous CPU tensor of shape (", shape,
                  "), of the precision of the others");
}

// Of what is divided by, or reduced.
void check_not_empty(const char* name, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) > 0, name, ": expected no size of 0, got one in dimension ", d);
  }
}

Shape shape_of(const std::vector<Tensor>& saliencies) {
  STD_TORCH_CHECK(!saliencies.empty(), "saliencies: expected at least one task");
  const Tensor& first = saliencies[0];
  for (const Tensor& s : saliencies) {
    bool right = s.is_cpu() && s.scalar_type() == first.scalar_type() && s.dim() == first.dim() &&
                 s.dim() >= 3;
    for (int64_t d = 0; right && d < s.dim(); ++d) right = s.size(d) == first.size(d);
    STD_TORCH_CHECK(right, "saliencies: expected CPU tensors (B, C, *spatial) of one shape, at "
                           "least one spatial dimension, and one dtype");
  }
  check_not_empty("saliencies", first);
  int64_t positions = 1;
  for (int64_t d = 2; d < first.dim(); ++d) positions *= first.size(d);
  return {static_cast<int64_t>(saliencies.size()), first.size(0), first.size(1), positions};
}

void check_small(const Tensor& saliency, int64_t positions) {
  STD_TORCH_CHECK(saliency.scalar_type() == ScalarType::Float && positions <= kSmall,
                  "saliencies: expected float32 and at most ", kSmall, " positions");
}

// The view (B, C, N) of a tensor (B, C, *spatial), of whatever strides.
template <typename S>
View<S> view_of(const Tensor& x) {
  View<S> view{data<S>(x), x.stride(0), x.stride(1), 1, {}};
  std::vector<int64_t> sizes, strides;  // of the positions, without dimensions that collapse
  for (int64_t d = 2; d < x.dim(); ++d) {
    if (x.size(d) == 1) continue;
    if (!sizes.empty() && strides.back() == x.size(d) * x.stride(d)) {
      sizes.back() *= x.size(d);
      strides.back() = x.stride(d);
    } else {
      sizes.push_back(x.size(d));
      strides.push_back(x.stride(d));
    }
  }
  if (sizes.size() == 1) view.position_stride = strides[0];
  if (sizes.size() < 2) return view;
  view.offsets.push_back(0);
  for (size_t d = 0; d < sizes.size(); ++d) {
    std::vector<int64_t> finer;
    finer.reserve(view.offsets.size() * sizes[d]);
    for (int64_t offset : view.offsets) {
      for (int64_t i = 0; i < sizes[d]; ++i) finer.push_back(offset + i * strides[d]);
    }
    view.offsets = std::move(finer);
  }
  return view;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

std::tuple<Tensor, Tensor, Tensor> statistics_cpu(std::vector<Tensor> saliencies,
                                                  bool with_positions, bool with_channels) {
  STD_TORCH_CHECK(with_positions || with_channels, "expected positions, channels or both");
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  const ScalarType type = accumulation_type(first);
  using Sizes = std::vector<int64_t>;
  const auto make = [&](bool asked, const Sizes& sizes) {
    return empty(first, asked ? sizes : Sizes{0}, type);
  };
  Tensor positions = make(with_positions, {shape.tasks, shape.batch, shape.positions});
  Tensor channels = make(with_channels, {shape.tasks, shape.batch, shape.channels});
  Tensor scale = make(with_channels, {shape.tasks, shape.batch});
  dispatch(first.scalar_type(), [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    std::vector<View<const S>> views;
    for (const Tensor& s : saliencies) views.push_back(view_of<const S>(s));
    statistics<S>(shape, views.data(), with_positions ? data<A>(positions) : nullptr,
                  with_channels ? data<A>(channels) : nullptr,
                  with_channels ? data<A>(scale) : nullptr, kParallelFor);
  });
  return {positions, channels, scale};
}

std::tuple<Tensor, Tensor> entropy_cpu(Tensor x, bool over_tasks, bool softmax, double temperature,
                                       double eps, bool with_grad) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (T, B, N), got ", x.dim(), " dimensions");
  const int64_t T = x.size(0), B = x.size(1), N = x.size(2);
  check_contiguous("x", x, {T, B, N}, x.scalar_type());
  check_not_empty("x", x);
  Tensor value = empty(x, {}, x.scalar_type());
  Tensor grad = empty(x, with_grad ? std::vector<int64_t>{T, B, N} : std::vector<int64_t>{0},
                      x.scalar_type());
  dispatch_accumulation(x, [&](auto example) {
    using A = decltype(example);
    const EntropyOptions options{over_tasks, softmax, temperature, eps};
    *data<A>(value) = entropy<A>(T, B, N, data<const A>(x), options,
                                 with_grad ? data<A>(grad) : nullptr, kParallelFor);
  });
  return {value, grad};
}

// u, factor, pull (empty without a gradient)
std::tuple<Tensor, Tensor, Tensor> unit_anchors_cpu(Tensor a, double eps, bool with_grad) {
  STD_TORCH_CHECK(a.dim() == 3, "a: expected (T, B, C), got ", a.dim(), " dimensions");
  const int64_t T = a.size(0), B = a.size(1), C = a.size(2);
  const ScalarType type = a.scalar_type();
  check_contiguous("a", a, {T, B, C}, type);
  check_not_empty("a", a);
  Tensor u = empty(a, {T, B, C}, type), factor = empty(a, {B}, type);
  Tensor pull = empty(a, with_grad ? std::vector<int64_t>{T, B, C} : std::vector<int64_t>{0}, type);
  dispatch_accumulation(a, [&](auto example) {
    using A = decltype(example);
    unit_anchors<A>(T, B, C, data<const A>(a), eps, data<A>(u), data<A>(factor),
                    with_grad ? data<A>(pull) : nullptr, kParallelFor);
  });
  return {u, factor, pull};
}

struct Block {
  int64_t tasks, samples, batch;
};

Block block_of(const Tensor& dots, int64_t first) {
  STD_TORCH_CHECK(dots.dim() == 4, "dots: expected (T, M, T, B), got ", dots.dim(), " dimensions");
  const Block block{dots.size(0), dots.size(1), dots.size(3)};
  const std::vector<int64_t> sizes{block.tasks, block.samples, block.tasks, block.batch};
  check_contiguous("dots", dots, sizes, dots.scalar_type());
  check_not_empty("dots", dots);
  STD_TORCH_CHECK(first >= 0 && first + block.samples <= block.batch,
                  "first: expected samples within the batch");
  return block;
}

// logsumexp (M)
Tensor log_sum_exp_cpu(Tensor dots, int64_t first, double temperature) {
  const Block block = block_of(dots, first);
  Tensor logsumexp = empty(dots, {block.samples}, dots.scalar_type());
  dispatch_accumulation(dots, [&](auto example) {
    using A = decltype(example);
    log_sum_exp<A>(block.tasks, block.batch, first, block.samples, data<const A>(dots),
                   temperature, data<A>(logsumexp), kParallelFor);
  });
  return logsumexp;
}

void weigh_dots_cpu(Tensor dots, Tensor logsumexp, int64_t first, double temperature) {
  const Block block = block_of(dots, first);
  check_contiguous("logsumexp", logsumexp, {block.batch}, dots.scalar_type());
  dispatch_accumulation(dots, [&](auto example) {
    using A = decltype(example);
    weigh_dots<A>(block.tasks, block.batch, first, block.samples, data<A>(dots),
                  data<const A>(logsumexp), temperature, kParallelFor);
  });
}

void through_normalisation_cpu(Tensor du, Tensor u, Tensor factor, Tensor pull) {
  STD_TORCH_CHECK(du.dim() == 3, "du: expected (T, B, C), got ", du.dim(), " dimensions");
  const int64_t T = du.size(0), B = du.size(1), C = du.size(2);
  const ScalarType type = du.scalar_type();
  check_contiguous("du", du, {T, B, C}, type);
  check_contiguous("u", u, {T, B, C}, type);
  check_contiguous("factor", factor, {B}, type);
  check_contiguous("pull", pull, {T, B, C}, type);
  dispatch_accumulation(du, [&](auto example) {
    using A = decltype(example);
    through_normalisation<A>(T, B, C, data<const A>(u), data<const A>(factor),
                             data<const A>(pull), data<A>(du), kParallelFor);
  });
}

void add_outer_cpu(std::optional<Tensor> product, bool transposed, Tensor da, std::optional<Tensor> dx,
                   Tensor left, Tensor right, Tensor output) {
  const Shape shape = shape_of({output});
  const int64_t B = shape.batch, C = shape.channels, N = shape.positions;
  const ScalarType type = accumulation_type(output);
  const std::vector<int64_t> sizes = transposed ? std::vector<int64_t>{B, N, C}
                                                : std::vector<int64_t>{B, C, N};
  if (product) check_contiguous("product", *product, sizes, type);
  STD_TORCH_CHECK(left.dim() == 3, "left: expected (K, B, C), got ", left.dim(), " dimensions");
  const int64_t K = left.size(0);
  check_contiguous("da", da, {B, C}, type);
  if (dx) check_contiguous("dx", *dx, {B, N}, type);
  check_contiguous("left", left, {K, B, C}, type);
  check_contiguous("right", right, {B, K, N}, type);
  dispatch(output.scalar_type(), [&](auto example) {
    using S = decltype(example);
    using A = acc_t<S>;
    add_outer<S>(shape, K, data_or_null<A>(product), transposed, data<const A>(da),
                 data_or_null<A>(dx), data<const A>(left), data<const A>(right),
                 view_of<S>(output), kParallelFor);
  });
}

// What this was compiled from; setup.py defines it.
std::string sources() { return REPMTL_SOURCES; }

// norm (T, B), positive (T, B), projection (T, B, T, N) and matrix (T, B, N, N), empty without grad
std::tuple<Tensor, Tensor, Tensor, Tensor> small_gram_cpu(std::vector<Tensor> saliencies,
                                                          Tensor scale, Tensor anchors,
                                                          bool with_grad) {
  const Shape shape = shape_of(saliencies);
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  const Tensor& first = saliencies[0];
  check_small(first, N);
  check_contiguous("scale", scale, {T, B}, ScalarType::Float);
  check_contiguous("anchors", anchors, {T, B, C}, ScalarType::Float);
  using Sizes = std::vector<int64_t>;
  Tensor norm = empty(first, {T, B}, ScalarType::Float);
  Tensor positive = empty(first, {T, B}, ScalarType::Float);
  Tensor projection = empty(first, with_grad ? Sizes{T, B, T, N} : Sizes{0}, ScalarType::Float);
  Tensor matrix = empty(first, with_grad ? Sizes{T, B, N, N} : Sizes{0}, ScalarType::Float);
  std::vector<View<const float>> views;
  for (const Tensor& s : saliencies) views.push_back(view_of<const float>(s));
  small_gram(shape, views.data(), data<const float>(scale), data<const float>(anchors),
             data<float>(norm), data<float>(positive),
             with_grad ? data<float>(projection) : nullptr,
             with_grad ? data<float>(matrix) : nullptr, kParallelFor);
  return {norm, positive, projection, matrix};
}

void small_gradient_cpu(std::vector<Tensor> saliencies, std::vector<Tensor> outputs,
                        std::vector<int64_t> tasks, Tensor scale, Tensor anchors, Tensor factor,
                        Tensor pull, Tensor contrast_grad, Tensor projection, Tensor matrix,
                        Tensor rank, Tensor curl, Tensor tug, Tensor negatives,
                        std::optional<Tensor> position_grad) {
  const Shape shape = shape_of(saliencies);
  const int64_t T = shape.tasks, B = shape.batch, C = shape.channels, N = shape.positions;
  check_small(saliencies[0], N);
  STD_TORCH_CHECK(T <= kSmallTasks, "saliencies: expected at most ", kSmallTasks, " tasks");
  STD_TORCH_CHECK(outputs.size() == tasks.size(), "outputs: expected one for each of ",
                  tasks.size(), " tasks, got ", outputs.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    STD_TORCH_CHECK(tasks[i] >= 0 && tasks[i] < T,
                    "tasks: expected numbers of saliencies, got ", tasks[i]);
    shape_of({saliencies[tasks[i]], outputs[i]});
  }
  const auto check = [](const char* name, const Tensor& x, const std::vector<int64_t>& sizes) {
    check_contiguous(name, x, sizes, ScalarType::Float);
    return data<const float>(x);
  };
  const SmallGradient g{
      check("scale", scale, {T, B}),
      check("rank", rank, {T, B}),
      check("curl", curl, {T, B}),
      check("factor", factor, {B}),
      check("tug", tug, {B}),
      check("anchors", anchors, {T, B, C}),
      check("pull", pull, {T, B, C}),
      check("contrast_grad", contrast_grad, {T, B, C}),
      check("projection", projection, {T, B, T, N}),
      check("matrix", matrix, {T, B, N, N}),
      check("negatives", negatives, {}),
      position_grad ? check("position_grad", *position_grad, {T, B, N}) : nullptr};
  std::vector<View<const float>> views;
  std::vector<View<float>> views_of_outputs;
  for (const Tensor& s : saliencies) views.push_back(view_of<const float>(s));
  for (const Tensor& s : outputs) views_of_outputs.push_back(view_of<float>(s));
  small_gradient(shape, views.data(), g, tasks, views_of_outputs.data(), kParallelFor);
}

}  // namespace
}  // namespace repmtl

STABLE_TORCH_LIBRARY(repmtl_native, m) {
  m.def("statistics(Tensor[] saliencies, bool positions, bool channels) -> (Tensor, Tensor, Tensor)");
  m.def("entropy(Tensor x, bool over_tasks, bool softmax, float temperature, float eps, "
        "bool with_grad) -> (Tensor, Tensor)");
  m.def("unit_anchors(Tensor a, float eps, bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def("log_sum_exp(Tensor dots, int first, float temperature) -> Tensor");
  m.def("weigh_dots(Tensor(a!) dots, Tensor logsumexp, int first, float temperature) -> ()");
  m.def("through_normalisation(Tensor(a!) du, Tensor u, Tensor factor, Tensor pull) -> ()");
  m.def("add_outer(Tensor? product, bool transposed, Tensor da, Tensor? dx, Tensor left, "
        "Tensor right, Tensor(a!) output) -> ()");
  m.def("small_products_are_fast() -> bool");
  m.def("sources() -> str");
  m.def("small_gram(Tensor[] saliencies, Tensor scale, Tensor anchors, bool with_grad) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  m.def("small_gradient(Tensor[] saliencies, Tensor(a!)[] outputs, int[] tasks, Tensor scale, "
        "Tensor anchors, Tensor factor, Tensor pull, Tensor contrast_grad, Tensor projection, "
        "Tensor matrix, Tensor rank, Tensor curl, Tensor tug, Tensor negatives, "
        "Tensor? position_grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(repmtl_native, CompositeExplicitAutograd, m) {
  m.impl("small_products_are_fast", TORCH_BOX(&repmtl::small_products_are_fast));
  m.impl("sources", TORCH_BOX(&repmtl::sources));
}

STABLE_TORCH_LIBRARY_IMPL(repmtl_native, CPU, m) {
  m.impl("statistics", TORCH_BOX(&repmtl::statistics_cpu));
  m.impl("entropy", TORCH_BOX(&repmtl::entropy_cpu));
  m.impl("unit_anchors", TORCH_BOX(&repmtl::unit_anchors_cpu));
  m.impl("log_sum_exp", TORCH_BOX(&repmtl::log_sum_exp_cpu));
  m.impl("weigh_dots", TORCH_BOX(&repmtl::weigh_dots_cpu));
  m.impl("through_normalisation", TORCH_BOX(&repmtl::through_normalisation_cpu));
  m.impl("add_outer", TORCH_BOX(&repmtl::add_outer_cpu));
  m.impl("small_gram", TORCH_BOX(&repmtl::small_gram_cpu));
  m.impl("small_gradient", TORCH_BOX(&repmtl::small_gradient_cpu));
}
