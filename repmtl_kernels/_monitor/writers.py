"""Summaries for TensorBoard and Weights & Biases, through these libraries' own objects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from repmtl_kernels._ground.checks import checked_step
from repmtl_kernels._monitor.plots import plot_affinity, plot_history
from repmtl_kernels._monitor.summary import SaliencySummary, check_observed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter
    from wandb.sdk.wandb_run import Run

TAG = "saliency"


def to_tensorboard(
    summary: SaliencySummary, writer: SummaryWriter, step: int | None = None
) -> None:
    """Write a summary to TensorBoard: a scalar for each pair and task, and two figures.

    The tags are ``saliency/cosine/a - b`` for each pair, also with ``conflicting_samples`` and
    ``conflicting_positions``, ``saliency/norm_share/a`` for each task, also with ``tsr`` and
    ``csa``, and ``saliency/ratio``. The figures are ``saliency/affinity`` and ``saliency/history``.
    A value that was never observed is NaN, and written as that; a ratio that was never measured is
    left out.

    Args:
        summary: what :meth:`SaliencyMonitor.summary` returns.
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        step: the global step. None: the step of the last observation.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing has been observed.
        TypeError: an argument is not as described.
    """
    step = _checked(summary, step)
    if not hasattr(writer, "add_scalar") or not hasattr(writer, "add_figure"):
        raise TypeError(f"writer: expected a SummaryWriter, got {type(writer).__name__}")
    for tag, value in scalars(summary):
        writer.add_scalar(tag, value, step)
    for tag, figure in figures(summary):
        writer.add_figure(tag, figure, step)


def to_wandb(summary: SaliencySummary, run: Run, step: int | None = None) -> None:
    """Log a summary to a run of Weights & Biases, under the names of :func:`to_tensorboard`.

    All values go into one ``run.log``.

    Args:
        summary: what :meth:`SaliencyMonitor.summary` returns.
        run: what ``wandb.init`` returns.
        step: the step of the run, which must not be below those logged before. None: the run's own
            counter, as with ``run.log``.

    Raises:
        ModuleNotFoundError: matplotlib or wandb is not installed.
        ValueError: nothing has been observed.
        TypeError: an argument is not as described.
    """
    checked = _checked(summary, step)
    if not hasattr(run, "log"):
        raise TypeError(f"run: expected a run of wandb.init, got {type(run).__name__}")
    import wandb

    pictures = {tag: wandb.Image(figure) for tag, figure in figures(summary)}
    run.log({**dict(scalars(summary)), **pictures}, step=None if step is None else checked)


def scalars(summary: SaliencySummary) -> Iterator[tuple[str, float]]:
    """Yield tags and values: of each pair, of each task, and the ratio."""
    for field in ("cosine", "conflicting_samples", "conflicting_positions"):
        matrix = getattr(summary, field)
        for (t, first), (u, second) in itertools.combinations(enumerate(summary.tasks), 2):
            yield f"{TAG}/{field}/{first} - {second}", matrix[t, u].item()
    for field in ("norm_share", "tsr", "csa"):
        for task, value in zip(summary.tasks, getattr(summary, field).tolist(), strict=True):
            yield f"{TAG}/{field}/{task}", value
    if not math.isnan(summary.ratio):
        yield f"{TAG}/ratio", summary.ratio


def figures(summary: SaliencySummary) -> Iterator[tuple[str, Figure]]:
    """Yield tags and figures."""
    yield f"{TAG}/affinity", plot_affinity(summary)
    yield f"{TAG}/history", plot_history(summary)


def _checked(summary: SaliencySummary, step: int | None) -> int:
    check_observed(summary)
    return summary.step if step is None else checked_step(step)
