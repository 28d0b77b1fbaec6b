"""Figures of saliencies and of a summary, drawn by matplotlib (extra ``plot``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repmtl_kernels._monitor import map_grid
from repmtl_kernels._monitor.colours import DIVERGING, LINES, MISSING
from repmtl_kernels._monitor.names import names_of
from repmtl_kernels._monitor.numbers import plain
from repmtl_kernels._monitor.plot_arguments import (
    check_saliency,
    checked_images,
    checked_matrix,
    need_matplotlib,
)
from repmtl_kernels._monitor.summary import SaliencySummary, check_observed

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.85  # inches
FAINTEST = 0.1  # no smaller value gets the full colour: noise would look like a finding
SHOWN = 10  # lines of pairs in a history
DASHES = ("-", "--", ":")
DIAGONAL = "#ececea"


def plot_affinity(
    affinity: SaliencySummary | Tensor,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Return a figure of how much each two tasks pull the same way.

    Blue cells help each other and orange ones conflict. The colours are symmetric about 0, and
    full at the largest absolute value beside the diagonal (of cosines 0.1 at least). NaN is grey,
    "not seen". The diagonal, a task with itself, has no colour.

    Args:
        affinity: a summary, of which the cosines are drawn, or a matrix ``(T, T)`` of similarities,
            such as a mean of :func:`saliency_affinity` over the samples.
        names: T names of the tasks, for a matrix. None: their numbers.
        title: text above the figure. None: none.

    Returns:
        A :class:`matplotlib.figure.Figure`, which pyplot does not know; ``savefig`` writes it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: an argument is not as described.
    """
    need_matplotlib("plot_affinity")
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if isinstance(affinity, SaliencySummary):
        if names is not None:
            raise ValueError(
                f"names: expected None with a summary, which has its own; got {list(names)}"
            )
        check_observed(affinity)
        matrix, tasks = affinity.cosine, affinity.tasks
        label, least = "cosine of the tasks' gradients", FAINTEST
    else:
        matrix = checked_matrix(affinity)
        tasks, label, least = names_of(len(matrix), names), "similarity", 0.0
    beside = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), 0).nan_to_num(0)
    limit = max(beside.abs().max().item(), least) or 1.0
    form = (2, "f") if 0.1 <= limit < 1000 else (1, "e")
    colours = LinearSegmentedColormap.from_list("repmtl", DIVERGING).with_extremes(bad=MISSING)
    side = max(2.2, CELL * len(tasks))
    figure = Figure(figsize=(side + 2.4, side + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix.numpy(), cmap=colours, vmin=-limit, vmax=limit)
    for t, u in itertools.product(range(len(tasks)), repeat=2):
        value = matrix[t, u].item()
        text, ink = plain(value, *form), _ink(colours((value / limit + 1) / 2))
        if t == u:
            axes.add_patch(Rectangle((t - 0.5, t - 0.5), 1, 1, facecolor=DIAGONAL))
            ink = "#6a6f76"
        axes.text(u, t, text, ha="center", va="center", color=ink, fontsize=10)
    axes.set_xticks(
        range(len(tasks)), tasks, parse_math=False, rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(tasks)), tasks, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.outline.set_visible(False)
    bar.set_label(f"{label}\nconflict  \N{LEFTWARDS ARROW} 0 \N{RIGHTWARDS ARROW}  help")
    if title is not None:
        axes.set_title(title, loc="left", parse_math=False)
    return figure


def plot_saliency(
    images: Tensor,
    saliencies: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Return a figure of where each task's saliency lies, over the images, all tasks side by side.

    A map is ``|S|``, the mean over channels, upsampled to the image and divided by its largest
    value. Bright is where a change of the representation changes the task's loss most.

    Args:
        images: ``(n, C, H, W)``, C is 1 or 3; uint8, or floats from 0 to 1.
        saliencies: those of T tasks ``(n, C', H', W')``: a dict by the tasks' names, a sequence, or
            one tensor ``(T, n, C', H', W')``. :func:`task_saliencies` returns them.
        names: T names of the tasks, unless ``saliencies`` is a dict. None: their numbers.
        title: text below the figure.

    Returns:
        As :func:`plot_affinity`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError, TypeError: an argument is not as described.
    """
    need_matplotlib("plot_saliency")
    if isinstance(saliencies, Mapping):
        if names is not None:
            raise ValueError(
                f"names: expected None with a dict, which has its own; got {list(names)}"
            )
        names, saliencies = [str(key) for key in saliencies], list(saliencies.values())
    tasks = list(saliencies)
    if not tasks:
        raise ValueError("saliencies: expected those of at least one task, got none")
    names = names_of(len(tasks), names)
    shown = checked_images(images)
    size = (shown.shape[2], shown.shape[3])
    groups = {}
    for name, saliency in zip(names, tasks, strict=True):
        check_saliency(name, saliency, len(shown))
        groups[name] = [map_grid.Column("", map_grid.relative_maps(saliency, size))]
    return map_grid.draw(shown, groups, images_are="image", caption=title, over=True)


def plot_history(summary: SaliencySummary, *, title: str | None = None) -> Figure:
    """Return a figure of a summary's history over the training steps.

    Its panels have the cosine of each pair of tasks, each task's share of the length of all
    gradients, the tasks' terms of TSR and CSA, and the regulariser's ratio if it was measured. It
    has the ten pairs with the largest absolute cosine, if there are more. A gap is an observation
    without a value.

    Args:
        summary: what :meth:`SaliencyMonitor.summary` returns.
        title: text above the figure. None: none.

    Returns:
        As :func:`plot_affinity`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: the argument is not a summary.
        ValueError: nothing has been observed.
    """
    need_matplotlib("plot_history")
    from matplotlib.figure import Figure

    check_observed(summary)
    history, tasks = summary.history, summary.tasks
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    pairs.sort(key=lambda pair: -summary.cosine[pair].abs().nan_to_num(0).item())
    drawn = {f"{tasks[t]}, {tasks[u]}": history.cosine[:, t, u] for t, u in pairs[:SHOWN]}
    panels = [
        ("share of the length", dict(zip(tasks, history.norm_share.T, strict=True))),
        ("term of TSR, nats", dict(zip(tasks, history.tsr.T, strict=True))),
        ("similarity in CSA", dict(zip(tasks, history.csa.T, strict=True))),
    ]
    if drawn:
        more = f", {SHOWN} of {len(pairs)} pairs" if len(pairs) > SHOWN else ""
        panels.insert(0, (f"cosine{more}", drawn))
    if not history.ratio.isnan().all():
        panels.append(("regulariser's gradient\nover that of the tasks", {"": history.ratio}))
    figure = Figure(figsize=(8, 0.5 + 1.9 * len(panels)), layout="constrained")
    steps = history.steps.numpy()
    for axes, (label, lines) in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        _lines(axes, steps, lines)
        axes.set_ylabel(label)
        if label.startswith("cosine"):
            axes.axhline(0, color="#808080", linewidth=0.8, zorder=0)
    axes.set_xlabel("training call")
    if title is not None:
        figure.suptitle(title, x=0, ha="left", parse_math=False)
    return figure


def _lines(axes: Axes, steps: np.ndarray, lines: Mapping[str, Tensor]) -> None:
    for k, values in enumerate(lines.values()):
        axes.plot(
            steps, values.numpy(), color=LINES[k % len(LINES)], linewidth=1.5,
            linestyle=DASHES[k // len(LINES) % len(DASHES)], marker=".", markersize=3,
        )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    if list(lines) != [""]:
        legend = axes.legend(
            axes.get_lines(), map(str, range(len(lines))), loc="center left",
            bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9,
        )  # fmt: skip
        # A legend leaves out labels that begin with an underscore, and reads $ as mathematics.
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=name, parse_math=False)


def _ink(colour: Iterable[float]) -> str:
    """Return black or white, whichever has more contrast on this colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"
