"""The shapes that the compiled operators return, for compilers and fake tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from repmtl_kernels._ground.record import empty_results
from repmtl_kernels._ground.saliency import accumulation_dtype
from repmtl_kernels.backends.native.files import NAMESPACES


def _statistics(
    saliencies: Sequence[Tensor], positions: bool, channels: bool, mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    first = saliencies[0]
    dtype = accumulation_dtype(first.dtype)
    pair = (len(saliencies), first.shape[0])
    shapes = (
        (*pair, first.shape[2:].numel()) if positions else (0,),
        (*pair, first.shape[1]) if channels else (0,),
        pair if channels else (0,),
    )
    return tuple(first.new_empty(shape, dtype=dtype) for shape in shapes)


def _affinity(saliencies: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    tasks, batch = len(saliencies), saliencies[0].shape[0]
    return saliencies[0].new_empty(batch, tasks, tasks, dtype=torch.float64)


def _entropy(
    x: Tensor, over_tasks: bool, softmax: bool, temperature: float, eps: float, with_grad: bool
) -> tuple[Tensor, ...]:
    return x.new_empty(()), torch.empty_like(x) if with_grad else x.new_empty(0)


def _unit_anchors(a: Tensor, eps: float, with_grad: bool) -> tuple[Tensor, ...]:
    radial = torch.empty_like(a) if with_grad else a.new_empty(0)
    return torch.empty_like(a), a.new_empty(a.shape[1]), radial


def _log_sum_exp(
    dots: Tensor, first: int, temperature: float, columns: Tensor | None
) -> tuple[Tensor, ...]:
    samples = dots.shape[1]
    return dots.new_empty(samples), dots.new_empty(2, samples)


def _no_result(*arguments: object) -> None:
    """Stand in for an operator that writes one of its arguments and returns nothing."""


def _small_gram(
    saliencies: Sequence[Tensor],
    scale: Tensor,
    anchors: Tensor,
    with_grad: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    tasks, batch = scale.shape
    positions = saliencies[0].shape[2:].numel()
    pair = (torch.empty_like(scale), torch.empty_like(scale))
    if not with_grad:
        return *pair, scale.new_empty(0), scale.new_empty(0)
    projection = scale.new_empty(tasks, batch, tasks, positions)
    return *pair, projection, scale.new_empty(tasks, batch, positions, positions)


def _gram(
    saliencies: Sequence[Tensor],
    scale: Tensor,
    anchors: Tensor,
    eps: float,
    with_grad: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    first = saliencies[0]
    tasks, batch = scale.shape
    side = torch.sym_min(first.shape[1], first.shape[2:].numel())
    similarities = tuple(torch.empty_like(scale) for _ in range(3))
    if not with_grad:
        return *similarities, scale.new_empty(0), first.new_empty(0)
    projection = scale.new_empty(tasks, batch, tasks, side)
    return *similarities, projection, first.new_empty(tasks, batch, side, side)


def _losses(
    saliencies: Sequence[Tensor],
    present: Tensor | None,
    mask: Tensor | None,
    tsr: bool,
    csa: bool,
    over_tasks: bool,
    softmax: bool,
    tsr_temperature: float,
    tsr_floor: float,
    csa_temperature: float,
    eps: float,
    with_grad: bool,
) -> list[Tensor]:
    return empty_results(saliencies, total=False, tsr=tsr, csa=csa, with_grad=with_grad)[1:]


Fake = Callable[..., object]

BOTH: dict[str, Fake] = {
    "statistics": _statistics,
    "affinity": _affinity,
    "entropy": _entropy,
    "unit_anchors": _unit_anchors,
    "log_sum_exp": _log_sum_exp,
    "weigh_dots": _no_result,
    "through_normalisation": _no_result,
}
FAKES: dict[str, dict[str, Fake]] = {
    "cpu": BOTH
    | {"small_gram": _small_gram, "add_outer": _no_result, "small_gradient": _no_result},
    "cuda": BOTH
    | {
        "gram": _gram,
        "saliency_grad": _no_result,
        "losses": _losses,
        "losses_backward": _no_result,
    },
}


@functools.cache
def register(library: str) -> None:
    """Tell PyTorch the shapes of a loaded library's results."""
    for name, function in FAKES[library].items():
        register_fake(f"{NAMESPACES[library]}::{name}", function)
