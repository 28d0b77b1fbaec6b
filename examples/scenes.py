"""Data and networks of the examples: artificial scenes with two dense tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

TASKS = ("segmentation", "depth")
SIZE = 24


class Scenes(Dataset):
    """Noisy images of one box. The tasks are where the box is, and how deep every pixel lies."""

    def __init__(self, count: int = 256, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        corner = torch.randint(0, SIZE // 2, (count, 2, 1), generator=generator)
        size = torch.randint(5, SIZE // 2, (count, 2, 1), generator=generator)
        at = torch.arange(SIZE)
        inside = (at >= corner) & (at < corner + size)
        box = inside[:, 0, :, None] & inside[:, 1, None, :]
        box_depth = torch.rand(count, 1, 1, generator=generator)
        self.depth = torch.where(box, box_depth, 1.5)[:, None]
        noise = 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
        self.images = 1 / (0.5 + self.depth) + noise
        self.segmentation = box.long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {
            "segmentation": self.segmentation[index],
            "depth": self.depth[index],
        }


def encoder() -> nn.Module:
    """Return a module that maps images to the shared representation ``(B, 32, 12, 12)``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
    )


def head(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(32, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, outputs, 1),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
    )


def heads() -> dict[str, nn.Module]:
    return {"segmentation": head(2), "depth": head(1)}


def loss_functions() -> dict[str, nn.Module]:
    return {"segmentation": nn.CrossEntropyLoss(), "depth": nn.L1Loss()}
