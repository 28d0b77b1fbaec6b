// The stages in order, from tensors to tensors. PyTorch computes the large matrix products.
// Arguments are checked by the operators.
#pragma once

#include <optional>

#include "binding.h"

namespace repmtl::cuda {

// A result that is not wanted is an empty tensor.
struct Statistics {
  Tensor positions, channels, scale;  // (T, B, N), (T, B, C), (T, B)
};
Statistics run_statistics(const Context& on, const Tensors& saliencies, const Shape& shape,
                          const Mask& mask, bool with_positions, bool with_channels);

// Returns the products (B, T, T), double.
Tensor run_affinity(const Context& on, const Tensors& saliencies, const Shape& shape,
                    const unsigned char* valid);

struct Entropy {
  Tensor value, grad;  // (), (T, B, N)
};
Entropy run_entropy(const Context& on, const Tensor& x, const Mask& mask,
                    const EntropyOptions& options, bool with_grad);

struct Anchors {
  Tensor unit, factor, radial;  // (T, B, C), (B), (T, B, C)
};
Anchors run_unit_anchors(const Context& on, const Tensor& a, double eps, bool with_grad);

struct Contrast {
  Tensor logsumexp, grad;  // (B), (T, B, C)
};
// The samples of other processes take no part.
Contrast run_contrast(const Context& on, const Anchors& anchors, double temperature,
                      bool with_grad);

struct Gram {
  Tensor similarity, inverse, slope;  // (T, B)
  Tensor projection, matrix;          // (T, B, T, R), (T, B, R, R) with R = min(C, N)
};
Gram run_gram(const Context& on, const Tensors& saliencies, const Shape& shape, const Mask& mask,
              const Tensor& scale, const Tensor& u, double eps, bool with_grad);

// The inputs of the gradient: results of the forward pass, and the weights of CSAGradient.
struct GradientInputs {
  Tensor scale;                                   // (T, B)
  Tensor anchors, factor, radial, contrast_grad;  // (T, B, C), but factor (B)
  Tensor projection, matrix;                      // as in Gram
  Tensor anchor_weight, affinity_weight;          // (T, B)
  Tensor radial_weight;                           // (B)
  Tensor negatives;                               // ()
  std::optional<Tensor> position_grad;            // (T, B, N)
};
// Checks all of them. Copies those that the kernels can't read as they are.
void check_gradient(const Tensor& first, const Shape& shape, GradientInputs& g);
// Writes outputs[i], the gradient of task tasks[i].
void run_saliency_grad(const Context& on, const Tensors& saliencies, const Tensors& outputs,
                       const Sizes& tasks, const Shape& shape, const Mask& mask,
                       const GradientInputs& g);

}  // namespace repmtl::cuda
