"""Small data sets for the tests of training quality, and runs on them."""

from __future__ import annotations

import torch

from benchmarks.quality import config
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.tasks import Task

NETWORK = {"widths": [4, 6], "strides": [2, 1], "dilations": [1, 1], "head_width": 4}
TRAINING = {"steps": 6, "batch": 4, "log_every": 2}
REP_MTL = {"strength": 0.1, "every": 1, "start": 1, "ramp": 2}
METHODS = {"equal": {}, "rep_mtl": REP_MTL, "nash_mtl": {}, "fairgrad": {}}


def dense(folder=None, *, seed: int = 0) -> Dataset:
    """Two tasks of 8 x 8 images, the depth of two training images is missing."""
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for split, count in (("train", 10), ("validation", 4), ("test", 6)):
        images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        grey = images.float().mean(1) / 255
        targets = {"segmentation": (grey > 0.5).to(torch.int8), "depth": grey.unsqueeze(1) + 0.1}
        splits[split] = Split(images, targets)
    splits["train"].targets["depth"][:2] = 0
    return Dataset((Task.of("segmentation", "segmentation", 2), Task.of("depth", "depth")), splits)


def domains(folder=None) -> Dataset:
    """Two domains of features, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, count in (("train", 12), ("test", 8)):
        inputs, targets = {}, {}
        for k, name in enumerate(("a", "b")):
            inputs[name] = torch.randn(count + 3 * k, 5, generator=generator)
            targets[name] = inputs[name][:, :3].argmax(1)
        splits[split] = Split(inputs, targets)
    return Dataset(tuple(Task.of(t, "classification", 3) for t in ("a", "b")), splits)


def make_run(
    data: str = "dense", method: str = "equal", options=None, task=None, seed=0, **changes
):
    network = NETWORK if data == "dense" else {"encoder": "mlp", "widths": [6], "dropout": 0.2}
    settings = {"data": {"name": data}, "network": network, "training": TRAINING}
    settings = config.merged(config.merged(config.DEFAULTS, settings), changes)
    return config.Run(data, method, method, method, options or {}, seed, task, settings)
