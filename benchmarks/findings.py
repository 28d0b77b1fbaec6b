"""What a part of the benchmark has found: rows, and notes on what was left out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.progress import say


class Findings:
    """Rows and notes as they come; ``save`` is called with both after each measurement."""

    def __init__(self, save: Callable[[list[dict], list[str]], None] | None = None) -> None:
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self._save = save

    def note(self, text: str) -> None:
        self.notes.append(text)
        say(text)

    def save(self) -> None:
        if self._save is not None:
            self._save(self.rows, self.notes)

    def measured(
        self, what: object, measure: Callable[[], list[dict]], device: torch.device
    ) -> list[dict] | None:
        """Its rows, which are kept; None and a note where it does not fit into memory.

        That is for all contestants together: what one of them runs into is an error of its row.
        """
        try:
            found = measure()
        except torch.OutOfMemoryError as error:
            self.note(f"left out: {what}: {described(error)}")
            free(device)
            return None
        self.rows += found
        return found


def described(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def free(device: torch.device) -> None:
    """Gives memory back that no tensor has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
