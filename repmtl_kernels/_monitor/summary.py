"""The results of a monitor, as plain tensors on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SaliencyHistory:
    """The observations that a :class:`SaliencyMonitor` has kept: K of them, the oldest first.

    All tensors are on the CPU and all but ``steps`` are float64. An entry is NaN where there was
    nothing to observe: the task was absent, no sample had labels of both tasks, or a saliency was
    zero or not finite. The fields are those of :class:`SaliencySummary`, which explains them.
    """

    steps: Tensor
    """``(K,)``, int64: the number of the training call, from 0."""
    cosine: Tensor
    """``(K, T, T)``."""
    conflicting_samples: Tensor
    """``(K, T, T)``."""
    conflicting_positions: Tensor
    """``(K, T, T)``."""
    norm_share: Tensor
    """``(K, T)``."""
    tsr: Tensor
    """``(K, T)``."""
    csa: Tensor
    """``(K, T)``."""
    ratio: Tensor
    """``(K,)``."""


@dataclass(frozen=True, eq=False)
class SaliencySummary:
    """The results of a :class:`SaliencyMonitor` of T tasks: running means, and the history.

    The means are exponential over the observations, and free of the bias of their start. They are
    float64 tensors on the CPU, in the order of ``tasks``. An entry is NaN where nothing has been
    observed so far. With :class:`Levels` inner products and norms are those of all levels together;
    ``tsr`` and ``csa`` are means over the levels. Its ``repr`` leaves out ``maps`` and ``history``.
    """

    tasks: tuple[str, ...]
    """The names of the tasks, in the order of the losses."""
    observations: int
    """How many calls have been observed."""
    step: int
    """The number of the last observed training call, from 0; -1 before the first observation."""
    cosine: Tensor
    """``(T, T)``: cosine of two tasks' saliencies, mean over samples; below 0 they conflict."""
    conflicting_samples: Tensor
    """``(T, T)``: the share of the samples whose cosine is below 0."""
    conflicting_positions: Tensor
    """``(T, T)``: the share of positions where the product over the channels is below 0."""
    norm_share: Tensor
    """``(T,)``: the norm of each task's saliency over the sum of all tasks' norms."""
    tsr: Tensor
    """``(T,)``: each task's term of TSR, ``-p_t log p_t`` (eq. 6), in nats."""
    csa: Tensor
    """``(T,)``: similarity of each task's affinity with the sample's anchor (eq. 7), 0 to 1."""
    ratio: float
    """The regulariser's gradient over that of the tasks (``RepMTL.last.ratio``), or NaN."""
    maps: dict[str, Tensor] = field(repr=False)
    """Where each task's saliency is: ``(T, *grid)`` for each level, by its name, ``""`` without.

    The value is the norm over the channels, mean over samples, and divided by the task's own mean:
    1 is average. Grids of more than 32 a side are pooled to 32. Representations without positions
    have no map, and the dict is empty.
    """
    history: SaliencyHistory = field(repr=False)
    """The single observations. If they grow too many, they are thinned evenly."""


def check_observed(summary: object) -> None:
    """Raise unless this is a summary, and of one observation at least.

    Raises:
        TypeError: it is not a :class:`SaliencySummary`.
        ValueError: nothing has been observed.
    """
    if not isinstance(summary, SaliencySummary):
        raise TypeError(f"summary: expected a SaliencySummary, got {type(summary).__name__}")
    if summary.observations == 0:
        raise ValueError(
            "summary: expected at least one observation, got none. A SaliencyMonitor observes "
            "calls in training mode with gradients enabled: its own, or those of a RepMTL that was "
            "given it as monitor="
        )
