"""Maps beside their images, task by task: the drawing that ``plot_saliency`` and studies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from repmtl_kernels._monitor.colours import MISSING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: an image, the space beside it and between groups, a line of text.
CELL, GAP, GROUP_GAP = 1.5, 0.04, 0.12
BIG_TEXT, SMALL_TEXT = 0.22, 0.14
COVER = 0.62  # of an image by a map that lies over it


class Column(NamedTuple):
    """The maps ``(n, H, W)`` of all images, from 0 to 1, and what stands above them."""

    heading: str
    maps: Tensor


def relative_maps(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``(n, H, W)`` maps of this size, of a saliency ``(n, C, H', W')``.

    A map is the mean of the absolute values over the channels, upsampled, and divided by its
    largest value. A saliency that is 0 everywhere has a map of zeros.
    """
    mean = saliency.detach().abs().mean(1, keepdim=True)
    if mean.dtype != torch.float64:
        mean = mean.float()
    up = interpolate(mean, size, mode="bilinear", align_corners=False).squeeze(1).cpu()
    largest = up.amax((1, 2), keepdim=True)
    return torch.where(largest == 0, up, up / largest)


def draw(
    images: Tensor,
    groups: Mapping[str, Sequence[Column]],
    *,
    images_are: str,
    caption: str = "",
    over: bool = False,
) -> Figure:
    """Return the images ``(n, C, H, W)``, C is 1 or 3, and beside each its maps, group by group.

    Args:
        images: on the CPU; uint8, or floats as ``imshow`` takes them.
        groups: by the name above it, its columns.
        images_are: what stands above the images.
        caption: text below all.
        over: draw each map over its image, in grey, and not on black.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps["magma"].with_extremes(bad=MISSING)
    lines = max(column.heading.count("\n") + 1 for group in groups.values() for column in group)
    has_headings = any(column.heading for group in groups.values() for column in group)
    top = BIG_TEXT + SMALL_TEXT * lines * has_headings
    bottom = SMALL_TEXT * (caption.count("\n") + 2) if caption else 0.0
    count, _, *size = images.shape
    row_height = CELL * size[0] / size[1] + GAP
    columns = sum(len(group) for group in groups.values())
    width = CELL + columns * (CELL + GAP) + len(groups) * GROUP_GAP
    height = top + count * row_height + bottom
    drawn = Figure(figsize=(width, height))

    def show(row: int, left: float, *layers: tuple[Tensor, dict]) -> None:
        up = bottom + (count - 1 - row) * row_height + GAP
        place = left / width, up / height, CELL / width, (row_height - GAP) / height
        axes = drawn.add_axes(place)
        for layer, how in layers:
            axes.imshow(layer.numpy(), **how)
        axes.axis("off")

    def write(text: str, left: float, up: float, **how: Any) -> None:
        options: dict[str, Any] = {"va": "bottom", "fontsize": 8, "parse_math": False, **how}
        drawn.text(left / width, up / height, text, **options)

    shown = [image.movedim(0, -1).squeeze(-1) for image in images]
    for row, image in enumerate(shown):
        show(row, 0, (image, {"cmap": "gray"}))
    write(images_are, CELL / 2, height - top, ha="center", fontsize=9)
    left = CELL + GROUP_GAP
    for name, group in groups.items():
        middle = left + (len(group) * (CELL + GAP) - GAP) / 2
        write(name, middle, height - BIG_TEXT, ha="center", fontsize=10, weight="bold")
        for column in group:
            write(column.heading, left + CELL / 2, height - top, ha="center")
            for row, one in enumerate(column.maps):
                layer = (one, {"cmap": colours, "vmin": 0, "vmax": 1})
                if over:
                    below = (_grey(shown[row]), {"cmap": "gray"})
                    show(row, left, below, (one, layer[1] | {"alpha": COVER}))
                else:
                    show(row, left, layer)
            left += CELL + GAP
        left += GROUP_GAP
    write(caption, 0, SMALL_TEXT / 2)
    return drawn


def _grey(image: Tensor) -> Tensor:
    return image.float().mean(-1) if image.ndim == 3 else image
