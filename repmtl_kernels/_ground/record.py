"""What one evaluation of the losses is told, and what its forward keeps for its backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import accumulation_dtype


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
    tsr_floor: float
    csa_temperature: float
    eps: float
    with_grad: bool
    group: str  # name of the process group whose samples are negatives; empty: this process alone
    recompute: bool  # the Gram matrices in the backward, instead of saving them
    # For the ranks of a group to compare; the losses are multiplied by the caller.
    lambda_tsr: float = 0.0
    lambda_csa: float = 0.0


class Saved(NamedTuple):
    """What the backward needs, contiguous; empty where the loss was not asked for.

    With ``Config.recompute`` projection and matrix are empty too.
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
            shapes |= dict.fromkeys(("anchors", "radial", "contrast_grad"), anchor)
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
