"""The data sets by name; each needs a folder and its options, and says which file is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from benchmarks.multimnist import TASKS as DIGITS
from benchmarks.multimnist import load_mnist
from benchmarks.multimnist import multimnist as pairs_of_digits
from benchmarks.quality import doom as views
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.files import FOLDER_VARIABLE, located
from benchmarks.quality.related import questions, with_copies
from benchmarks.quality.tasks import Task
from benchmarks.quality.tox21 import tox21
from benchmarks.quality.treebank import ud_ewt

RGBD_TASKS = ("segmentation", "depth", "normals")


def data_folder(option: str | Path | None) -> Path | None:
    """Return the folder of the data: from the option, or from the environment."""
    folder = option or os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def load(name: str, folder: Path | None, seed: int, **options) -> Dataset:
    """Return the data set of this name; ``seed`` decides what those in ``SEEDED`` draw."""
    if name not in LOADERS:
        raise ValueError(f"data.name: expected one of {', '.join(LOADERS)}; got {name!r}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if name in SEEDED:
        options["seed"] = seed
    return LOADERS[name](folder, **options)


@lru_cache(maxsize=2)
def multimnist(
    folder: Path | None, *, seed: int, train: int = 8000, validation: int = 1000, test: int = 4000
) -> Dataset:
    """Load two overlaid digits; the splits' pairs are from disjoint sets of images."""
    pairs = pairs_of_digits(*load_mnist(), train=train, validation=validation, test=test, seed=seed)
    splits = {
        split: Split(p.images, {task: p.labels[:, t] for t, task in enumerate(DIGITS)})
        for split, p in pairs.items()
    }
    return Dataset(tuple(Task.of(t, "classification", 10) for t in DIGITS), splits)


@lru_cache(maxsize=1)
def tools(folder: Path | None, *, size: tuple[int, int] = (72, 96)) -> Dataset:
    """Load RGB-D pictures of hand tools: segmentation, depth in metres, normals."""
    npz = _npz(folder, "tools_rgbd_144x192.npz", "tools", "an archive of RGB-D pictures of tools")
    return _rgbd(npz, 1e4, size)


@lru_cache(maxsize=1)
def doom(folder: Path | None, *, size: tuple[int, int] = (112, 160)) -> Dataset:
    """Load views of a game's maps: segmentation, depth in units of 256 map units (8 m), normals.

    The first use renders them, see :mod:`benchmarks.quality.doom`; ``folder`` is not used.
    """
    return _rgbd(views.load(), 32, size)


@lru_cache(maxsize=2)
def digits(folder: Path | None, *, seed: int, **counts: int) -> Dataset:
    """Load MultiMNIST with three tasks for each digit, and two with permuted labels."""
    return questions(multimnist(folder, seed=seed, **counts), seed)


@lru_cache(maxsize=2)
def doom_copies(folder: Path | None, *, seed: int, size: tuple[int, int] = (112, 160)) -> Dataset:
    """Load the views of ``doom``, and a copy of each task with noisy training labels."""
    return with_copies(doom(folder, size=size), seed)


@lru_cache(maxsize=1)
def potholes(folder: Path | None, *, size: tuple[int, int] = (84, 140)) -> Dataset:
    """Load road pictures: segmentation of potholes, and disparity from 0 to 1."""
    file = "potholes_rgbd_168x280.npz"
    npz = _npz(folder, file, "potholes", "an archive of road pictures with stereo disparity")
    frames = {"train": npz["split"] == 0, "test": npz["split"] == 2}
    disparity = torch.from_numpy(npz["disparity"].astype(np.float32) / 65535).unsqueeze(1)
    splits = {}
    for split, chosen in frames.items():
        targets = {
            "segmentation": _classes(npz["seg"][chosen], size),
            "disparity": _values(disparity[chosen], size),
        }
        splits[split] = Split(_images(npz["image"][chosen], size), targets)
    tasks = (Task.of("segmentation", "segmentation", 2), Task.of("disparity", "disparity"))
    return Dataset(tasks, splits)


@lru_cache(maxsize=1)
def office_caltech(folder: Path | None) -> Dataset:
    """Load the SURF features of Office-Caltech-10: a task for each domain."""
    file = "office_caltech10_64.npz"
    npz = _npz(folder, file, "office_caltech", "an archive of Office-Caltech-10")
    label, domain, split = (npz[what] for what in ("label", "domain", "split"))
    values = torch.from_numpy(npz["surf800"].astype(np.float32))
    values = values / values.sum(1, keepdim=True).clamp(min=1)
    train = values[torch.from_numpy(split == 0)]
    values = (values - train.mean(0)) / train.std(0).clamp(min=1e-8)
    targets = torch.from_numpy(label).long()
    names = {d: str(npz["domain_names"][d]) for d in np.unique(domain)}
    splits = {}
    for code, name in enumerate(("train", "validation", "test")):
        rows = {n: torch.from_numpy((domain == d) & (split == code)) for d, n in names.items()}
        inputs = {n: values[r] for n, r in rows.items()}
        splits[name] = Split(inputs, {n: targets[r] for n, r in rows.items()})
    classes = len(npz["class_names"])
    return Dataset(tuple(Task.of(n, "classification", classes) for n in names.values()), splits)


LOADERS: dict[str, Callable[..., Dataset]] = {
    "multimnist": multimnist,
    "digits": digits,
    "tools": tools,
    "doom": doom,
    "doom_copies": doom_copies,
    "potholes": potholes,
    "office_caltech": office_caltech,
    "ud_ewt": ud_ewt,
    "tox21": tox21,
}
# They draw pairs, splits or noise.
SEEDED = ("multimnist", "digits", "doom_copies", "tox21")


def _npz(folder: Path | None, file: str, name: str, source: str) -> dict[str, np.ndarray]:
    with np.load(located(folder, file, name, source)) as archive:
        return dict(archive)


def _rgbd(npz: dict[str, np.ndarray], unit: float, size: tuple[int, int]) -> Dataset:
    """Return segmentation, depth and normals; ``unit``: stored depth that is 1."""
    splits = {}
    for code, split in enumerate(("train", "validation", "test")):
        chosen = npz["split"] == code
        depth = torch.from_numpy(npz["depth"][chosen].astype(np.float32) / unit)
        normal = _channels_first(npz["normal"][chosen].astype(np.float32))
        targets = {
            "segmentation": _classes(npz["seg"][chosen], size),
            "depth": _values(depth.unsqueeze(1), size),
            "normals": normalize(_values(normal, size), dim=1),
        }
        splits[split] = Split(_images(npz["image"][chosen], size), targets)
    classes = len(npz["class_names"])
    return Dataset(tuple(Task.of(t, t, classes) for t in RGBD_TASKS), splits)


def _channels_first(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).movedim(-1, 1)


def _images(values: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return ``(n, 3, *size)`` uint8, by area."""
    images = _channels_first(values)
    if images.shape[2:] == tuple(size):
        return images.contiguous()
    pooled = [adaptive_avg_pool2d(part.float(), size) for part in images.split(64)]
    return torch.cat(pooled).round().to(torch.uint8)


def _classes(values: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return ``(n, *size)`` int8, the nearest pixel."""
    classes = torch.from_numpy(values).unsqueeze(1).float()
    return interpolate(classes, size, mode="nearest-exact").squeeze(1).to(torch.int8)


def _values(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``(n, c, *size)``: means without missing pixels, which are zero in each channel."""
    there = (values != 0).any(1, keepdim=True).float()
    share = adaptive_avg_pool2d(there, size)
    return adaptive_avg_pool2d(values * there, size) / share.where(share > 0, 1)
