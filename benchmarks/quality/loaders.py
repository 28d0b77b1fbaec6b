"""The data sets by name; each needs a folder and its options, and says which file is missing."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from benchmarks.multimnist import TASKS as DIGITS
from benchmarks.multimnist import load_mnist
from benchmarks.multimnist import multimnist as pairs_of_digits
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.tasks import UNLABELLED, Task

FOLDER_VARIABLE = "REPMTL_DATA"

RGBD_TASKS = ("segmentation", "depth", "normals")
MTAN_SOURCE = (
    "the preprocessed .npy files of MTAN (github.com/lorenmt/mtan, README, section Datasets): "
    "train/ and val/, each with image/, label/, depth/ {normals}of 0.npy, 1.npy, ..."
)
OFFICE = {
    "office31": (
        ("amazon", "dslr", "webcam"),
        "Office-31 (Saenko et al. 2010): <domain>/images/<class>/*.jpg",
    ),
    "office_home": (
        ("Art", "Clipart", "Product", "Real_World"),
        "Office-Home (Venkateswara et al. 2017): <domain>/<class>/*.jpg",
    ),
}
# Copies of the data set spell this domain differently.
SPELLINGS = {"Real_World": ("Real_World", "Real World", "RealWorld")}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


class MissingDataError(FileNotFoundError):
    """A file of a data set is not where it should be."""

    def __init__(self, path: Path | None, what: str, source: str) -> None:
        where = f"{path} does not exist" if path else f"no folder was given ({FOLDER_VARIABLE})"
        super().__init__(f"{what}: {where}. It is {source}. Name its folder with --data")


def data_folder(option: str | Path | None) -> Path | None:
    """Return the folder of the data: from the option, or from the environment."""
    folder = option or os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def load(name: str, folder: Path | None, seed: int, **options) -> Dataset:
    """Return the data set of this name; ``seed`` decides what is drawn, in MultiMNIST the pairs."""
    if name not in LOADERS:
        raise ValueError(f"data.name: expected one of {', '.join(LOADERS)}; got {name!r}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    loader = LOADERS[name]
    known = [p for p in inspect.signature(loader).parameters if p not in ("folder", "seed")]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"data.{unknown[0]}: {name} has only the options {', '.join(known)}")
    seeded = {"seed": seed} if "seed" in inspect.signature(loader).parameters else {}
    return loader(folder, **seeded, **options)


# --- data that we have ---


@lru_cache(maxsize=2)
def multimnist(
    folder: Path | None, *, seed: int, train: int = 8000, validation: int = 1000, test: int = 4000
) -> Dataset:
    """Load two overlaid digits; training, validation and test pairs from disjoint sets of images."""
    pairs = pairs_of_digits(*load_mnist(), train=train, validation=validation, test=test, seed=seed)
    splits = {
        split: Split(p.images, {task: p.labels[:, t] for t, task in enumerate(DIGITS)})
        for split, p in pairs.items()
    }
    return Dataset(tuple(Task.of(t, "classification", 10) for t in DIGITS), splits)


@lru_cache(maxsize=1)
def tools(
    folder: Path | None, *, size: tuple[int, int] = (72, 96), segmentation_only: bool = False
) -> Dataset:
    """Load RGB-D pictures of hand tools: segmentation, depth in metres, normals.

    segmentation_only: with the training frames that have no depth and no normals.
    """
    npz = _npz(folder, "tools_rgbd_144x192.npz", "tools", "an archive of RGB-D pictures of tools")
    frames = {"train": npz["split"] == 0, "validation": npz["split"] == 1}
    frames["test"] = npz["split"] == 2
    if segmentation_only:
        frames["train"] |= npz["split"] == 3
    depth = npz["depth"].astype(np.float32) / 1e4
    normal = npz["normal"].astype(np.float32)
    depth[~npz["has_depth"]] = 0
    normal[~npz["has_depth"]] = 0
    splits = {}
    for split, chosen in frames.items():
        targets = {
            "segmentation": _classes(npz["seg"][chosen], size),
            "depth": _values(torch.from_numpy(depth[chosen]).unsqueeze(1), size),
            "normals": _unit(_values(_channels_first(normal[chosen]), size)),
        }
        splits[split] = Split(_images(npz["image"][chosen], size), targets)
    classes = len(npz["class_names"])
    return Dataset(tuple(Task.of(t, t, classes) for t in RGBD_TASKS), splits)


@lru_cache(maxsize=1)
def potholes(
    folder: Path | None, *, size: tuple[int, int] = (84, 140), validation: int = 0
) -> Dataset:
    """Load road pictures: segmentation of potholes, and disparity from 0 to 1.

    validation: how many of the training frames, evenly spaced, are held out.
    """
    file = "potholes_rgbd_168x280.npz"
    npz = _npz(folder, file, "potholes", "an archive of road pictures with stereo disparity")
    train = np.flatnonzero(npz["split"] == 0)
    held_out = train[np.linspace(0, len(train) - 1, validation).round().astype(int)]
    frames = {"train": np.setdiff1d(train, held_out), "test": np.flatnonzero(npz["split"] == 2)}
    if validation:
        frames["validation"] = held_out
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


@lru_cache(maxsize=2)
def office_caltech(folder: Path | None, *, inputs: str = "surf", side: int = 64) -> Dataset:
    """Load Office-Caltech-10: a task per domain, from images or from SURF or GoogLeNet features."""
    arrays = {"images": "image", "surf": "surf800", "googlenet": "googlenet1024"}
    if inputs not in arrays:
        raise ValueError(f"inputs: expected one of {', '.join(arrays)}; got {inputs!r}")
    file = "office_caltech10_64.npz"
    npz = _npz(folder, file, "office_caltech", "an archive of Office-Caltech-10")
    of = "googlenet_" if inputs == "googlenet" else ""
    label, domain, split = (npz[f"{of}{what}"] for what in ("label", "domain", "split"))
    if inputs == "images":
        values = _images(npz["image"], (side, side))
    else:
        values = torch.from_numpy(npz[arrays[inputs]].astype(np.float32))
        if inputs == "surf":
            values = values / values.sum(1, keepdim=True).clamp(min=1)
        train = values[torch.from_numpy(split == 0)]
        values = (values - train.mean(0)) / train.std(0).clamp(min=1e-8)
    names = {d: str(npz["domain_names"][d]) for d in np.unique(domain)}
    splits = {}
    for code, name in enumerate(SHARES):
        rows = {n: torch.from_numpy((domain == d) & (split == code)) for d, n in names.items()}
        targets = torch.from_numpy(label).long()
        splits[name] = Split(
            {n: values[r] for n, r in rows.items()}, {n: targets[r] for n, r in rows.items()}
        )
    classes = len(npz["class_names"])
    return Dataset(tuple(Task.of(n, "classification", classes) for n in names.values()), splits)


# --- the field's own formats ---


@lru_cache(maxsize=1)
def nyuv2(folder: Path | None) -> Dataset:
    """Load NYUv2 as MTAN prepared it: 13 classes, depth, normals."""
    return _mtan(folder, "nyuv2", 13, RGBD_TASKS)


@lru_cache(maxsize=1)
def cityscapes(folder: Path | None) -> Dataset:
    """Load Cityscapes as MTAN prepared it: 7 classes and (inverse) depth."""
    return _mtan(folder, "cityscapes", 7, RGBD_TASKS[:2])


@lru_cache(maxsize=1)
def office31(folder: Path | None, *, side: int = 224) -> Dataset:
    """Load Office-31."""
    return _office(folder, "office31", side)


@lru_cache(maxsize=1)
def office_home(folder: Path | None, *, side: int = 224) -> Dataset:
    """Load Office-Home."""
    return _office(folder, "office_home", side)


LOADERS: dict[str, Callable[..., Dataset]] = {
    loader.__wrapped__.__name__: loader
    for loader in (
        multimnist, tools, potholes, office_caltech, nyuv2, cityscapes, office31, office_home,
    )
}  # fmt: skip


def _mtan(folder: Path | None, name: str, classes: int, tasks: Sequence[str]) -> Dataset:
    source = MTAN_SOURCE.format(normals="and normal/ " if "normals" in tasks else "")
    root = _existing(folder and folder / name, name, source)
    splits = {}
    for split, where in (("train", "train"), ("test", "val")):
        images = _existing(root / where / "image", name, source)
        count = len(list(images.glob("*.npy")))
        if not count:
            raise MissingDataError(images / "0.npy", name, source)
        # Older preparations of Cityscapes have one folder for each number of classes.
        labels = root / where / f"label_{classes}"
        labels = labels if labels.is_dir() else root / where / "label"

        def stack(where: Path, count: int = count) -> Tensor:
            files = [_existing(where / f"{i}.npy", name, source) for i in range(count)]
            return torch.stack([torch.from_numpy(np.load(file)) for file in files])

        label = stack(labels).long()
        targets = {
            "segmentation": label.where(label < classes, UNLABELLED).clamp(min=UNLABELLED).char(),
            "depth": stack(root / where / "depth").float().flatten(3).movedim(-1, 1),
        }
        if "normals" in tasks:
            targets["normals"] = stack(root / where / "normal").float().movedim(-1, 1)
        splits[split] = Split(stack(images).float().movedim(-1, 1), targets)
    return Dataset(tuple(Task.of(t, t, classes) for t in tasks), splits)


def _office(folder: Path | None, name: str, side: int) -> Dataset:
    """Load the images of each domain, split 60/20/20 in each class by file name and seed 0."""
    domains, source = OFFICE[name]
    root = _existing(folder and folder / name, name, source)
    inputs: dict[str, dict[str, Tensor]] = {split: {} for split in SHARES}
    targets: dict[str, dict[str, Tensor]] = {split: {} for split in SHARES}
    classes = 0
    for domain in domains:
        where = _existing(_spelled(root, domain), name, source)
        where = where / "images" if (where / "images").is_dir() else where
        folders = sorted(p for p in where.iterdir() if p.is_dir())
        if not folders:
            raise MissingDataError(where / "<class>", name, source)
        classes = max(classes, len(folders))
        for split, files in _split(folders).items():
            inputs[split][domain] = torch.stack([_image(file, side) for file, _ in files])
            targets[split][domain] = torch.tensor([label for _, label in files])
    splits = {split: Split(inputs[split], targets[split]) for split in SHARES}
    return Dataset(tuple(Task.of(d, "classification", classes) for d in domains), splits)


def _split(folders: list[Path]) -> dict[str, list[tuple[Path, int]]]:
    """Return files and labels of each split; a folder for each class."""
    splits: dict[str, list[tuple[Path, int]]] = {split: [] for split in SHARES}
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        start = 0.0
        for split, share in SHARES.items():
            end = start + share
            places = order[round(start * len(files)) : round(end * len(files))]
            splits[split] += [(files[i], label) for i in places]
            start = end
    return splits


def _spelled(root: Path, domain: str) -> Path:
    spellings = [root / s for s in SPELLINGS.get(domain, (domain,))]
    return next((path for path in spellings if path.exists()), spellings[0])


def _image(file: Path, side: int) -> Tensor:
    """Return ``(3, side, side)`` uint8."""
    from PIL import Image

    with Image.open(file) as image:
        pixels = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).movedim(-1, 0)


# --- arrays ---


def _npz(folder: Path | None, file: str, name: str, source: str):
    path = _existing(folder and folder / file, name, f"{file}, {source}")
    with np.load(path) as archive:
        return dict(archive)


def _existing(path: Path | None, name: str, source: str) -> Path:
    if path is None or not path.exists():
        raise MissingDataError(path, name, source)
    return path


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
    """Return ``(n, c, *size)``: means of the pixels that are not missing (zero in each channel)."""
    there = (values != 0).any(1, keepdim=True).float()
    share = adaptive_avg_pool2d(there, size)
    return adaptive_avg_pool2d(values * there, size) / share.where(share > 0, 1)


def _unit(vectors: Tensor) -> Tensor:
    """Return unit vectors; a zero stays zero."""
    return torch.nn.functional.normalize(vectors, dim=1)
