"""Views of a game's maps: geometry on maps drawn here, splits, the cache, and a few real views."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks.quality import doom, loaders
from benchmarks.quality import doom_geometry as geometry


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[tuple[float, ...]]:
    return [(x1, y1, x2, y1), (x2, y1, x2, y2), (x2, y2, x1, y2), (x1, y2, x1, y1)]


# Two rooms side by side, with a common line at x = 100.
LINES = np.array(rectangle(0, 0, 100, 100) + rectangle(100, 0, 300, 100), float)
OWNER = np.repeat([0, 1], 4)


@pytest.mark.parametrize(
    ("point", "sector"), [((50, 50), 0), ((150, 20), 1), ((350, 50), -1), ((-1, 50), -1)]
)
def test_a_point_is_in_its_sector(point, sector):
    assert geometry.sector_of(np.array(point), LINES, OWNER) == sector


def test_a_point_in_two_sectors_is_in_none():
    lines = np.concatenate([LINES, np.array(rectangle(20, 20, 80, 80), float)])
    owner = np.repeat([0, 1, 2], 4)
    assert geometry.sector_of(np.array([50, 50]), lines, owner) == -1
    assert geometry.sector_of(np.array([10, 50]), lines, owner) == 0


def test_the_distance_is_to_a_line_or_its_end():
    line = np.array([[0.0, 0, 10, 0], [0, 50, 10, 50]])
    assert geometry.distance(np.array([5, 3]), line) == pytest.approx(3)
    assert geometry.distance(np.array([13, -4]), line) == pytest.approx(5)


def test_a_line_between_equal_sectors_is_no_wall():
    level = np.array([[0.0, 128], [0, 128]])
    assert len(geometry.walls(LINES, OWNER, level)) == 6
    stepped = np.array([[0.0, 128], [24, 128]])
    assert len(geometry.walls(LINES, OWNER, stepped)) == 8


def view_of(line, *, position=(0, 0), angle=0.0, size=(4, 8)) -> tuple[np.ndarray, np.ndarray]:
    """Return normals and classes where the upper half sees this wall and the lower the floor."""
    height, width = size
    start, end = (np.subtract(p, position) for p in (line[:2], line[2:]))
    forward = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
    right = np.array([forward[1], -forward[0]])
    slopes = (np.arange(width) + 0.5 - width / 2) / (width / 2)
    # start + t (end - start) = z (forward + slope right), for t and z.
    z = [np.linalg.solve(np.stack([start - end, forward + s * right], 1), start)[1] for s in slopes]
    depth = np.tile((np.array(z) / geometry.DEPTH_UNIT).round(), (height, 1))
    classes = np.full(size, geometry.WALL, np.uint8)
    classes[height // 2 :] = geometry.FLOOR
    lines = np.array([line], float)
    return geometry.normals(classes, depth, lines, np.array(position), angle), classes


@pytest.mark.parametrize("reverse", [False, True])
def test_a_wall_ahead_faces_the_camera(reverse):
    line = (200, -900, 200, 900)
    normals, classes = view_of(line[2:] + line[:2] if reverse else line)
    np.testing.assert_allclose(normals[classes == geometry.WALL], [[0, 0, -1]] * 16, atol=1e-6)
    np.testing.assert_allclose(normals[classes == geometry.FLOOR], [[0, -1, 0]] * 16)


def test_the_normal_is_in_the_turned_camera():
    """The same wall, from a camera that is turned to the left by 30 degrees."""
    normals, classes = view_of((200, -900, 200, 900), position=(10, -20), angle=30.0)
    seen = normals[classes == geometry.WALL]
    # The wall's normal points back along -x, which is now to the left and behind.
    expected = [-np.sin(np.deg2rad(30)), 0, -np.cos(np.deg2rad(30))]
    np.testing.assert_allclose(seen, [expected] * len(seen), atol=1e-6)


def test_sprites_face_the_camera_and_what_meets_no_line_has_no_normal():
    classes = np.array([[geometry.WALL, geometry.CEILING, geometry.MONSTER, geometry.SCENERY]])
    depth = np.full((1, 4), 100)  # the only line is at 80 map units, not at 800
    line = np.array([[80.0, -900, 80, 900]])
    found = geometry.normals(classes, depth, line, np.zeros(2), 0.0)
    assert found.tolist() == [[[0, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, -1]]]


def test_a_map_is_in_one_split():
    places = doom.maps()
    assert len({(p.wad, p.name) for p in places}) == len({p.number for p in places}) == 68
    assert np.bincount([p.split for p in places]).tolist() == list(doom.SPLITS.values())
    assert doom.maps() == places


def made(count: int = 6, size: tuple[int, int] = (4, 8)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    normal = np.zeros((count, *size, 3), np.int8)
    normal[..., 2] = -127
    normal[:, 0] = 0
    depth = np.full((count, *size), 64, np.uint8)
    depth[:, :, :2] = 0
    return {
        "image": random.integers(0, 256, (count, *size, 3), np.uint8),
        "seg": random.integers(0, 6, (count, *size), np.uint8),
        "depth": depth, "normal": normal, "split": np.arange(count) * 3 // count,
        "class_names": np.array(geometry.CLASSES),
    }  # fmt: skip


def test_views_are_rendered_once_and_cached(tmp_path, monkeypatch):
    rendered = []
    monkeypatch.setattr(doom, "render", lambda places: rendered.append(places) or made())
    cache = tmp_path / "of_studies" / "views.npz"
    first, second = doom.load(cache), doom.load(cache)
    assert rendered == [doom.maps()] and list(cache.parent.iterdir()) == [cache]
    for views in (first, second):
        assert views.keys() == made().keys()
        assert all((views[k] == v).all() for k, v in made().items())


def test_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(doom, "render", lambda places: made())
    monkeypatch.setattr(doom, "CACHE", tmp_path / "views.npz")
    loaders.doom.cache_clear()
    data = loaders.load("doom", None, 0, size=[2, 4])
    loaders.doom.cache_clear()
    assert data.names == ["segmentation", "depth", "normals"]
    assert [len(data.splits[s].inputs) for s in doom.SPLITS] == [2, 2, 2]
    targets = data.splits["test"].targets
    # 64 steps of the depth buffer are 512 map units; what is missing is 0 and in no mean.
    assert targets["depth"][0, 0].tolist() == [[0, 2, 2, 2]] * 2
    assert (targets["normals"][:, 2] == -1).all() and (targets["normals"][:, :2] == 0).all()


@pytest.mark.parametrize("package", ["vizdoom", "tqdm"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    pytest.importorskip("vizdoom")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"doom: .*{package} is not.*pip install vizdoom"):
        doom.load(tmp_path / "views.npz")
    assert not list(tmp_path.iterdir())


def test_real_views():
    pytest.importorskip("vizdoom")
    for image, seg, depth, normal in doom.views_of(doom.maps()[0], 2):
        assert image.shape == normal.shape == (112, 160, 3) and seg.shape == depth.shape
        assert image.std() > 5 and depth.max() >= 25
        # The floor is below the horizon, the ceiling above.
        assert (seg[:56] != geometry.FLOOR).all() and (seg[56:] != geometry.CEILING).all()
        lengths = np.linalg.norm(normal / 127, axis=2)
        assert ((lengths == 0) | (abs(lengths - 1) < 0.02)).all()
        assert (normal[seg == geometry.FLOOR] == [0, -127, 0]).all()
        # A wall's normal is level, and points to the camera.
        wall = (seg == geometry.WALL) & (lengths > 0)
        slope = (np.arange(160) + 0.5 - 80) / 80
        assert wall.any() and (normal[wall][:, 1] == 0).all()
        assert ((normal[..., 0] * slope + normal[..., 2])[wall] < 1).all()
