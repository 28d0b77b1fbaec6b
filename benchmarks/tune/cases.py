"""The tuned cases: a kernel at a shape, in a mode and a layout, and the stage that launches it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import SHAPES, Shape
from benchmarks.static_report import MODES, products_of, saliency
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import (
    Anchors,
    CSAGradient,
    Gram,
    LossGradient,
    TSRGradient,
)
from repmtl_kernels.backends.triton import tiles
from repmtl_kernels.backends.triton.operand import Operand
from repmtl_kernels.backends.triton.tiles import ANY, Sweep, Tile

# In the order in which they are tuned.
KERNELS = {
    "gram": "_gram_kernel",
    "gradient": "_gradient_kernel",
    "statistics": "_statistics_kernel",
    "pull": "_gradient_pull_kernel",
}
# The largest shapes decide, so they are the first in every mode.
LARGEST = ("nyuv2", "cityscapes")
OTHERS = ("vit1024", "vit196", "office49", "office1")


class Candidates(NamedTuple):
    """The tiles of a kernel on operands of these kinds; ``odd`` and ``rows`` as in a Rule."""

    kernel: str
    kinds: tuple[str, ...]
    odd: bool | None
    rows: tuple[int, int]
    tiles: tuple[Tile | Sweep, ...]


def _read(kernel: str, kinds: list, odd: bool | None, rows: list, fields: list) -> Candidates:
    sizes = (rows[0], ANY if rows[1] is None else rows[1])
    kind = tiles.KERNELS[kernel]
    return Candidates(kernel, tuple(kinds), odd, sizes, tuple(kind(*t) for t in fields))


# A tile is a list of the fields of a Tile or Sweep; the most promising of the largest shapes come
# first. Tiles that spill registers on sm_90 are left out; on another GPU more of them may spill.
FILE = Path(__file__).with_name("candidates.json")
CANDIDATES = tuple(_read(*group.values()) for group in json.loads(FILE.read_text()))


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


@dataclass(frozen=True)
class Case:
    kernel: str
    shape: Shape
    mode: str  # of MODES
    layout: str

    @property
    def dtype(self) -> torch.dtype:
        return MODES[self.mode][0]

    @property
    def candidates(self) -> tuple[Tile | Sweep, ...]:
        with products_of(self.mode):
            operand = _operand(self.shape, self.dtype)
        kind = operand.precision
        if self.kernel == "statistics" and kind != "16-bit":
            kind = "ieee"
        return candidates(self.kernel, kind, operand.is_odd, operand.rows)

    def __str__(self) -> str:
        return f"{self.kernel} {self.shape.name} {self.mode} {self.layout}"


def cases(
    shapes: Sequence[Shape],
    modes: Sequence[str],
    layouts: Sequence[str],
    kernels: Sequence[str] = tuple(KERNELS),
) -> list[Case]:
    """Return the decisive cases first: what a deadline leaves out is at the end."""
    decisive = [s for s in shapes if s.name not in OTHERS]
    others = [s for s in shapes if s.name in OTHERS]
    planned: list[Case] = []
    for layout, group in itertools.product(layouts, (decisive, others)):
        for mode, shape, kernel in itertools.product(modes, group, kernels):
            case = Case(kernel, shape, mode, layout)
            if _is_new(case, planned):
                planned.append(case)
    return planned


def _is_new(case: Case, before: list[Case]) -> bool:
    """Return whether there is such a kernel, and it is not the same as in a case before."""
    if case.kernel == "pull" and not _operand(case.shape, case.dtype).n_side:
        return False  # the C side has its result from the Gram stage
    same = [c for c in before if (c.kernel, c.shape) == (case.kernel, case.shape)]
    if case.shape.positions == 1:  # all layouts are the same memory
        same = [replace(c, layout=case.layout) for c in same]
    if case.kernel == "statistics":  # no products: float32 is the same in all its modes
        same = [replace(c, mode=case.mode) if c.dtype == case.dtype else c for c in same]
    return case not in same


def _operand(shape: Shape, dtype: torch.dtype) -> Operand:
    size = (shape.batch, shape.channels, shape.positions)
    return Operand.of(torch.empty(size, dtype=dtype, device="meta"))


def stage_of(case: Case, make: Callable[..., Tensor]) -> Callable[[], Sequence[Tensor | None]]:
    """Return the stage that launches the kernel, on inputs of order 1 of its own."""
    stages = choice.load("triton")
    s = case.shape
    saliencies = [saliency(s, case.dtype, case.layout, make) for _ in range(s.tasks)]
    if case.kernel == "statistics":
        return partial(stages.statistics, saliencies, positions=True, channels=True)
    operand = Operand.of(saliencies[0])
    side = s.positions if operand.n_side else s.channels
    make = partial(make, dtype=torch.float32)
    pairs, vectors = (s.tasks, s.batch), (s.tasks, s.batch, s.channels)
    scale = make(pairs).fill_(0.25)
    anchors = Anchors(unit=make(vectors), factor=make((s.batch,)), radial=make(vectors))
    if case.kernel == "gram":
        return partial(stages.gram, saliencies, scale, anchors.unit, eps=0.0, with_grad=True)
    csa = CSAGradient(
        scale=scale,
        anchors=anchors,
        contrast_grad=make(vectors),
        gram=Gram(
            similarity=make(pairs),
            inverse=make(pairs),
            # All terms of the gradient of like size: an error in any of them shows.
            slope=make(pairs) * operand.storage_factor,
            projection=make((*pairs, s.tasks, side)),
            matrix=make((*pairs, side, side), dtype=case.dtype),
        ),
        weight=make(pairs),
        of_loss=LossGradient(make(()), 1.0),
    )
    tsr = TSRGradient(make((*pairs, s.positions)), LossGradient(make(()), float(s.channels)))

    def gradient() -> list[Tensor]:
        outputs = [torch.empty_like(s) for s in saliencies]
        stages.saliency_grad(saliencies, outputs, csa, tsr)
        return outputs

    return gradient


def shape_of_size(tasks: int, batch: int, channels: int, positions: int) -> Shape:
    """Return a shape of the user's own; to the kernels H x W and N x 1 positions are the same."""
    name = f"T{tasks}-B{batch}-C{channels}-N{positions}"
    return Shape(name, tasks, batch, channels, positions, 1, batch, "own")


def shapes_named(names: Sequence[str]) -> list[Shape]:
    return [SHAPES[name] for name in (*LARGEST, *OTHERS) if name in names]
