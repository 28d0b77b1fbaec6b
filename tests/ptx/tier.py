"""The tests of compiled kernels share this: the modes, and the cases that `make test` has."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator
from importlib.util import find_spec

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels", allow_module_level=True)
if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks.cases import triton_products_in
from ptx.driver import Launches, driver, library

if library.compiler() is None:
    pytest.skip("needs a C compiler", allow_module_level=True)

MARKS = [pytest.mark.compiled, pytest.mark.timeout(600)]
CAPABILITIES = (90, 80)


class Mode:
    """A dtype of saliencies, and the precision of their products."""

    def __init__(
        self, dtype: torch.dtype, precision: str | None = None, rounding: torch.dtype | None = None
    ) -> None:
        self.dtype = dtype
        self.precision = precision
        self.rounding = rounding or dtype


MODES = {
    "bfloat16": Mode(torch.bfloat16),
    "tf32": Mode(torch.float32, "tf32", torch.float16),  # which has as many bits
    "ieee": Mode(torch.float32, "ieee"),
    "float16": Mode(torch.float16),
    "tf32x3": Mode(torch.float32, "tf32x3"),
}


@contextlib.contextmanager
def compiled(capability: int, mode: str, **options) -> Iterator[Launches]:
    """Run Triton's kernels compiled, with the products of this mode."""
    with triton_products_in(MODES[mode].precision), driver(capability, **options) as launches:
        yield launches


def diagonal(*axes: Collection, step: int = 1) -> list:
    """Return all combinations, of which only a few are not marked ``whole``.

    They are one for each value of the last axis, or for each ``step``-th one, with the combinations
    of the other axes in turn.
    """
    *others, last = axes
    combinations = list(itertools.product(*others))
    return [
        pytest.param(
            *combination,
            value,
            marks=()
            if i % step == 0 and i // step % len(combinations) == turn
            else pytest.mark.whole,
        )
        for turn, combination in enumerate(combinations)
        for i, value in enumerate(last)
    ]
