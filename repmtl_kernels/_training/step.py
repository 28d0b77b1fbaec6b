"""What one call of the criterion shows for logging."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class RepMTLStep:
    """What the last call of :class:`RepMTL` computed: detached scalars, still on their device.

    ``tsr``, ``csa`` and ``regularizer`` are float32, or float64 where the representation is;
    ``total`` is float32, or float64 where a loss or ``regularizer`` is.
    """

    losses: dict[Hashable, Tensor | None]
    """The task losses as they were given (no weight, no logarithm), by key or index; None for a
    task that was absent."""
    total: Tensor
    """What the call returned."""
    tsr: Tensor | None = None
    """TSR without its weight; None where this step did not compute it."""
    csa: Tensor | None = None
    """CSA without its weight; None where this step did not compute it."""
    regularizer: Tensor | None = None
    """What was added to the task losses, all weights included; None where nothing was."""
    applied: bool = False
    """Whether this step had the regulariser."""
    underflow: dict[Hashable, Tensor] | None = None
    """For each present task, by key or index, the share of its saliency's elements that are zero or
    below 2^-14, where float16 loses bits; float32. Zeros that are zero in any precision (behind a
    ReLU, say) count as well. None where saliencies are neither float16 nor taken under float16
    autocast, and where the regulariser was not applied. See ``RepMTL(scaler=)``."""
    ratio: Tensor | None = None
    """The norm of the regulariser's own gradient at the representation over that of the (weighted)
    tasks', as applied; float32. It is measured on the first 16 calls that apply the regulariser and
    on every 24th after them; calls between show the last measurement. None before the first, and
    where the regulariser was not applied. Both gradients are rounded to the representation's dtype,
    so in bfloat16 ratios below 0.01 or so are noise."""
