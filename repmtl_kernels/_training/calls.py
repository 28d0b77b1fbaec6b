"""The count of training calls, and which replica of a forward pass makes them."""

from __future__ import annotations

import weakref


class CallCount:
    """The training calls so far: on the host, so that no call asks the device for its turn."""

    def __init__(self) -> None:
        self.calls = 0  # calls with the same step count once
        self.step: int | None = None  # the last call's, if it had one

    def number(self, step: int | None) -> int:
        """Return the number of this training call."""
        return self.calls - 1 if step is not None and step == self.step else self.calls

    def count(self, number: int, step: int | None) -> None:
        """Remember that the call of this number is done."""
        self.calls, self.step = number + 1, step


class FirstReplica:
    """Tells the first replica that ``nn.DataParallel`` makes for a forward pass from the others."""

    def __init__(self) -> None:
        self._last: tuple[int, weakref.ref] | None = None

    def is_first(self, replica: object, calls: int) -> bool:
        """Return whether no other replica of the same forward pass is there already."""
        if self._last is not None:
            of_calls, first = self._last
            if of_calls == calls and first() is not None:
                return False
        self._last = calls, weakref.ref(replica)
        return True

    def __getstate__(self) -> dict:
        return {"_last": None}  # a weak reference has no copy
