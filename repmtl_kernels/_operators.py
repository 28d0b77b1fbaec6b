"""The registered operators ``repmtl::losses`` and ``repmtl::losses_backward``, for compilers.

Eager calls go to the ``autograd.Function`` directly, which costs less per call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_kernels import _autograd
from repmtl_kernels._autograd import Config, Losses, Saved
from repmtl_kernels._saliency import accumulation_dtype, canonical_tasks

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
    return list(_autograd.forward(Config(*config), operands, present, positions))


@torch.library.custom_op(
    "repmtl::losses_backward",
    mutates_args=(),
    schema="(Tensor? grad_tsr, Tensor? grad_csa, Tensor? positions, Tensor[] operands, "
    f"Tensor[] saved, bool[] wanted, {_CONFIG}) -> Tensor[]",
)
def losses_backward(grad_tsr, grad_csa, positions, operands, saved, wanted, *config):
    """The gradients of the wanted operands."""
    given = grad_tsr, grad_csa, positions, operands, Saved(*saved)
    return _autograd.backward(Config(*config), wanted, *given)


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


def empty_results(
    saliencies: Sequence[Tensor], *, tsr: bool, csa: bool, with_grad: bool, recompute: bool = False
) -> list[Tensor]:
    """``tsr, csa, *saved`` of these saliencies, without their values."""
    tasks, batch, channels = len(saliencies), *saliencies[0].shape[:2]
    positions = math.prod(saliencies[0].shape[2:])  # Size.numel() makes a dynamic size constant
    side = torch.sym_min(channels, positions)
    shapes = {}
    if tsr:
        shapes["tsr"] = ()
        if with_grad:
            shapes["position_grad"] = (tasks, batch, positions)
    if csa:
        shapes["csa"] = ()
        if with_grad:
            pair, anchor = (tasks, batch), (tasks, batch, channels)
            shapes |= dict.fromkeys(("anchors", "pull", "contrast_grad"), anchor)
            shapes |= dict.fromkeys(("scale", "weight", "similarity", "inverse", "slope"), pair)
            shapes["factor"] = (batch,)
            if not recompute:
                shapes["projection"] = (tasks, batch, tasks, side)
                shapes["matrix"] = (tasks, batch, side, side)
    first = saliencies[0]
    statistics = accumulation_dtype(first.dtype)
    return [
        first.new_empty(
            shapes.get(name, (0,)),
            dtype=statistics if name in shapes and name != "matrix" else first.dtype,
        )
        for name in ("tsr", "csa", *Saved._fields)
    ]


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
        return _autograd.expanded_grads(Config(*config), wanted, position_grad, operands)
    return [torch.empty_like(s) for s, w in zip(operands, wanted, strict=True) if w]
