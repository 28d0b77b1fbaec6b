"""Checks of single values, and how messages show them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_INT = 2**63 - 1
# Tensors by type, without a shape or without most operations.
NO_PLAIN_TENSORS = (torch.nn.parameter.UninitializedTensorMixin, torch.masked.MaskedTensor)
# The smallest and the largest.
NORMAL_NUMBERS = {
    dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max)
    for dtype in (torch.float32, torch.float64)
}


def is_dtensor(value: object) -> bool:
    """Without loading ``torch.distributed.tensor``."""
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def check_plain(name: str, value: Tensor) -> None:
    if is_dtensor(value):
        raise TypeError(
            f"{name}: expected a plain Tensor, got a DTensor, spread as {value.placements}. Where "
            "that is over the batch, pass its own part, .to_local(), and group= for negatives of "
            "all ranks"
        )
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a plain Tensor, got a nested one. Pad its parts to one shape, e.g. "
            ".to_padded_tensor(0.0)"
        )
    if isinstance(value, NO_PLAIN_TENSORS):
        raise TypeError(f"{name}: expected a plain Tensor, got {type(value).__name__}")


def size_text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    # A value of another type may not be comparable: an array is equal element by element.
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {expected}; got {shown(value)}")


def shown(value: object) -> str:
    """For messages: Python refuses to write very long ints, and arrays take many lines."""
    if isinstance(value, numbers.Rational):
        longest = max(abs(value.numerator), value.denominator)
        if longest > LARGEST_INT:
            return f"{type(value).__name__} of {longest.bit_length()} bits"
    if not isinstance(value, numbers.Real | str | None):
        return type(value).__name__
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."


def check_number(
    name: str,
    value: float,
    *,
    minimum: float,
    exclusive: bool = False,
    dtype: torch.dtype = torch.float32,
    normal: bool = False,
) -> float:
    """``value`` as a float, finite in ``dtype`` and at least (or above) ``minimum``.

    normal: what ``dtype`` holds only as zero or as a subnormal number, which GPUs take for zero, is
    refused; else its limit at 0 has to be what the caller computes.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = value if isinstance(value, float) else _as_float(value)
    smallest, largest = NORMAL_NUMBERS[dtype]
    # NaN fails too.
    if not minimum <= number < math.inf or (exclusive and number == minimum):
        bound = f"above {minimum:g}" if exclusive else f"of at least {minimum:g}"
        raise ValueError(f"{name}: expected a finite number {bound}; got {shown(value)}")
    if number > largest or (normal and number < smallest and value != 0):
        expected = f"of at most {largest:.3g}"
        if normal:
            zero = "" if exclusive else "0 or "
            expected = f"{zero}from {smallest:.3g} to {largest:.3g}"
        raise ValueError(
            f"{name}: expected a number {expected}, those that {dtype} holds; got {shown(value)}"
        )
    return float(number)


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_int(name: str, value: int, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not minimum <= value <= LARGEST_INT:
        bound = f"of at least {minimum}" if value < minimum else "below 2^63"
        raise ValueError(f"{name}: expected an int {bound}; got {shown(value)}")


def checked_step(step: int) -> int:
    """The user's counter, NumPy's perhaps, as an int of at least 0."""
    if isinstance(step, numbers.Integral) and not isinstance(step, bool):
        step = int(step)
    check_int("step", step, minimum=0)
    return step
