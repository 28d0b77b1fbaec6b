"""A data set: tasks, splits in memory, and batches that a step number determines."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.quality.tasks import Task

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """Samples of one split.

    inputs: ``(n, ...)``; in multi-input learning one such tensor per task. uint8 is normalised on
        its way to the network.
    targets: per task, ``(n, ...)``; a pixel without a label has its kind's value for that.
    """

    inputs: Inputs
    targets: dict[str, Tensor]

    def of(self, task: str) -> Tensor:
        """Return the inputs of this task."""
        return self.inputs[task] if isinstance(self.inputs, dict) else self.inputs

    def size(self, task: str) -> int:
        return len(self.targets[task])

    def take(self, rows: dict[str, Tensor]) -> Split:
        """Return these rows of each task; shared inputs are those of the first task."""
        targets = {task: self.targets[task][index] for task, index in rows.items()}
        if isinstance(self.inputs, dict):
            return Split({task: self.inputs[task][i] for task, i in rows.items()}, targets)
        return Split(self.inputs[next(iter(rows.values()))], targets)


@dataclass(frozen=True)
class Dataset:
    """Tasks with their splits: ``train``, ``test`` and, where there is one, ``validation``."""

    tasks: tuple[Task, ...]
    splits: dict[str, Split]
    multi_input: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multi_input", isinstance(self.splits["train"].inputs, dict))

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of each channel of the 8-bit training images."""
        train = self.splits["train"]
        images = list(train.inputs.values()) if self.multi_input else [train.inputs]
        if images[0].dtype != torch.uint8:
            return None
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in images], dim=1).float() / 255
        shape = (1, -1) + (1,) * (images[0].ndim - 2)
        return values.mean(1).view(shape), values.std(1).view(shape)

    def prepared(self, inputs: Tensor) -> Tensor:
        """Return a batch as the network takes it."""
        if self.scale is None:
            return inputs.float()
        mean, std = (x.to(inputs.device) for x in self.scale)
        return (inputs.float() / 255 - mean) / std

    def only(self, task: str) -> Dataset:
        """Return this task alone."""
        splits = {
            name: Split(split.of(task), {task: split.targets[task]})
            for name, split in self.splits.items()
        }
        return Dataset(tuple(t for t in self.tasks if t.name == task), splits)

    def with_fraction(self, fraction: float, seed: int) -> Dataset:
        """Return it with this share of the training samples, drawn by the seed."""
        if fraction == 1:
            return self
        rows = {}
        for task in self.names:
            count = self.splits["train"].size(task)
            order = _permutation(count, seed, task if self.multi_input else "", "fraction")
            rows[task] = order[: max(1, round(fraction * count))].sort().values
        return replace(self, splits={**self.splits, "train": self.splits["train"].take(rows)})

    def batch_size(self, wanted: int) -> int:
        return min(wanted, *(self.splits["train"].size(task) for task in self.names))

    def batch(self, step: int, size: int, seed: int) -> Split:
        """Return the batch of a step.

        Seed and epoch determine an epoch's permutation. In multi-input learning each task goes
        through its own samples.
        """
        train, rows = self.splits["train"], {}
        for task in self.names:
            count = train.size(task)
            epoch, place = divmod(step, count // size)
            order = _permutation(count, seed, task if self.multi_input else "", epoch)
            rows[task] = order[place * size : (place + 1) * size]
        return train.take(rows)

    def chunks(self, split: str, task: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of a split, in order."""
        here = self.splits[split]
        yield from zip(here.of(task).split(size), here.targets[task].split(size), strict=True)


def stream(seed: int, *names: object) -> int:
    """Return the seed of a stream of random numbers, by name."""
    return zlib.crc32(repr((seed, *names)).encode())


def _permutation(count: int, seed: int, *names: object) -> Tensor:
    generator = torch.Generator().manual_seed(stream(seed, *names))
    return torch.randperm(count, generator=generator)
