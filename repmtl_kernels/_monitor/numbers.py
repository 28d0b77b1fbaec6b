"""Numbers as figures and the report show them."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOT_SEEN = "not seen"


def plain(value: float, decimals: int = 2, form: str = "f") -> str:
    """Return the number with a true minus sign, or "not seen" for NaN."""
    if math.isnan(value):
        return NOT_SEEN
    text = f"{value:.{decimals}{form}}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """Return a share of 1 as per cent."""
    return NOT_SEEN if math.isnan(share) else f"{100 * share:.0f} %"


def count(number: int, one: str, many: str | None = None) -> str:
    """Return the number and its noun: "1 task", "3 tasks"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(words: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + list(words[-1:]))
