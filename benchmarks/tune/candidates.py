"""Which tiles are tried, as data: by kernel, kind of number and size.

Those that spill registers on sm_90 are left out already; on another GPU more of them may. The most
promising of the largest shapes come first.
"""

from __future__ import annotations

from typing import NamedTuple

from repmtl_kernels.backends.triton.tiles import ANY, KINDS, Sweep, Tile


class Candidates(NamedTuple):
    """Of ``kernel`` on operands of these kinds and sizes; ``odd`` and ``rows`` as in a Rule."""

    kernel: str
    kinds: tuple[str, ...]
    odd: bool | None
    rows: tuple[int, int]
    tiles: tuple[Tile | Sweep, ...]


CANDIDATES = (
    Candidates("gram", ("16-bit",), False, (33, ANY), (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 3, tma=True),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 3, tma=True),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 4, tma=True),
        Tile(128, 256, 64, 16, 3, tma=True),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 128, 128, 8, 2),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 128, 64, 4, 3, tma=True),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 256, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    )),
    Candidates("gram", ("tf32",), False, (33, ANY), (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 128, 32, 8, 3, tma=True),
        Tile(64, 256, 32, 8, 3),
        Tile(64, 256, 32, 8, 3, tma=True),
        Tile(128, 128, 32, 8, 2),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 128, 32, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 2),
        Tile(64, 128, 32, 4, 3),
        Tile(64, 128, 32, 4, 4),
        Tile(64, 128, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(64, 64, 32, 4, 4),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 64, 8, 2),
    )),
    Candidates("gram", ("tf32x3",), False, (33, ANY), (
        Tile(128, 128, 32, 8, 2),
        Tile(128, 128, 32, 8, 3),
        Tile(128, 128, 16, 8, 3),
        Tile(64, 128, 32, 8, 2),
        Tile(64, 128, 32, 8, 3),
        Tile(64, 128, 32, 4, 3),
        Tile(64, 64, 32, 4, 2),
        Tile(64, 64, 32, 4, 3),
        Tile(64, 64, 32, 8, 3),
        Tile(64, 64, 16, 4, 3),
    )),
    Candidates("gram", ("ieee",), False, (33, ANY), (
        Tile(128, 128, 16, 8, 2),
        Tile(128, 128, 16, 8, 3),
        Tile(64, 128, 16, 8, 2, 128),
        Tile(64, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 2, 255),
        Tile(64, 64, 16, 4, 4, 255),
        Tile(64, 64, 16, 8, 3),
        Tile(64, 64, 32, 8, 2),
    )),
    Candidates("gram", ("16-bit",), True, (33, ANY), (
        Tile(64, 64, 32, 4, 3),
        Tile(64, 64, 32, 8, 2),
        Tile(64, 64, 64, 8, 2),
        Tile(64, 64, 64, 8, 3),
        Tile(64, 64, 16, 4, 4),
        Tile(64, 64, 16, 8, 4),
        Tile(32, 64, 64, 4, 3),
        Tile(32, 32, 64, 4, 3),
    )),
    Candidates("gram", ("tf32", "tf32x3", "ieee"), True, (33, ANY), (
        Tile(64, 64, 16, 4, 3),
        Tile(64, 64, 16, 8, 2),
        Tile(64, 64, 32, 8, 2),
        Tile(64, 64, 32, 8, 3),
        Tile(32, 64, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(32, 32, 64, 4, 2),
    )),
    Candidates("gram", KINDS, None, (1, 32), (
        Tile(16, 16, 32, 1, 3),
        Tile(16, 16, 64, 1, 3),
        Tile(16, 16, 64, 4, 3),
        Tile(16, 16, 128, 2, 3),
        Tile(32, 32, 16, 2, 3),
        Tile(32, 32, 32, 2, 3),
        Tile(32, 32, 64, 4, 3),
        Tile(16, 16, 128, 4, 3),
    )),
    Candidates("gradient", ("16-bit",), False, (33, ANY), (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 3, tma=True),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 3, tma=True),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 4, tma=True),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 3, tma=True),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 128, 8, 2),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 256, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    )),
    Candidates("gradient", ("tf32",), False, (33, ANY), (
        Tile(128, 256, 32, 8, 3),
        Tile(128, 256, 32, 8, 3, tma=True),
        Tile(128, 128, 32, 8, 3),
        Tile(128, 128, 32, 8, 3, tma=True),
        Tile(128, 256, 32, 8, 2),
        Tile(256, 128, 32, 8, 3),
        Tile(128, 128, 32, 8, 2),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 128, 64, 8, 2),
        Tile(64, 128, 32, 4, 3),
        Tile(64, 128, 32, 4, 4),
        Tile(64, 128, 32, 8, 3),
        Tile(64, 256, 32, 8, 3),
        Tile(64, 64, 32, 4, 4),
        Tile(64, 64, 64, 4, 3),
    )),
    Candidates("gradient", ("tf32x3",), False, (33, ANY), (
        Tile(128, 128, 32, 8, 2),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 128, 32, 8, 2),
        Tile(64, 128, 32, 8, 3),
        Tile(64, 128, 32, 4, 3),
        Tile(64, 64, 32, 4, 2),
        Tile(64, 64, 32, 8, 3),
        Tile(64, 64, 64, 4, 2),
    )),
    Candidates("gradient", ("16-bit",), True, (33, ANY), (
        Tile(64, 64, 32, 4, 3),
        Tile(64, 64, 32, 8, 2),
        Tile(64, 64, 64, 8, 2),
        Tile(64, 64, 64, 8, 3),
        Tile(64, 128, 32, 8, 2),
        Tile(64, 128, 32, 8, 3),
        Tile(64, 128, 64, 8, 2),
        Tile(64, 256, 16, 8, 2),
        Tile(32, 128, 64, 8, 2),
        Tile(32, 64, 64, 4, 2),
    )),
    Candidates("gradient", ("tf32", "tf32x3"), True, (33, ANY), (
        Tile(64, 64, 16, 4, 3),
        Tile(64, 64, 16, 8, 2),
        Tile(64, 64, 32, 8, 2),
        Tile(64, 64, 32, 8, 3),
        Tile(64, 64, 64, 8, 2),
        Tile(64, 128, 16, 8, 2),
        Tile(64, 128, 32, 8, 2),
        Tile(32, 128, 32, 8, 2),
    )),
    Candidates("gradient", ("ieee",), None, (33, ANY), (
        Tile(128, 128, 16, 8, 2),
        Tile(128, 128, 16, 8, 3),
        Tile(64, 128, 16, 8, 2),
        Tile(64, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 3),
        Tile(64, 64, 16, 8, 2),
        Tile(64, 64, 16, 8, 3),
        Tile(64, 64, 32, 8, 2),
    )),
    Candidates("gradient", KINDS, None, (1, 32), (
        Tile(16, 128, 16, 4, 2),
        Tile(16, 128, 16, 4, 3),
        Tile(16, 256, 16, 4, 2),
        Tile(16, 256, 16, 8, 2),
        Tile(16, 512, 16, 8, 2),
        Tile(32, 128, 32, 4, 2),
        Tile(32, 256, 32, 8, 2),
    )),
    Candidates("pull", ("16-bit",), None, (33, ANY), (
        Tile(64, 16, 64, 4, 3),
        Tile(64, 16, 64, 4, 6),
        Tile(64, 16, 128, 4, 3),
        Tile(64, 16, 128, 4, 4),
        Tile(64, 16, 256, 4, 2),
        Tile(128, 16, 64, 4, 4),
        Tile(128, 16, 64, 8, 4),
        Tile(128, 16, 128, 8, 3),
        Tile(32, 16, 128, 4, 4),
    )),
    Candidates("pull", ("tf32", "tf32x3", "ieee"), None, (33, ANY), (
        Tile(64, 16, 32, 4, 4),
        Tile(64, 16, 32, 4, 6),
        Tile(64, 16, 64, 4, 3),
        Tile(64, 16, 64, 4, 4),
        Tile(64, 16, 128, 4, 3),
        Tile(128, 16, 32, 4, 4),
        Tile(128, 16, 32, 8, 4),
        Tile(128, 16, 64, 8, 3),
        Tile(32, 16, 64, 4, 4),
    )),
    Candidates("pull", KINDS, None, (1, 32), (
        Tile(64, 16, 16, 4, 2),
        Tile(128, 16, 16, 4, 2),
        Tile(256, 16, 16, 4, 2),
        Tile(256, 16, 16, 8, 2),
        Tile(64, 16, 32, 4, 2),
        Tile(128, 16, 32, 4, 2),
    )),
    Candidates("statistics", ("16-bit", "ieee"), None, (1, ANY), (
        Sweep(4, 1056, 512, 4, None),
        Sweep(4, 2112, 512, 4, None),
        Sweep(4, 1056, 512, 8, None),
        Sweep(8, 528, 1024, 4, None),
        Sweep(8, 1056, 512, 4, None),
        Sweep(8, 1056, 256, 4, 128),
        Sweep(8, 2112, 512, 4, 128),
        Sweep(8, 1056, 1024, 4, 128),
        Sweep(8, 528, 2048, 4, 128),
        Sweep(8, 1056, 512, 8, 128),
        Sweep(16, 1056, 512, 4, None),
        Sweep(16, 528, 1024, 4, 255),
    )),
)  # fmt: skip


def candidates(kernel: str, kind: str, odd: bool, rows: int) -> tuple[Tile | Sweep, ...]:
    """The tiles to try, without that of the tables."""
    return tuple(
        tile
        for some in CANDIDATES
        if some.kernel == kernel
        and kind in some.kinds
        and some.odd in (None, odd)
        and some.rows[0] <= rows <= some.rows[1]
        for tile in some.tiles
    )


def shown(tile: Tile | Sweep) -> str:
    """For the reader: ``128x256x64 8 warps 3 stages``."""
    if isinstance(tile, Tile):
        text = f"{tile.rows}x{tile.columns}x{tile.depth} {tile.warps} warps {tile.stages} stages"
        text += " TMA" if tile.tma else ""
    else:
        text = f"{tile.deep} deep, {tile.most_rows} rows, {tile.programs} programs"
        text += f" {tile.warps} warps"
    return text if tile.registers is None else f"{text} {tile.registers} registers"
