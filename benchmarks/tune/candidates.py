"""Which tiles are tried, by kernel, kind of number and size: ``candidates.json``.

A tile is a list of the fields of a Tile or Sweep. Tiles that spill registers on sm_90 are left out
already; on another GPU more of them may spill. The most promising of the largest shapes come first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from repmtl_kernels.backends.triton.tiles import ANY, KERNELS, Sweep, Tile


class Candidates(NamedTuple):
    """The tiles of a kernel on operands of these kinds; ``odd`` and ``rows`` as in a Rule."""

    kernel: str
    kinds: tuple[str, ...]
    odd: bool | None
    rows: tuple[int, int]
    tiles: tuple[Tile | Sweep, ...]


def _read(kernel: str, kinds: list, odd: bool | None, rows: list, tiles: list) -> Candidates:
    sizes = (rows[0], ANY if rows[1] is None else rows[1])
    kind = KERNELS[kernel]
    return Candidates(kernel, tuple(kinds), odd, sizes, tuple(kind(*tile) for tile in tiles))


FILE = Path(__file__).with_name("candidates.json")
CANDIDATES = tuple(_read(**group) for group in json.loads(FILE.read_text()))


def candidates(kernel: str, kind: str, odd: bool, rows: int) -> tuple[Tile | Sweep, ...]:
    """Return the tiles to try, without the one of the tables."""
    return tuple(
        tile
        for group in CANDIDATES
        if group.kernel == kernel
        and kind in group.kinds
        and group.odd in (None, odd)
        and group.rows[0] <= rows <= group.rows[1]
        for tile in group.tiles
    )


def shown(tile: Tile | Sweep) -> str:
    """Return a tile in words: ``128x256x64 8 warps 3 stages``."""
    if isinstance(tile, Tile):
        text = f"{tile.rows}x{tile.columns}x{tile.depth} {tile.warps} warps {tile.stages} stages"
        text += " TMA" if tile.tma else ""
    else:
        text = f"{tile.deep} deep, {tile.most_rows} rows, {tile.programs} programs"
        text += f" {tile.warps} warps"
    return text if tile.registers is None else f"{text} {tile.registers} registers"
