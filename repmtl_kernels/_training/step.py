"""The values of one call of the criterion, for logging."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class RepMTLStep:
    """The values of one call of :class:`RepMTL`: detached scalars, still on their device.

    ``tsr``, ``csa`` and ``regularizer`` are float32, or float64 where the representation is;
    ``total`` is float32, or float64 where a loss or ``regularizer`` is.
    """

    losses: dict[Hashable, Tensor | None]
    """The task losses as the caller passed them, by key or index; None for an absent task."""
    total: Tensor
    """The total that the call returned."""
    tsr: Tensor | None = None
    """TSR without its weight; None where this step did not compute it."""
    csa: Tensor | None = None
    """CSA without its weight; None where this step did not compute it."""
    regularizer: Tensor | None = None
    """The term that was added to the task losses, with all weights; None if there was none."""
    applied: bool = False
    """Whether this step had the regulariser."""
    underflow: dict[Hashable, Tensor] | None = None
    """The share of each saliency's elements that are zero or below 2^-14, where float16 loses bits.

    It is a float32 scalar for each present task, by key or index. Elements that are zero in any
    precision, behind a ReLU for example, count too. None if the saliencies are neither float16 nor
    taken under float16 autocast, or if this step had no regulariser. See ``RepMTL(scaler=)``.
    """
    ratio: Tensor | None = None
    """The norm of the regulariser's gradient at the representation over that of the tasks.

    The regulariser counts as it was applied, the tasks with their weights; a float32 scalar. It is
    measured on the first 16 calls that apply the regulariser, and on every 24th after them. Calls
    between these show the last measurement. None before the first one, and if this step had no
    regulariser. Both gradients are rounded to the representation's dtype, so in bfloat16 ratios
    below about 0.01 are noise.
    """
