"""The arguments of the figures, checked."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def need_matplotlib(function: str) -> None:
    """Raise if matplotlib is not installed; name the function and the extra."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f"{function} needs matplotlib, which is not installed: "
            "pip install 'repmtl-kernels[plot]'",
            name="matplotlib",
        )


def checked_matrix(affinity: Tensor) -> Tensor:
    """Return a matrix ``(T, T)`` as float64 on the CPU."""
    if not isinstance(affinity, Tensor):
        raise TypeError(
            "affinity: expected a SaliencySummary or a Tensor (T, T), got "
            f"{type(affinity).__name__}"
        )
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or not affinity.numel():
        raise ValueError(
            f"affinity: expected a matrix (T, T), got a Tensor of shape {tuple(affinity.shape)}. "
            "Average saliency_affinity over the samples first"
        )
    matrix = affinity.detach().cpu().double()
    if matrix.isinf().any():
        raise ValueError("affinity: expected finite values or NaN, got an infinite one")
    return matrix


def checked_images(images: Tensor) -> Tensor:
    """Return the images on the CPU as floats from 0 to 1."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a Tensor (n, C, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            "images: expected shape (n, C, H, W), at least one image, C is 1 or 3; got "
            f"{tuple(images.shape)}"
        )
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floats, got {images.dtype}")
    images = images.float()
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(
            f"images: expected floats from 0 to 1, got {low:.3g} to {high:.3g}. Undo the "
            "normalisation of the inputs"
        )
    return images


def check_saliency(name: str, saliency: Tensor, images: int) -> None:
    """Raise if this is not a saliency ``(n, C, H, W)`` of n images."""
    if not isinstance(saliency, Tensor):
        raise TypeError(
            f"saliencies[{name!r}]: expected a Tensor (n, C, H, W), got {type(saliency).__name__}"
        )
    if saliency.ndim != 4 or len(saliency) != images or not saliency.numel():
        raise ValueError(
            f"saliencies[{name!r}]: expected shape ({images}, C, H, W), a saliency for each image; "
            f"got {tuple(saliency.shape)}"
        )
