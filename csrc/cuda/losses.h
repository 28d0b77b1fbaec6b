// Both losses in one call, and their gradient in another.
#pragma once

#include <optional>

#include "../common/binding.h"

namespace repmtl::cuda {

// Returns TSR, CSA and the tensors that `losses_backward_op` reads. A result that is not wanted is
// an empty tensor. saliencies: one (B, C, *spatial) for each task; present (T, B), mask (B, N).
Tensors losses_op(Tensors saliencies, std::optional<Tensor> present, std::optional<Tensor> mask,
                  bool tsr, bool csa, bool over_tasks, bool softmax, double tsr_temperature,
                  double tsr_floor, double csa_temperature, double eps, bool with_grad);

// Writes outputs[i], the gradient of task tasks[i]. grad_csa () is the gradient of CSA,
// position_grad (T, B, N) what TSR gives the position means; `saved` comes from `losses_op`.
void losses_backward_op(Tensor grad_csa, std::optional<Tensor> position_grad,
                        std::optional<Tensor> mask, Tensors saliencies, Tensors outputs,
                        Sizes tasks, Tensors saved);

}  // namespace repmtl::cuda
