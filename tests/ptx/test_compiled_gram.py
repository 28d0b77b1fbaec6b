"""Parts of the matrix kernels that the losses' cases do not reach, compiled."""

from __future__ import annotations

from unittest import mock

import pytest
from cases import LOSSES, Case, judge

from ptx.tier import CAPABILITIES, MARKS, MODES, compiled, diagonal
from repmtl_kernels.backends.triton import gram
from repmtl_kernels.backends.triton.tiles import Tile, trying

pytestmark = MARKS

CSA = LOSSES[1]


def judge_compiled(capability: int, mode: str, case: Case, tile: Tile | None = None) -> set[str]:
    """Assert that the loss is right; return the names of the kernels that ran."""
    of, tiles = MODES[mode], {"gram": tile, "gradient": tile} if tile else {}
    with compiled(capability, mode) as launches, trying(tiles):
        judge(CSA, case, of.dtype, "triton", rounding=of.rounding)
    return set(launches.by_kernel())


@pytest.mark.parametrize(
    ("capability", "mode"), diagonal(CAPABILITIES, ("bfloat16", "tf32", "ieee"), step=3)
)
def test_parts_of_long_sums(capability: int, mode: str):
    with (
        mock.patch.object(gram, "_is_long", lambda operand: not operand.n_side),
        mock.patch.object(gram, "_part_depth", lambda *_: 128),
    ):
        kernels = judge_compiled(capability, mode, Case(2, 2, 72, (16, 25)))
    assert "_gram_join_kernel" in kernels


# Of both rows of a square, and with a last row that does not exist.
@pytest.mark.parametrize(
    ("mode", "tma", "positions"),
    diagonal(("bfloat16", "float16"), (True, False), ((8, 32), (8, 40)), step=2),
)
def test_square_tiles_on_the_diagonal_of_wide_ones(mode: str, tma: bool, positions: tuple):
    tile = Tile(64, 128, 64, 4, 3, tma=tma)
    judge_compiled(90, mode, Case(1, 2, 328, positions), tile)


@pytest.mark.parametrize(
    ("tile", "case"),
    diagonal(
        (Tile(64, 64, 32, 4, 3), Tile(128, 256, 32, 8, 3)),
        (
            Case(1, 2, 272, (8, 25)),
            Case(1, 2, 200, (8, 34)),
            Case(1, 2, 200, (8, 34), "channels_last"),
            Case(1, 2, 272, (8, 25), "channels_last"),
        ),
        step=4,
    ),
    ids=str,
)
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.whole)])
def test_factors_that_have_to_be_transposed(capability: int, tile: Tile, case: Case):
    """In tf32: of the Gram matrix, or of the gradient."""
    tile = tile if capability == 90 else Tile(64, 64, 32, 4, 3)
    judge_compiled(capability, "tf32", case, tile)


@pytest.mark.parametrize(
    ("capability", "mode"), diagonal(CAPABILITIES, ("bfloat16", "tf32", "float16"), step=3)
)
def test_odd_rows_in_few_steps(capability: int, mode: str):
    judge_compiled(capability, mode, Case(2, 2, 264, (7, 7)))
