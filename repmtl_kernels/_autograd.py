"""The one differentiable function of the package: stages in order, closed-form gradient.

``evaluate`` is the way in. In eager mode it runs :class:`Losses`, an ``autograd.Function``; under a
compiler it calls the registered operators ``repmtl::losses`` and ``repmtl::losses_backward``, which
share its forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels import backends
from repmtl_kernels._saliency import (
    accumulation_dtype,
    canonical,
    canonical_tasks,
    positions_to_saliency,
)
from repmtl_kernels.backends import Contrast, CSAGradient, Gram


class Config(NamedTuple):
    """Everything about one evaluation but the tensors."""

    backend: str  # resolved, not "auto"
    tsr: bool
    csa: bool
    stacked: bool
    channel_dim: int
    over: str
    normalizer: str
    tsr_temperature: float
    csa_temperature: float
    eps: float
    with_grad: bool


class Values(NamedTuple):
    """What the forward returns: the losses, then what the backward needs (empty where unused)."""

    tsr: Tensor
    csa: Tensor
    position_grad: Tensor  # (T, B, N): d tsr / d x
    scale: Tensor
    anchors: Tensor
    factor: Tensor
    pull: Tensor
    contrast_grad: Tensor
    weight: Tensor  # (T, B): d csa / d s
    similarity: Tensor
    inverse: Tensor
    slope: Tensor
    projection: Tensor
    matrix: Tensor


NO_SECOND_DERIVATIVE = (
    "repmtl_kernels: a second derivative of tsr_loss, csa_loss or rep_mtl_loss was asked for; the "
    "{backend!r} backend has hand-written first derivatives only. Use backend='reference' "
    "(repmtl_kernels.reference), which supports double backward."
)


def evaluate(config: Config, operands: Sequence[Tensor], present: Tensor | None) -> Values:
    if torch.compiler.is_compiling():
        return Values(*torch.ops.repmtl.losses(list(operands), present, *config))
    return Values(*Losses.apply(config, present, *operands))


def _forward(config: Config, operands: Sequence[Tensor], present: Tensor | None) -> Values:
    stages = backends.load(config.backend)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    statistics = stages.statistics(saliencies, positions=config.tsr, channels=config.csa)
    # One tensor each: operators may not return the same tensor twice.
    values = {name: operands[0].new_empty(0) for name in Values._fields}
    if config.tsr:
        entropy = stages.entropy(
            statistics.positions,
            over=config.over,
            normalizer=config.normalizer,
            temperature=config.tsr_temperature,
            eps=config.eps,
            with_grad=config.with_grad,
        )
        values["tsr"] = entropy.value
        if config.with_grad:
            values["position_grad"] = entropy.grad
    if config.csa:
        contrast = stages.contrast(
            statistics.channels,
            temperature=config.csa_temperature,
            eps=config.eps,
            with_grad=config.with_grad,
        )
        gram = stages.gram(
            saliencies,
            statistics.scale,
            contrast.anchors,
            eps=config.eps,
            with_grad=config.with_grad,
        )
        weight = _positive_weight(gram.similarity, present, config.csa_temperature)
        positive = (weight * gram.similarity).sum()
        values["csa"] = contrast.logsumexp.mean() + positive
        if config.with_grad:
            values.update(
                scale=statistics.scale,
                anchors=contrast.anchors,
                factor=contrast.factor,
                pull=contrast.pull,
                contrast_grad=contrast.grad,
                weight=weight,
                similarity=gram.similarity,
                inverse=gram.inverse,
                slope=gram.slope,
                projection=gram.projection,
                matrix=gram.matrix,
            )
    return Values(**values)


def _positive_weight(similarity: Tensor, present: Tensor | None, temperature: float) -> Tensor:
    """d csa / d s (T, B): minus the mean over the (present) tasks and the batch, over temperature."""
    tasks, batch = similarity.shape
    if present is None:
        return torch.full_like(similarity, -1 / (tasks * batch * temperature))
    share = present / present.sum(0).clamp_min(1)
    return share.to(similarity.dtype) * (-1 / (batch * temperature))


def _backward(
    config: Config,
    wanted: Sequence[bool],
    grad_tsr: Tensor | None,
    grad_csa: Tensor | None,
    operands: Sequence[Tensor],
    values: Values,
) -> list[Tensor | None]:
    """The gradients of the wanted operands; None for the others."""
    position_grad = None
    if grad_tsr is not None:
        channels = canonical_tasks(operands, config.stacked, config.channel_dim)[0].shape[1]
        position_grad = values.position_grad * (grad_tsr / channels)
    if grad_csa is None:
        return _expanded_grads(config, wanted, position_grad, operands)
    ds = 2 * grad_csa * values.weight
    rank = ds * values.inverse
    csa = CSAGradient(
        scale=values.scale,
        contrast=Contrast(values.anchors, values.factor, None, values.pull, values.contrast_grad),
        gram=Gram(
            values.similarity, values.inverse, values.slope, values.projection, values.matrix
        ),
        rank=rank,
        curl=rank * values.slope,
        tug=(ds * values.similarity).sum(0),
        negatives=grad_csa,
    )
    grads = [torch.empty_like(s) if w else None for s, w in zip(operands, wanted, strict=True)]
    if config.stacked:
        outputs = canonical_tasks(grads, True, config.channel_dim)
    else:
        outputs = [g if g is None else canonical(g, config.channel_dim) for g in grads]
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    backends.load(config.backend).saliency_grad(saliencies, outputs, csa, position_grad)
    return grads


def _expanded_grads(
    config: Config,
    wanted: Sequence[bool],
    position_grad: Tensor,
    operands: Sequence[Tensor],
) -> list[Tensor | None]:
    """TSR's gradient is constant along the channels: a stride-0 view, nothing of size C is written."""
    per_operand = [position_grad] if config.stacked else position_grad.unbind(0)
    return [
        positions_to_saliency(g.to(s.dtype, copy=True), s, config.channel_dim) if w else None
        for g, s, w in zip(per_operand, operands, wanted, strict=True)
    ]


class Losses(torch.autograd.Function):
    """``(config, present, *operands) -> Values``; only the losses are differentiable."""

    @staticmethod
    def forward(config: Config, present: Tensor | None, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(_forward(config, operands, present))

    @staticmethod
    def setup_context(ctx, inputs, output):
        config, _, *operands = inputs
        ctx.config = config
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*operands, *output[2:])

    @staticmethod
    def backward(ctx, grad_tsr, grad_csa, *_):
        saved = ctx.saved_tensors
        config = ctx.config
        count = len(saved) - len(Values._fields) + 2
        wanted = tuple(ctx.needs_input_grad[2:])
        grads = Gradient.apply(config, wanted, count, grad_tsr, grad_csa, *saved)
        return None, None, *grads


class Gradient(torch.autograd.Function):
    """The backward of :class:`Losses` as a node of its own, so that a second derivative is refused."""

    @staticmethod
    def forward(config, wanted, count, grad_tsr, grad_csa, *saved):
        values = Values(saved[0], saved[0], *saved[count:])
        return tuple(_backward(config, wanted, grad_tsr, grad_csa, saved[:count], values))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[0].backend

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(NO_SECOND_DERIVATIVE.format(backend=ctx.backend))
