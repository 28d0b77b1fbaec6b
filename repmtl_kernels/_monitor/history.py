"""The observations that are kept: a bounded number, evenly spread over all."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Observation(NamedTuple):
    """One observation, on its device."""

    number: int  # among all observations
    call: int  # number of the training call
    values: Tensor  # all but the maps, flat


class History:
    """Every ``stride``-th observation from the first one on, and the last one.

    Where they grow too many, ``stride`` doubles.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.kept: list[Observation] = []

    def add(self, observation: Observation, keep: int) -> None:
        """Keep an observation, and at most ``keep`` of them, which is at least 2."""
        if self.kept and self.kept[-1].number % self.stride:
            del self.kept[-1]  # it was there as the last one
        self.kept.append(observation)
        while len(self.kept) > keep:
            self.stride *= 2
            last = observation.number
            self.kept = [o for o in self.kept if o.number % self.stride == 0 or o.number == last]
