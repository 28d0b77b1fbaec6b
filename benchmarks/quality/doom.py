"""Views of first-person maps with dense labels, which ViZDoom renders on a CPU in two minutes.

The package ``vizdoom`` carries Freedoom's 68 maps. Each gives up to 18 views from random places:
image, segmentation, depth and surface normals. A map belongs to one split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.machine import ROOT
from benchmarks.quality.doom_geometry import CLASSES
from benchmarks.quality.doom_views import Map, views_of
from benchmarks.quality.files import write

CACHE = ROOT / "build" / "quality" / "doom_112x160.npz"
VIEWS = 18  # of each map
# Number of maps of each split, in the order of the codes 0, 1 and 2.
SPLITS = {"train": 40, "validation": 8, "test": 20}


def load(cache: Path | None = None, places: Sequence[Map] | None = None) -> dict[str, np.ndarray]:
    """Return all views, rendered on first use and read from the cache after that.

    The fields of ``View``, stacked; ``map`` and ``split`` ``(n,)``; ``class_names``, ``map_names``.
    ``places``: the maps to render, with a cache of their own; None: all.
    ModuleNotFoundError: they have to be rendered, and a package is missing.
    """
    cache = cache or CACHE
    if not cache.exists():
        views = render(places or maps())
        write(cache, lambda path: _save(path, views))
    with np.load(cache) as archive:
        return dict(archive)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a name, numpy would change its ending
        np.savez_compressed(file, **arrays)


def maps() -> list[Map]:
    """Return all maps in random order: first those of train, then validation and test."""
    names = [("freedoom2.wad", f"map{n:02d}") for n in range(1, 33)]
    names += [("freedoom1.wad", f"E{e}M{m}") for e in range(1, 5) for m in range(1, 10)]
    order = np.random.default_rng(0).permutation(len(names)).tolist()
    codes = np.repeat(range(len(SPLITS)), list(SPLITS.values())).tolist()
    return [Map(n, *names[n], code) for n, code in zip(order, codes, strict=True)]


def render(places: Sequence[Map]) -> dict[str, np.ndarray]:
    """Render all views of these maps, with a progress bar."""
    try:
        import vizdoom  # noqa: F401
        from tqdm import tqdm
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"doom: its views are rendered on first use, and {missing.name} is not installed: "
            "pip install vizdoom tqdm"
        ) from missing
    arrays = defaultdict(list)
    for place in (bar := tqdm(places, desc="doom: rendering", unit="map")):
        bar.set_postfix_str(place.name)
        for view in views_of(place, VIEWS):
            for key, value in view._asdict().items():
                arrays[key].append(value)
            arrays["map"].append(np.uint8(place.number))
            arrays["split"].append(np.uint8(place.split))
    names = [f"{place.wad}/{place.name}" for place in sorted(maps())]
    stacked = {key: np.array(values) for key, values in arrays.items()}
    return {"class_names": np.array(CLASSES), "map_names": np.array(names), **stacked}
