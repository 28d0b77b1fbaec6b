"""The form of a monitor's observations: their tasks, levels and maps."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from repmtl_kernels._training.tasks import Tasks

# The largest side of a map.
MAP_SIDE = 32


class Form(NamedTuple):
    """The tasks, levels and maps that all observations of one monitor have in common."""

    tasks: tuple[str, ...]  # the keys of the losses as text, T of them
    levels: tuple[str, ...]  # their names as text; one empty text without Levels
    grids: tuple[tuple[int, ...], ...]  # of each level's maps; empty without positions

    def row(self, key: Hashable) -> int:
        """Return the place of the task with this key."""
        return self.tasks.index(str(key))

    def map_slices(self) -> list[slice]:
        """Return the place of each level's maps, flat, among those of all levels."""
        slices, end = [], 0
        for grid in self.grids:
            first, end = end, end + (len(self.tasks) * math.prod(grid) if grid else 0)
            slices.append(slice(first, end))
        return slices


def form_of(tasks: Tasks, channel_dim: int) -> Form:
    """Return the form of the observations that these tasks are the first of.

    Raises:
        ValueError: two keys of the losses have the same text.
    """
    keys = tuple(map(str, tasks.losses))
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(
                f"losses: expected keys with different texts, got {key!r} twice among "
                f"{list(tasks.losses)}"
            )
    return Form(keys, _level_names(tasks), tuple(grids_of(tasks, channel_dim)))


def grids_of(tasks: Tasks, channel_dim: int) -> list[tuple[int, ...]]:
    """Return the sides of each level's maps."""
    return [
        tuple(min(size, MAP_SIDE) for size in spatial_sizes(z, channel_dim))
        for z in tasks[0].representations
    ]


def check_form(form: Form, tasks: Tasks, channel_dim: int) -> None:
    """Raise if these tasks can't be observed beside those that have been."""
    for key in tasks.losses:
        if str(key) not in form.tasks:
            raise ValueError(
                f"losses: expected tasks of the monitor's first call, {list(form.tasks)}; got "
                f"{key!r}. A task that is absent from the first call has None as its loss there"
            )
    if (names := _level_names(tasks)) != form.levels:
        raise ValueError(
            "representation: expected the levels of the monitor's first call, "
            f"{_shown(form.levels)}; got {_shown(names)}"
        )
    for (name, _), grid, first in zip(
        tasks[0].places, grids_of(tasks, channel_dim), form.grids, strict=True
    ):
        if len(grid) != len(first):
            raise ValueError(
                f"{name}: expected {len(first)} dimensions of positions, as in the monitor's first "
                f"call; got {len(grid)}"
            )


def spatial_sizes(z: Tensor, channel_dim: int) -> list[int]:
    """Return the sizes of a representation without batch and channels."""
    sizes = list(z.shape)
    del sizes[channel_dim], sizes[0]
    return sizes


def _level_names(tasks: Tasks) -> tuple[str, ...]:
    return tuple(map(str, tasks.level_names or ("",)))


def _shown(names: tuple[str, ...]) -> str:
    return "one Tensor" if names == ("",) else str(list(names))
