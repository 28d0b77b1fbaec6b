"""The tiles that TMA copies, and all tiles of a side, through compiled kernels."""

from __future__ import annotations

import pytest
from cases import LOSSES, Case, judge
from masked_cases import mask_of

from ptx.tier import MARKS, MODES, compiled, diagonal
from repmtl_kernels.backends.triton.tiles import Tile, trying

pytestmark = MARKS

CSA = LOSSES[1]
TILES = {
    "64x64": Tile(64, 64, 32, 4, 2, tma=True),
    "64x128": Tile(64, 128, 64, 4, 3, tma=True),
    "128x128": Tile(128, 128, 64, 8, 3, tma=True),
    "128x256": Tile(128, 256, 64, 8, 3, tma=True),
}
# On the N side, on the C side; more tasks than a launch takes.
CASES = [
    Case(2, 2, 136, (8, 11)),
    Case(2, 2, 136, (8, 11), "channels_last"),
    Case(2, 2, 88, (8, 17)),
    Case(2, 2, 88, (8, 17), "channels_last"),
    Case(5, 2, 24, (4, 8)),
    Case(1, 2, 296, (8, 33)),
]


def judge_tile(mode: str, name: str, case: Case, **options) -> None:
    """Assert that the losses are right and that TMA copied operands."""
    of, tile = MODES[mode], TILES[name]
    if of.dtype.itemsize == 4:
        tile = tile._replace(depth=32)  # three stages fit into shared memory
    with compiled(90, mode) as launches, trying({"gram": tile, "gradient": tile}):
        judge(CSA, case, of.dtype, "triton", rounding=of.rounding, **options)
    assert launches.tensor_maps > 0


@pytest.mark.parametrize(
    ("mode", "tile", "case"), diagonal(("bfloat16", "tf32", "float16"), TILES, CASES), ids=str
)
def test_tma(mode: str, tile: str, case: Case):
    judge_tile(mode, tile, case)


@pytest.mark.parametrize(
    ("mode", "case"), diagonal(("bfloat16", "tf32"), [CASES[0], CASES[3]], step=2), ids=str
)
def test_tma_with_positions(mode: str, case: Case):
    judge_tile(mode, "64x128", case, positions=mask_of(case, "random"))
