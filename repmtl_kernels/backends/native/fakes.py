"""Shapes of what the compiled operators return, for compilers and fake tensors."""

from __future__ import annotations

import functools

import torch
from torch.library import register_fake

from repmtl_kernels._ground.saliency import accumulation_dtype


def _statistics(saliencies, positions, channels, mask=None):
    first = saliencies[0]
    dtype = accumulation_dtype(first.dtype)
    pair = (len(saliencies), first.shape[0])
    shapes = (
        (*pair, first.shape[2:].numel()) if positions else (0,),
        (*pair, first.shape[1]) if channels else (0,),
        pair if channels else (0,),
    )
    return tuple(first.new_empty(shape, dtype=dtype) for shape in shapes)


def _entropy(x, over_tasks, softmax, temperature, eps, with_grad):
    return x.new_empty(()), torch.empty_like(x) if with_grad else x.new_empty(0)


def _unit_anchors(a, eps, with_grad):
    radial = torch.empty_like(a) if with_grad else a.new_empty(0)
    return torch.empty_like(a), a.new_empty(a.shape[1]), radial


def _log_sum_exp(dots, first, temperature, columns):
    samples = dots.shape[1]
    return dots.new_empty(samples), dots.new_empty(2, samples)


def _nothing(*arguments):
    """Of operators that write one of their arguments."""


def _small_gram(saliencies, scale, anchors, with_grad, mask=None):
    tasks, batch = scale.shape
    positions = saliencies[0].shape[2:].numel()
    last = (
        ((tasks, batch, tasks, positions), (tasks, batch, positions, positions))
        if with_grad
        else ((0,), (0,))
    )
    shapes = (scale.shape, scale.shape, *last)
    return tuple(scale.new_empty(shape) for shape in shapes)


def _gram(saliencies, scale, anchors, eps, with_grad, mask=None):
    first = saliencies[0]
    tasks, batch = scale.shape
    side = torch.sym_min(first.shape[1], first.shape[2:].numel())
    pair = tuple(torch.empty_like(scale) for _ in range(3))
    if not with_grad:
        return *pair, scale.new_empty(0), first.new_empty(0)
    projection = scale.new_empty(tasks, batch, tasks, side)
    return *pair, projection, first.new_empty(tasks, batch, side, side)


def _losses(
    saliencies, present, mask, tsr, csa, over_tasks, softmax, tsr_temperature, tsr_floor,
    csa_temperature, eps, with_grad,
):  # fmt: skip
    from repmtl_kernels._ground.record import empty_results

    return empty_results(saliencies, tsr=tsr, csa=csa, with_grad=with_grad)


BOTH = {
    "statistics": _statistics,
    "entropy": _entropy,
    "unit_anchors": _unit_anchors,
    "log_sum_exp": _log_sum_exp,
    "weigh_dots": _nothing,
    "through_normalisation": _nothing,
}
FAKES = {
    "repmtl_native": BOTH
    | {"small_gram": _small_gram, "add_outer": _nothing, "small_gradient": _nothing},
    "repmtl_cuda": BOTH
    | {
        "gram": _gram,
        "saliency_grad": _nothing,
        "losses": _losses,
        "losses_backward": _nothing,
    },
}


@functools.cache
def register(library: str) -> None:
    """For the operators of a loaded library."""
    namespace = "repmtl_cuda" if library == "cuda" else "repmtl_native"
    for name, function in FAKES[namespace].items():
        register_fake(f"{namespace}::{name}", function)
