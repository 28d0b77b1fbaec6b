"""A data set: tasks, splits in memory, and batches that a step number determines."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.minilm import PADDING
from benchmarks.quality.tasks import Task, Tokens

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """Samples of one split.

    inputs: ``(n, ...)``; in multi-input learning one such tensor per task. uint8 is normalised on
        its way to the network. Texts are numbers of word pieces, ``(n, L)``.
    targets: per task, ``(n, ...)``; a pixel without a label has its kind's value for that.
    """

    inputs: Inputs
    targets: dict[str, Tensor]

    def of(self, task: str) -> Tensor:
        return self.inputs[task] if isinstance(self.inputs, dict) else self.inputs

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
    # Mean and standard deviation of 8-bit images, in place of those of the training images.
    fixed_scale: tuple[float, float] | None = None
    multi_input: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multi_input", isinstance(self.splits["train"].inputs, dict))

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def of_tokens(self) -> bool:
        """Return whether inputs are texts, and representations ``(B, L, C)``."""
        return isinstance(self.tasks[0].kind, Tokens)

    @property
    def channel_dim(self) -> int:
        """Return the dimension of a representation that has its channels."""
        return -1 if self.of_tokens else 1

    def positions(self, inputs: Tensor) -> Tensor | None:
        """Return where a batch of texts is not padding; None: the inputs are no texts."""
        return inputs != PADDING if self.of_tokens else None

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of 8-bit images over 255, of each channel or of all."""
        images = self.splits["train"].inputs
        if self.multi_input or images.dtype != torch.uint8:
            return None
        if self.fixed_scale is not None:
            return tuple(torch.tensor(x / 255) for x in self.fixed_scale)
        values = images.transpose(0, 1).flatten(1).float() / 255
        return values.mean(1).view(1, -1, 1, 1), values.std(1).view(1, -1, 1, 1)

    def prepared(self, inputs: Tensor) -> Tensor:
        """Return a batch as the network takes it."""
        if self.of_tokens:
            return inputs
        if self.scale is None:
            return inputs.float()
        mean, std = (x.to(inputs.device) for x in self.scale)
        return (inputs.float() / 255 - mean) / std

    def only(self, *names: str) -> Dataset:
        """Return it with these tasks, in its own order."""
        splits = {}
        for part, split in self.splits.items():
            inputs = split.inputs
            if self.multi_input:
                alone = len(names) == 1
                inputs = inputs[names[0]] if alone else {name: inputs[name] for name in names}
            splits[part] = Split(inputs, {name: split.targets[name] for name in names})
        return replace(self, tasks=tuple(t for t in self.tasks if t.name in names), splits=splits)

    def with_fraction(self, fraction: float, seed: int) -> Dataset:
        """Return it with this share of the training samples, drawn by the seed."""
        if fraction == 1:
            return self
        rows = {}
        for task in self.names:
            count = len(self.splits["train"].targets[task])
            order = _permutation(count, seed, task if self.multi_input else "", "fraction")
            rows[task] = order[: max(1, round(fraction * count))].sort().values
        return replace(self, splits={**self.splits, "train": self.splits["train"].take(rows)})

    def batch_size(self, wanted: int) -> int:
        return min(wanted, *(len(self.splits["train"].targets[task]) for task in self.names))

    def batch(self, step: int, size: int, seed: int) -> Split:
        """Return the batch of a step; seed and epoch determine an epoch's permutation."""
        train, rows = self.splits["train"], {}
        for task in self.names:
            count = len(train.targets[task])
            epoch, place = divmod(step, count // size)
            order = _permutation(count, seed, task if self.multi_input else "", epoch)
            rows[task] = order[place * size : (place + 1) * size]
        return train.take(rows)


def stream(seed: int, *names: object) -> int:
    """Return the seed of a stream of random numbers, by name."""
    return zlib.crc32(repr((seed, *names)).encode())


def _permutation(count: int, seed: int, *names: object) -> Tensor:
    generator = torch.Generator().manual_seed(stream(seed, *names))
    return torch.randperm(count, generator=generator)
