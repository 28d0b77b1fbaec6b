"""A part of the benchmark, and one run of it: the loop over its cases, its rows and notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import results, targets
from benchmarks.output import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A contestant may fail so: out of memory, a failed compilation, a kernel that can't run.
FAILURES: tuple[type[Exception], ...] = (RuntimeError,)
if find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES = (RuntimeError, TritonError)


@dataclass
class Run:
    """One run of one part, with the rows and notes that it has so far."""

    name: str  # of the part, and of its result file
    device: torch.device
    head: dict  # of the result file
    folder: Path | None  # None: nothing is saved
    quick: bool = False
    go_on: bool = False  # with the rows in the result file
    deadline: float = float("inf")  # time.monotonic() when the part should be over
    notes: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    more: dict = field(default_factory=dict)  # what else the result file has

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        self.notes.append(text)
        say(text)

    def save(self) -> None:
        if self.folder is not None:
            results.save(
                self.folder, self.name, self.head, self.rows, **self.more, notes=self.notes
            )
            targets.refresh(self.folder)

    def each(self, cases: Sequence, measure: Callable[..., list[dict]]) -> None:
        """Measure every case and save its rows; note the cases that time or memory leave out."""
        for case in cases:
            if self.left < 0:
                self.note(f"left out for time: {case}")
                continue
            try:
                rows = measure(case)
            except torch.OutOfMemoryError as error:  # not of one contestant: of the inputs
                self.note(f"left out: {case}: {described(error)}")
                free(self.device)
                continue
            self.rows += rows
            self.save()


@dataclass(frozen=True)
class Part:
    """All that the benchmark knows about a part.

    measure: measures and saves; None where something else writes the result file.
    tables: by their names in the documents, from the content of the result file.
    figures: by file name, from the same; None is no figure.
    broken: says which rows are failures of this package.
    share: of the time, beside the other parts of a run; on: devices whose default run has the part.
    """

    name: str
    title: str = ""
    measure: Callable[[Run], None] | None = None
    tables: Mapping[str, Callable[[dict], str]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[dict], Figure | None]] = field(default_factory=dict)
    broken: Callable[[list[dict]], list[str]] = lambda rows: []
    share: float = 0.3
    on: Sequence[str] = ()


def described(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def free(device: torch.device) -> None:
    """Return memory to the device that no tensor uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
