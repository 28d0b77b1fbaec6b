"""The backward pass: the closed-form gradients of both losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels._ground.record import Saved
from repmtl_kernels._ground.saliency import (
    canonical_mask,
    canonical_tasks,
    positions_to_saliency,
    without_autocast,
)
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.forward import fused_operators
from repmtl_kernels._losses.options import Lambdas
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import (
    Anchors,
    CSAGradient,
    Gram,
    LossGradient,
    Stages,
    TSRGradient,
)

# A backward that makes the Gram matrices again does so for a few samples at a time. Their matrices
# have at most this many elements, unless one sample has more: enough work to fill a GPU.
RECOMPUTE_BLOCK = 1 << 23


def run_backward(
    config: Config,
    wanted: Sequence[bool],
    grad_total: Tensor | None,
    grad_tsr: Tensor | None,
    grad_csa: Tensor | None,
    positions: Tensor | None,
    operands: Sequence[Tensor],
    saved: Saved,
) -> list[Tensor]:
    """Return the gradients of the wanted operands."""
    stages = choice.load(config.backend)
    tasks = canonical_tasks(operands, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    lambdas = config.lambdas or Lambdas()
    tsr = csa = None
    if (of_tsr := _loss_gradient(grad_tsr, grad_total, lambdas.tsr)) is not None:
        tsr = TSRGradient(saved.position_grad, of_tsr)
    if (of_csa := _loss_gradient(grad_csa, grad_total, lambdas.csa)) is not None:
        csa = csa_gradient(of_csa, saved)
    if csa is None:
        assert tsr is not None
        position_grad = tsr.of_channel(tasks[0].shape[1], mask)
        return expanded_grads(config, wanted, position_grad, operands)
    grads = [torch.empty_like(s) if w else None for s, w in zip(operands, wanted, strict=True)]
    outputs = canonical_tasks(grads, config.stacked, config.channel_dim)
    with without_autocast(operands[0].device):
        if (operators := fused_operators(stages, config, tasks)) is not None:
            _run_fused(operators, csa.of_loss, tsr, mask, tasks, outputs, saved)
        elif config.csa is not None and config.csa.recompute:
            _recompute(stages, config.csa.eps, tasks, outputs, csa, tsr, mask)
        else:
            stages.saliency_grad(tasks, outputs, csa, tsr, mask=mask)
    return [g for g in grads if g is not None]


def _loss_gradient(
    grad: Tensor | None, grad_total: Tensor | None, weight: float
) -> LossGradient | None:
    """Return the gradient of one loss, which has this weight in the total."""
    if grad_total is None:
        return None if grad is None else LossGradient(grad.resolve_neg(), 1.0)
    if grad is None:
        return LossGradient(grad_total.resolve_neg(), weight)
    return LossGradient(grad + weight * grad_total, 1.0)


def _run_fused(
    operators: ModuleType,
    of_csa: LossGradient,
    tsr: TSRGradient | None,
    mask: Tensor | None,
    tasks: list[Tensor],
    outputs: list[Tensor | None],
    saved: Saved,
) -> None:
    position_grad = None if tsr is None else tsr.of_channel(tasks[0].shape[1], mask)
    numbers = [t for t, output in enumerate(outputs) if output is not None]
    wanted = [outputs[t] for t in numbers]
    operators.losses_backward(
        of_csa.product(), position_grad, mask, tasks, wanted, numbers, list(saved)
    )


def _recompute(
    stages: Stages,
    eps: float,
    tasks: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    tsr: TSRGradient | None,
    mask: Tensor | None,
) -> None:
    """Make the Gram matrices of a few samples again and write their gradient, block by block.

    Blocks of samples, not of tasks: the gradient of an anchor is a sum over the tasks.
    """
    step = samples_at_a_time(tasks[0].shape, len(tasks))
    csa = csa._replace(gram=csa.gram._replace(projection=None, matrix=None))  # empty tensors
    for first in range(0, len(tasks[0]), step):
        samples = slice(first, first + step)
        part = csa.of_samples(samples)
        saliencies = [s[samples] for s in tasks]
        mask_part = None if mask is None else mask[samples]
        made = stages.gram(
            saliencies, part.scale, part.anchors.unit, eps=eps, with_grad=True, mask=mask_part
        )
        gram = part.gram._replace(projection=made.projection, matrix=made.matrix)
        stages.saliency_grad(
            saliencies,
            [None if output is None else output[samples] for output in outputs],
            part._replace(gram=gram),
            None if tsr is None else tsr.of_samples(samples),
            mask=mask_part,
        )


def samples_at_a_time(shape: Sequence[int], tasks: int) -> int:
    """Return how many samples' Gram matrices are made together; ``shape`` is (B, C, *spatial)."""
    side = min(shape[1], math.prod(shape[2:]))
    return max(1, RECOMPUTE_BLOCK // (tasks * side * side))


def csa_gradient(of_csa: LossGradient, saved: Saved) -> CSAGradient:
    """Return what the last stage needs of CSA, from the incoming gradient and the forward."""
    return CSAGradient(
        scale=saved.scale,
        anchors=Anchors(saved.anchors, saved.factor, saved.radial),
        contrast_grad=saved.contrast_grad,
        gram=Gram(saved.similarity, saved.inverse, saved.slope, saved.projection, saved.matrix),
        weight=saved.weight,
        of_loss=of_csa,
    )


def expanded_grads(
    config: Config, wanted: Sequence[bool], position_grad: Tensor, operands: Sequence[Tensor]
) -> list[Tensor]:
    """Return TSR's gradient of the wanted operands, expanded along the channels.

    It is constant there, so this is a view with stride 0: nothing of size C is written.
    """
    per_operand = [position_grad] if config.stacked else position_grad.unbind(0)
    return [
        positions_to_saliency(g.to(s.dtype, copy=True), s, config.channel_dim)
        for g, s, w in zip(per_operand, operands, wanted, strict=True)
        if w
    ]
