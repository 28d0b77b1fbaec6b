"""The registered operators ``repmtl::losses`` and ``repmtl::losses_backward``, for compilers.

Eager calls use the ``autograd.Function`` directly, which costs less per call.
"""

from __future__ import annotations

import torch

from repmtl_kernels._ground.record import Saved, empty_results
from repmtl_kernels._ground.saliency import canonical_tasks
from repmtl_kernels._losses.backward import expanded_grads, run_backward
from repmtl_kernels._losses.config import SCHEMA, Config
from repmtl_kernels._losses.forward import run_forward
from repmtl_kernels._losses.function import Losses


@torch.library.custom_op(
    "repmtl::losses",
    mutates_args=(),
    schema=f"(Tensor[] operands, Tensor? present, Tensor? positions, {SCHEMA}) -> Tensor[]",
)
def losses(operands, present, positions, *flat):
    """Return ``total, tsr, csa, *saved``."""
    return list(run_forward(Config.from_flat(flat), operands, present, positions))


@torch.library.custom_op(
    "repmtl::losses_backward",
    mutates_args=(),
    schema="(Tensor? grad_total, Tensor? grad_tsr, Tensor? grad_csa, Tensor? positions, "
    f"Tensor[] operands, Tensor[] saved, bool[] wanted, {SCHEMA}) -> Tensor[]",
)
def losses_backward(grad_total, grad_tsr, grad_csa, positions, operands, saved, wanted, *flat):
    """Return the gradients of the wanted operands."""
    config, grads = Config.from_flat(flat), (grad_total, grad_tsr, grad_csa)
    return run_backward(config, wanted, *grads, positions, operands, Saved(*saved))


@losses.register_fake
def _(operands, present, positions, *flat):
    config = Config.from_flat(flat)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    return empty_results(
        saliencies,
        total=config.total,
        tsr=config.tsr is not None,
        csa=config.csa is not None,
        with_grad=config.with_grad,
        recompute=config.recompute,
    )


def _set_up_context(ctx, inputs, output):
    operands, present, positions, *flat = inputs
    config = Config.from_flat(flat)
    Losses.setup_context(ctx, (True, config, present, positions, *operands), output)


def _differentiate(ctx, grads):
    """Differentiate the operator in a graph that keeps it, as ``torch.export`` makes them."""
    wanted = ctx.needs_input_grad
    ctx.needs_input_grad = (False, False, False, False, *wanted[0])
    _, _, _, _, *grads_of_operands = Losses.backward(ctx, *grads)
    ctx.needs_input_grad = wanted
    return grads_of_operands, *(None for _ in wanted[1:])


losses.register_autograd(_differentiate, setup_context=_set_up_context)


@losses_backward.register_fake
def _(grad_total, grad_tsr, grad_csa, positions, operands, saved, wanted, *flat):
    if grad_total is None and grad_csa is None:
        position_grad = Saved(*saved).position_grad
        return expanded_grads(Config.from_flat(flat), wanted, position_grad, operands)
    return [torch.empty_like(s) for s, w in zip(operands, wanted, strict=True) if w]
