// Makes the kernels operators of PyTorch, in its stable ABI. Each checks its arguments and runs one
// stage; `losses` and `losses_backward` run all of them.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "losses.h"
#include "stages.h"

// The tests register the kernels for the CPU, where their own headers emulate CUDA.
#ifndef REPMTL_DISPATCH_KEY
#define REPMTL_DISPATCH_KEY CUDA
#endif

namespace repmtl::cuda {
namespace {

// Checks a tensor of accumulators with three dimensions, such as (T, B, C).
void check_three(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected 3 dimensions, got ", x.dim());
  check_contiguous(name, x, {x.size(0), x.size(1), x.size(2)}, x, accumulation_type(x));
  check_not_empty(name, x);
}

std::tuple<Tensor, Tensor, Tensor> statistics_op(Tensors saliencies, bool with_positions,
                                                 bool with_channels, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(with_positions || with_channels, "expected positions, channels or both");
  const Shape shape = shape_of(saliencies);
  const Call on(saliencies[0]);
  const Mask counted = counted_mask_of(on, mask, saliencies[0], shape);
  Statistics means = run_statistics(on, saliencies, shape, counted, with_positions, with_channels);
  return {means.positions, means.channels, means.scale};
}

Tensor affinity_op(Tensors saliencies, std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  const Call on(saliencies[0]);
  return run_affinity(on, saliencies, shape, mask_of(mask, shape, saliencies[0]));
}

std::tuple<Tensor, Tensor> entropy_op(Tensor x, bool over_tasks, bool softmax, double temperature,
                                      double eps, bool with_grad) {
  check_three("x", x);
  const Call on(x);
  Entropy entropy = run_entropy(on, x, {}, {over_tasks, softmax, temperature, 0, eps}, with_grad);
  return {entropy.value, entropy.grad};
}

std::tuple<Tensor, Tensor, Tensor> unit_anchors_op(Tensor a, double eps, bool with_grad) {
  check_three("a", a);
  const Call on(a);
  Anchors anchors = run_unit_anchors(on, a, eps, with_grad);
  return {anchors.unit, anchors.factor, anchors.radial};
}

// Returns logsumexp (M) and rows (2, M).
std::tuple<Tensor, Tensor> log_sum_exp_op(Tensor dots, int64_t first, double temperature,
                                          std::optional<Tensor> columns) {
  const Block block = block_of(dots, first, accumulation_type(dots));
  if (columns) check_contiguous("columns", *columns, {2, block.batch}, dots, dots.scalar_type());
  const Call on(dots);
  Tensor logsumexp = empty(dots, {block.samples}, dots.scalar_type());
  Tensor rows = empty(dots, {2, block.samples}, dots.scalar_type());
  log_sum_exp(on, type_of(dots), block.tasks, block.batch, first, block.samples, data(dots),
              temperature, output(logsumexp), output(rows), columns ? output(*columns) : nullptr);
  return {logsumexp, rows};
}

void weigh_dots_op(Tensor dots, Tensor rows, Tensor columns, int64_t first, double temperature) {
  const Block block = block_of(dots, first, accumulation_type(dots));
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gram_op(Tensors saliencies, Tensor scale,
                                                           Tensor anchors, double eps,
                                                           bool with_grad,
                                                           std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  const Tensor& first = saliencies[0];
  const int64_t T = shape.tasks, B = shape.batch;
  check_contiguous("scale", scale, {T, B}, first, accumulation_type(first));
  anchors = aligned("anchors", anchors, {T, B, shape.channels}, first, accumulation_type(first));
  const Call on(first);
  const Mask uncounted{mask_of(mask, shape, first), nullptr};
  Gram gram = run_gram(on, saliencies, shape, uncounted, scale, anchors, eps, with_grad);
  return {gram.similarity, gram.inverse, gram.slope, gram.projection, gram.matrix};
}

void saliency_grad_op(Tensors saliencies, Tensors outputs, Sizes tasks, Tensor scale,
                      Tensor anchors, Tensor factor, Tensor radial, Tensor contrast_grad,
                      Tensor projection, Tensor matrix, Tensor anchor_weight,
                      Tensor affinity_weight, Tensor radial_weight, Tensor negatives,
                      std::optional<Tensor> position_grad, std::optional<Tensor> mask) {
  const Shape shape = shape_of(saliencies);
  check_outputs(saliencies, outputs, tasks);
  GradientInputs g{scale,           anchors,       factor,    radial,
                   contrast_grad,   projection,    matrix,    anchor_weight,
                   affinity_weight, radial_weight, negatives, position_grad};
  check_gradient(saliencies[0], shape, g);
  if (tasks.empty()) return;
  const Call on(saliencies[0]);
  const Mask counted = counted_mask_of(on, mask, saliencies[0], shape);
  run_saliency_grad(on, saliencies, outputs, tasks, shape, counted, g);
}

// Returns why the device of a tensor can't run the kernels, or an empty string.
std::string why_not_op(Tensor x) {
  const Call on(x);
  return why_not();
}

// Returns the digest of the sources, which the build defines.
std::string sources() { return REPMTL_SOURCES; }

}  // namespace
}  // namespace repmtl::cuda

STABLE_TORCH_LIBRARY(repmtl_cuda, m) {
  m.def("statistics(Tensor[] saliencies, bool positions, bool channels, Tensor? mask=None) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("affinity(Tensor[] saliencies, Tensor? mask=None) -> Tensor");
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
        "Tensor matrix, Tensor anchor_weight, Tensor affinity_weight, Tensor radial_weight, Tensor "
        "negatives, "
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
  m.impl("affinity", TORCH_BOX(&repmtl::cuda::affinity_op));
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
