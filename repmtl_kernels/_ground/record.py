"""The tensors that a forward pass of the losses keeps for its backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import accumulation_dtype


class Saved(NamedTuple):
    """The tensors that the backward needs, contiguous; empty if the loss was not asked for.

    If the Gram matrices are made again, projection and matrix are empty too.
    """

    position_grad: Tensor  # (T, B, N): d tsr / d x
    scale: Tensor
    anchors: Tensor
    factor: Tensor
    radial: Tensor
    contrast_grad: Tensor
    weight: Tensor  # (T, B): d csa / d s
    similarity: Tensor
    inverse: Tensor
    slope: Tensor
    projection: Tensor
    matrix: Tensor


def empty_results(
    saliencies: Sequence[Tensor],
    *,
    total: bool,
    tsr: bool,
    csa: bool,
    with_grad: bool,
    recompute: bool = False,
) -> list[Tensor]:
    """Return ``total, tsr, csa, *saved`` of these saliencies: shapes and dtypes, but no values."""
    first = saliencies[0]
    tasks, batch, channels = len(saliencies), *first.shape[:2]
    positions = math.prod(first.shape[2:])  # Size.numel() makes a dynamic size constant
    side = torch.sym_min(channels, positions)
    shapes: dict[str, tuple[int, ...]] = {}
    if total:
        shapes["total"] = ()
    if tsr:
        shapes["tsr"] = ()
        if with_grad:
            shapes["position_grad"] = (tasks, batch, positions)
    if csa:
        shapes["csa"] = ()
        if with_grad:
            pair, anchor = (tasks, batch), (tasks, batch, channels)
            for name in ("anchors", "radial", "contrast_grad"):
                shapes[name] = anchor
            for name in ("scale", "weight", "similarity", "inverse", "slope"):
                shapes[name] = pair
            shapes["factor"] = (batch,)
            if not recompute:
                shapes["projection"] = (tasks, batch, tasks, side)
                shapes["matrix"] = (tasks, batch, side, side)
    statistics = accumulation_dtype(first.dtype)
    return [
        first.new_empty(
            shapes.get(name, (0,)),
            dtype=statistics if name in shapes and name != "matrix" else first.dtype,
        )
        for name in ("total", "tsr", "csa", *Saved._fields)
    ]
