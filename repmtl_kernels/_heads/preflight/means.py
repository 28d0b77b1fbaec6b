"""Saliencies without means, which TSR and CSA see nothing of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class NoMeans(NamedTuple):
    """A warning: the saliency of a head that can be trained has no means over an axis."""

    axis: str
    made_of_them: str
    norm: str
    option: str

    def __str__(self) -> str:
        return (
            f"the saliency's means over the {self.axis} are zero but for rounding: "
            f"{self.made_of_them} would leave this task out, or be noise where all tasks are like "
            f"it. This happens where a head begins with {self.norm}, or with another operation "
            f"that takes out what its {self.axis} have in common. Move that operation into the "
            "encoder and pass its result to the criterion as the representation; or set "
            f"{self.option}=0"
        )


OVER_CHANNELS = NoMeans("channels", "TSR", "a LayerNorm", "lambda_tsr")
OVER_POSITIONS = NoMeans("positions", "CSA's anchors", "an InstanceNorm", "lambda_csa")


def without_means(saliency: Tensor, channel_dim: int) -> Iterator[NoMeans]:
    """Yield a warning for each axis whose means are only rounding; waits for the device."""
    s = saliency.movedim(channel_dim, 1).double()
    s = s.flatten(2) if s.ndim > 2 else s.unsqueeze(2)
    rounding = min(256 * torch.finfo(saliency.dtype).eps, 0.03)
    for axis, no_means in ((1, OVER_CHANNELS), (2, OVER_POSITIONS)):
        # Their size over that of the means of as many independent elements.
        size = s.mean(axis).norm() * s.shape[axis] / s.norm()
        if s.shape[axis] > 1 and size < rounding:
            yield no_means
