"""Checks of single values, and how messages show them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LARGEST_INT = 2**63 - 1
# Kinds of tensors without a shape or without most operations.
NO_PLAIN_TENSORS = (
    torch.nn.parameter.UninitializedTensorMixin,  # type: ignore[attr-defined]
    torch.masked.MaskedTensor,
)
# The smallest and the largest normal number.
NORMAL_NUMBERS = {
    dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max)
    for dtype in (torch.float32, torch.float64)
}


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether this is a DTensor, without loading ``torch.distributed.tensor``."""
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def check_plain(name: str, value: Tensor) -> None:
    """Raise if the tensor has no plain values of its own, with a shape and all operations."""
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


def attribute_text(value: object) -> str:
    """Return how messages show an attribute of a tensor: its shape, dtype, device or layout."""
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise if ``value`` is not one of the choices."""
    # A value of another type may not be comparable: an array is equal element by element.
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {expected}; got {shown(value)}")


def shown(value: object) -> str:
    """Return a text for messages: a number or text, shortened, or else the type."""
    if isinstance(value, numbers.Rational):
        longest = max(abs(int(value.numerator)), int(value.denominator))
        if longest > LARGEST_INT:
            return f"{type(value).__name__} of {longest.bit_length()} bits"
    if not isinstance(value, numbers.Real | str | None):
        return type(value).__name__
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."


def check_number(
    name: str,
    value: object,
    *,
    minimum: float,
    exclusive: bool = False,
    dtype: torch.dtype = torch.float32,
    normal: bool = False,
) -> float:
    """Return ``value`` as a float. Raise if it is not a number that the caller can use.

    Args:
        name: what messages call it.
        value: the number, of any real type.
        minimum: the smallest number that is allowed.
        exclusive: ``minimum`` itself is not allowed.
        dtype: the number must be finite in it.
        normal: refuse a number that ``dtype`` holds only as zero or as a subnormal number, which
            GPUs take for zero. Without it, the caller computes the limit at 0 for such a number.
    """
    if isinstance(value, float):
        number = value
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    else:
        number = _as_float(value)
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
        return -math.inf if value < 0 else math.inf


def check_int(name: str, value: object, *, minimum: int) -> int:
    """Return ``value``. Raise if it is not an int of at least ``minimum``, below 2^63."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not minimum <= value <= LARGEST_INT:
        bound = f"of at least {minimum}" if value < minimum else "below 2^63"
        raise ValueError(f"{name}: expected an int {bound}; got {shown(value)}")
    return value


def checked_step(step: object) -> int:
    """Return the user's counter as an int of at least 0. It may be one of NumPy's."""
    if isinstance(step, numbers.Integral) and not isinstance(step, bool):
        step = int(step)
    return check_int("step", step, minimum=0)
