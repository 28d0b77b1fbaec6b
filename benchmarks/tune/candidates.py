"""Which tiles are tried, as data: by kernel, kind of number and size.

Tiles that spill registers on sm_90 are left out already; on another GPU more of them may spill. The most
promising of the largest shapes come first.
"""

from __future__ import annotations

from typing import NamedTuple

from repmtl_kernels.backends.triton.tiles import ANY, KINDS, Sweep, Tile


class Candidates(NamedTuple):
    """The tiles of a kernel on operands of these kinds; ``odd`` and ``rows`` as in a Rule."""

    kernel: str
    kinds: tuple[str, ...]
    odd: bool | None
    rows: tuple[int, int]
    tiles: tuple[Tile | Sweep, ...]


T, S = Tile, Sweep
CANDIDATES = (
    Candidates("gram", ("16-bit",), False, (33, ANY), (
        T(128, 256, 64, 8, 3), T(128, 256, 64, 8, 3, tma=True), T(128, 128, 64, 8, 3),
        T(128, 128, 64, 8, 3, tma=True), T(128, 256, 64, 8, 4), T(128, 256, 64, 8, 4, tma=True),
        T(128, 256, 64, 16, 3, tma=True), T(128, 128, 64, 8, 4), T(128, 128, 64, 8, 4, tma=True),
        T(128, 128, 128, 8, 2), T(64, 128, 64, 4, 3), T(64, 128, 64, 4, 3, tma=True),
        T(64, 128, 64, 4, 4), T(64, 256, 64, 8, 3), T(64, 64, 64, 4, 3), T(64, 64, 64, 4, 4),
    )),
    Candidates("gram", ("tf32",), False, (33, ANY), (
        T(128, 128, 32, 8, 3), T(128, 128, 32, 8, 3, tma=True), T(64, 256, 32, 8, 3),
        T(64, 256, 32, 8, 3, tma=True), T(128, 128, 32, 8, 2), T(128, 128, 32, 8, 4),
        T(128, 128, 32, 8, 4, tma=True), T(128, 128, 64, 8, 2), T(64, 128, 32, 4, 3),
        T(64, 128, 32, 4, 4), T(64, 128, 32, 8, 3), T(64, 64, 32, 4, 3), T(64, 64, 32, 4, 4),
        T(64, 64, 64, 4, 3), T(64, 64, 64, 8, 2),
    )),
    Candidates("gram", ("tf32x3",), False, (33, ANY), (
        T(128, 128, 32, 8, 2), T(128, 128, 32, 8, 3), T(128, 128, 16, 8, 3), T(64, 128, 32, 8, 2),
        T(64, 128, 32, 8, 3), T(64, 128, 32, 4, 3), T(64, 64, 32, 4, 2), T(64, 64, 32, 4, 3),
        T(64, 64, 32, 8, 3), T(64, 64, 16, 4, 3),
    )),
    Candidates("gram", ("ieee",), False, (33, ANY), (
        T(128, 128, 16, 8, 2), T(128, 128, 16, 8, 3), T(64, 128, 16, 8, 2, 128),
        T(64, 128, 16, 8, 3), T(64, 64, 16, 4, 2, 255), T(64, 64, 16, 4, 4, 255),
        T(64, 64, 16, 8, 3), T(64, 64, 32, 8, 2),
    )),
    Candidates("gram", ("16-bit",), True, (33, ANY), (
        T(64, 64, 32, 4, 3), T(64, 64, 32, 8, 2), T(64, 64, 64, 8, 2), T(64, 64, 64, 8, 3),
        T(64, 64, 16, 4, 4), T(64, 64, 16, 8, 4), T(32, 64, 64, 4, 3), T(32, 32, 64, 4, 3),
    )),
    Candidates("gram", ("tf32", "tf32x3", "ieee"), True, (33, ANY), (
        T(64, 64, 16, 4, 3), T(64, 64, 16, 8, 2), T(64, 64, 32, 8, 2), T(64, 64, 32, 8, 3),
        T(32, 64, 32, 4, 3), T(32, 32, 32, 4, 3), T(32, 32, 64, 4, 2),
    )),
    Candidates("gram", KINDS, None, (1, 32), (
        T(16, 16, 32, 1, 3), T(16, 16, 64, 1, 3), T(16, 16, 64, 4, 3), T(16, 16, 128, 2, 3),
        T(32, 32, 16, 2, 3), T(32, 32, 32, 2, 3), T(32, 32, 64, 4, 3), T(16, 16, 128, 4, 3),
    )),
    Candidates("gradient", ("16-bit",), False, (33, ANY), (
        T(128, 256, 64, 8, 3), T(128, 256, 64, 8, 3, tma=True), T(128, 128, 64, 8, 3),
        T(128, 128, 64, 8, 3, tma=True), T(128, 256, 64, 8, 4), T(128, 256, 64, 8, 4, tma=True),
        T(256, 128, 64, 8, 3), T(256, 128, 64, 8, 3, tma=True), T(128, 128, 64, 8, 4),
        T(128, 128, 128, 8, 2), T(64, 128, 64, 4, 3), T(64, 128, 64, 4, 4), T(64, 256, 64, 8, 3),
        T(64, 64, 64, 4, 3), T(64, 64, 64, 4, 4),
    )),
    Candidates("gradient", ("tf32",), False, (33, ANY), (
        T(128, 256, 32, 8, 3), T(128, 256, 32, 8, 3, tma=True), T(128, 128, 32, 8, 3),
        T(128, 128, 32, 8, 3, tma=True), T(128, 256, 32, 8, 2), T(256, 128, 32, 8, 3),
        T(128, 128, 32, 8, 2), T(128, 128, 32, 8, 4), T(128, 128, 64, 8, 2), T(64, 128, 32, 4, 3),
        T(64, 128, 32, 4, 4), T(64, 128, 32, 8, 3), T(64, 256, 32, 8, 3), T(64, 64, 32, 4, 4),
        T(64, 64, 64, 4, 3),
    )),
    Candidates("gradient", ("tf32x3",), False, (33, ANY), (
        T(128, 128, 32, 8, 2), T(128, 128, 32, 8, 3), T(64, 128, 32, 8, 2), T(64, 128, 32, 8, 3),
        T(64, 128, 32, 4, 3), T(64, 64, 32, 4, 2), T(64, 64, 32, 8, 3), T(64, 64, 64, 4, 2),
    )),
    Candidates("gradient", ("16-bit",), True, (33, ANY), (
        T(64, 64, 32, 4, 3), T(64, 64, 32, 8, 2), T(64, 64, 64, 8, 2), T(64, 64, 64, 8, 3),
        T(64, 128, 32, 8, 2), T(64, 128, 32, 8, 3), T(64, 128, 64, 8, 2), T(64, 256, 16, 8, 2),
        T(32, 128, 64, 8, 2), T(32, 64, 64, 4, 2),
    )),
    Candidates("gradient", ("tf32", "tf32x3"), True, (33, ANY), (
        T(64, 64, 16, 4, 3), T(64, 64, 16, 8, 2), T(64, 64, 32, 8, 2), T(64, 64, 32, 8, 3),
        T(64, 64, 64, 8, 2), T(64, 128, 16, 8, 2), T(64, 128, 32, 8, 2), T(32, 128, 32, 8, 2),
    )),
    Candidates("gradient", ("ieee",), None, (33, ANY), (
        T(128, 128, 16, 8, 2), T(128, 128, 16, 8, 3), T(64, 128, 16, 8, 2), T(64, 128, 16, 8, 3),
        T(64, 64, 16, 4, 3), T(64, 64, 16, 8, 2), T(64, 64, 16, 8, 3), T(64, 64, 32, 8, 2),
    )),
    Candidates("gradient", KINDS, None, (1, 32), (
        T(16, 128, 16, 4, 2), T(16, 128, 16, 4, 3), T(16, 256, 16, 4, 2), T(16, 256, 16, 8, 2),
        T(16, 512, 16, 8, 2), T(32, 128, 32, 4, 2), T(32, 256, 32, 8, 2),
    )),
    Candidates("pull", ("16-bit",), None, (33, ANY), (
        T(64, 16, 64, 4, 3), T(64, 16, 64, 4, 6), T(64, 16, 128, 4, 3), T(64, 16, 128, 4, 4),
        T(64, 16, 256, 4, 2), T(128, 16, 64, 4, 4), T(128, 16, 64, 8, 4), T(128, 16, 128, 8, 3),
        T(32, 16, 128, 4, 4),
    )),
    Candidates("pull", ("tf32", "tf32x3", "ieee"), None, (33, ANY), (
        T(64, 16, 32, 4, 4), T(64, 16, 32, 4, 6), T(64, 16, 64, 4, 3), T(64, 16, 64, 4, 4),
        T(64, 16, 128, 4, 3), T(128, 16, 32, 4, 4), T(128, 16, 32, 8, 4), T(128, 16, 64, 8, 3),
        T(32, 16, 64, 4, 4),
    )),
    Candidates("pull", KINDS, None, (1, 32), (
        T(64, 16, 16, 4, 2), T(128, 16, 16, 4, 2), T(256, 16, 16, 4, 2), T(256, 16, 16, 8, 2),
        T(64, 16, 32, 4, 2), T(128, 16, 32, 4, 2),
    )),
    Candidates("statistics", ("16-bit", "ieee"), None, (1, ANY), (
        S(4, 1056, 512, 4, None), S(4, 2112, 512, 4, None), S(4, 1056, 512, 8, None),
        S(8, 528, 1024, 4, None), S(8, 1056, 512, 4, None), S(8, 1056, 256, 4, 128),
        S(8, 2112, 512, 4, 128), S(8, 1056, 1024, 4, 128), S(8, 528, 2048, 4, 128),
        S(8, 1056, 512, 8, 128), S(16, 1056, 512, 4, None), S(16, 528, 1024, 4, 255),
    )),
)  # fmt: skip


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
