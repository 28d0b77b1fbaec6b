#include "losses.h"

#include <cstdint>
#include <optional>
#include <vector>

#include "stages.h"

namespace repmtl::cuda {
namespace {

// The tensors that the backward pass reads, in the order of Saved in _ground/record.py. They follow
// the two losses.
enum SavedTensor {
  kPositionGrad,
  kScale,
  kAnchors,
  kFactor,
  kRadial,
  kContrastGrad,
  kWeight,
  kSimilarity,
  kInverse,
  kSlope,
  kProjection,
  kMatrix,
  kSavedTensors
};

}  // namespace

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
  std::vector<std::optional<Tensor>> optional_results(2 + kSavedTensors);
  std::optional<Tensor>* saved = optional_results.data() + 2;
  const Statistics means = run_statistics(on, saliencies, shape, counted, tsr, csa);
  if (tsr) {
    Entropy entropy =
        run_entropy(on, means.positions, counted,
                    {over_tasks, softmax, tsr_temperature, tsr_floor, eps}, with_grad);
    optional_results[0] = entropy.value;
    if (with_grad) saved[kPositionGrad] = entropy.grad;
  }
  // Operators may not return the same tensor twice, so each empty one is new.
  const auto results = [&] {
    Tensors all;
    for (const auto& x : optional_results) {
      all.push_back(x ? *x : empty(first, {0}, first.scalar_type()));
    }
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
  optional_results[1] = loss;
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
  const int64_t T = shape.tasks, B = shape.batch;
  const ScalarType sums = accumulation_type(first);
  GradientInputs g{saved[kScale],
                   saved[kAnchors],
                   saved[kFactor],
                   saved[kRadial],
                   saved[kContrastGrad],
                   saved[kProjection],
                   saved[kMatrix],
                   empty(first, {T, B}, sums),
                   empty(first, {T, B}, sums),
                   empty(first, {B}, sums),
                   grad_csa,
                   position_grad};
  check_gradient(first, shape, g);
  for (const SavedTensor i : {kWeight, kSimilarity, kInverse, kSlope}) {
    check_contiguous("saved", saved[i], {T, B}, first, sums);
  }
  if (tasks.empty()) return;
  const Call on(first);
  const Mask counted = counted_mask_of(on, mask, first, shape);
  coefficients(on, type_of(first), T, B, data(grad_csa), data(saved[kWeight]),
               data(saved[kSimilarity]), data(saved[kInverse]), data(saved[kSlope]),
               output(g.anchor_weight), output(g.affinity_weight), output(g.radial_weight));
  run_saliency_grad(on, saliencies, outputs, tasks, shape, counted, g);
}

}  // namespace repmtl::cuda
