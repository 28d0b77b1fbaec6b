"""Data sets whose tasks are known to belong together: groups of tasks made from other data sets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality.data import Dataset, Split, stream
from benchmarks.quality.tasks import Task

PERMUTED, NOISY = "permuted", "noisy"
# Questions about a digit: the number of classes, and the answer.
QUESTIONS = {
    "digit": (10, lambda digits: digits),
    "parity": (2, lambda digits: digits % 2),
    "large": (2, lambda digits: (digits >= 5).long()),
}
# Noisy labels have this share of pixels with a random class, and noise of this standard
# deviation in the logarithm of the depth and in each coordinate of the normals.
RANDOM_CLASSES, DEPTH_NOISE, NORMALS_NOISE = 0.3, 0.3, 0.5


def questions(digits: Dataset, seed: int) -> Dataset:
    """Return three questions about each of two overlaid digits, and two that have no answer.

    The last two ask for the left digit of another picture, the same one both times. They can be
    learned by heart, but nothing else can be learned from them.
    """
    splits: dict[str, Split] = {}
    for part, split in digits.splits.items():
        generator = torch.Generator().manual_seed(stream(seed, PERMUTED, part))
        left = split.targets[digits.names[0]]
        other = left[torch.randperm(len(left), generator=generator)]
        targets = {
            f"{side}_{question}": answer(labels)
            for side, labels in split.targets.items()
            for question, (_, answer) in QUESTIONS.items()
        }
        for question in ("digit", "parity"):
            targets[f"{PERMUTED}_{question}"] = QUESTIONS[question][1](other)
        splits[part] = Split(split.inputs, targets)
    tasks = tuple(
        Task.of(name, "classification", QUESTIONS[name.rsplit("_", 1)[1]][0])
        for name in splits["train"].targets
    )
    return Dataset(tasks, splits)


def with_copies(dense: Dataset, seed: int) -> Dataset:
    """Return the tasks, and for each one a copy whose training labels are noisy."""
    splits = {
        part: Split(split.inputs, split.targets | _copies(dense, split, seed, part == "train"))
        for part, split in dense.splits.items()
    }
    copies = tuple(replace(task, name=_copy(task.name)) for task in dense.tasks)
    return replace(dense, tasks=dense.tasks + copies, splits=splits)


def _copy(task: str) -> str:
    return f"{NOISY}_{task}"


def _copies(dense: Dataset, split: Split, seed: int, noise: bool) -> dict[str, Tensor]:
    copies = {}
    for task in dense.tasks:
        labels = split.targets[task.name]
        if noise:
            generator = torch.Generator().manual_seed(stream(seed, NOISY, task.name))
            labels = NOISE[task.name](labels, task.kind.classes, generator)
        copies[_copy(task.name)] = labels
    return copies


def _random_classes(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(labels.shape, generator=generator) < RANDOM_CLASSES
    others = torch.randint(classes, labels.shape, generator=generator, dtype=labels.dtype)
    return torch.where(chosen & (labels >= 0), others, labels)


def _scaled(depth: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return depths with a factor each; those that are missing, 0, stay so."""
    return depth * torch.exp(DEPTH_NOISE * torch.randn(depth.shape, generator=generator))


def _turned(normals: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    noise = NORMALS_NOISE * torch.randn(normals.shape, generator=generator)
    there = (normals != 0).any(1, keepdim=True)
    return torch.where(there, normalize(normals + noise, dim=1), normals)


NOISE = {"segmentation": _random_classes, "depth": _scaled, "normals": _turned}
