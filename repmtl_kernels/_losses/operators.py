"""The registered operators ``repmtl::losses`` and ``repmtl::losses_backward``, for compilers.

Eager calls go to the ``autograd.Function`` directly, which costs less per call.
"""

from __future__ import annotations

import torch

from repmtl_kernels._ground.record import Config, Saved, empty_results
from repmtl_kernels._ground.saliency import canonical_tasks
from repmtl_kernels._losses import backward, forward
from repmtl_kernels._losses.function import Losses

_CONFIG = (
    "str backend, bool tsr, bool csa, bool stacked, int channel_dim, str over, str normalizer, "
    "float tsr_temperature, float tsr_floor, float csa_temperature, float eps, bool with_grad, "
    "str group, bool recompute, float lambda_tsr, float lambda_csa"
)


@torch.library.custom_op(
    "repmtl::losses",
    mutates_args=(),
    schema=f"(Tensor[] operands, Tensor? present, Tensor? positions, {_CONFIG}) -> Tensor[]",
)
def losses(operands, present, positions, *config):
    return list(forward.forward(Config(*config), operands, present, positions))


@torch.library.custom_op(
    "repmtl::losses_backward",
    mutates_args=(),
    schema="(Tensor? grad_tsr, Tensor? grad_csa, Tensor? positions, Tensor[] operands, "
    f"Tensor[] saved, bool[] wanted, {_CONFIG}) -> Tensor[]",
)
def losses_backward(grad_tsr, grad_csa, positions, operands, saved, wanted, *config):
    """The gradients of the wanted operands."""
    given = grad_tsr, grad_csa, positions, operands, Saved(*saved)
    return backward.backward(Config(*config), wanted, *given)


@losses.register_fake
def _(operands, present, positions, *config):
    config = Config(*config)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    return empty_results(
        saliencies,
        tsr=config.tsr,
        csa=config.csa,
        with_grad=config.with_grad,
        recompute=config.recompute,
    )


def _keep(ctx, inputs, output) -> None:
    operands, present, positions, *config = inputs
    Losses.setup_context(ctx, (True, Config(*config), present, positions, *operands), output)


def _differentiate(ctx, grads):
    """For graphs that keep the operator whole, as ``torch.export`` makes them."""
    wanted = ctx.needs_input_grad
    ctx.needs_input_grad = (False, False, False, False, *wanted[0])
    _, _, _, _, *found = Losses.backward(ctx, *grads)
    ctx.needs_input_grad = wanted
    return found, *(None for _ in wanted[1:])


losses.register_autograd(_differentiate, setup_context=_keep)


@losses_backward.register_fake
def _(grad_tsr, grad_csa, positions, operands, saved, wanted, *config):
    if grad_csa is None:
        position_grad = Saved(*saved).position_grad
        return backward.expanded_grads(Config(*config), wanted, position_grad, operands)
    return [torch.empty_like(s) for s, w in zip(operands, wanted, strict=True) if w]
