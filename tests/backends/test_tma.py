"""Tiles that TMA copies compute what the same tiles do without."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec

import pytest
import torch
from cases import DEVICE, Case
from torch import Tensor

from repmtl_kernels import rep_mtl_loss

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from repmtl_kernels.backends.triton import tma
from repmtl_kernels.backends.triton.operand import Operand
from repmtl_kernels.backends.triton.tiles import Tile, trying

if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a GPU with TMA", allow_module_level=True)

pytestmark = pytest.mark.decisive

# Matrix units of Hopper want 64 rows; the interpreter is faster with less.
SIDE = 64 if DEVICE == "cuda" else 32
TILES = [
    {"gram": Tile(SIDE, SIDE, 32, 4, 2), "gradient": Tile(SIDE, SIDE, 32, 4, 2)},
    {"gram": Tile(SIDE, 2 * SIDE, 64, 4, 3), "gradient": Tile(SIDE, 2 * SIDE, 64, 4, 3)},
]
# Sizes that the tiles divide and that they don't, on the N side and on the C side; more tasks than
# a launch takes.
CASES = [
    Case(1, 2, 128, (8, 8)),
    Case(2, 2, 136, (8, 11)),
    Case(2, 2, 136, (8, 11), "channels_last"),
    Case(2, 2, 72, (4, 24), "stacked"),
    Case(2, 2, 40, (8, 13), "channels_last"),
    Case(5, 2, 24, (8, 4)),
]
# Sums in another order: the interpreter's depend on how a block lies in memory.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    """Products of operands that are scaled first, as those of full float32 are, go without TMA."""
    monkeypatch.setenv("REPMTL_FP32_PRECISION", "tf32")


@pytest.fixture
def used(monkeypatch) -> list[bool]:
    """Whether each launch that could have TMA had it."""
    uses: list[bool] = []
    real = tma.matrices

    def watched(*args):
        x = real(*args)
        uses.append(x is not None)
        return x

    monkeypatch.setattr(tma, "matrices", watched)
    return uses


def losses_and_gradients(
    case: Case, values: list[Tensor], tiles: dict[str, Tile], tma: bool, **options
) -> list[Tensor]:
    tiles = {kernel: tile._replace(tma=tma) for kernel, tile in tiles.items()}
    with trying(tiles):
        options = {"lambda_tsr": 0.7, "lambda_csa": 0.3, "backend": "triton", **options}
        losses = case.run(rep_mtl_loss, values, **options)
        return [*losses, *torch.autograd.grad(losses.total, values)]


def assert_same(result: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for f, e in zip(result, expected, strict=True):
        assert (f.double() - e.double()).norm() <= tolerance * e.double().norm()


@pytest.mark.parametrize("tiles", TILES, ids=["square", "wide"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_as_without(used, tiles: dict[str, Tile], case: Case, dtype: torch.dtype):
    values = case.make(dtype)
    expected = losses_and_gradients(case, values, tiles, tma=False)
    assert used and not any(used)
    used.clear()
    result = losses_and_gradients(case, values, tiles, tma=True)
    assert used and all(used)
    assert_same(result, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_mask_leaves_out_is_not_used(used, case: Case, dtype: torch.dtype):
    """TMA copies it all the same."""
    mask = torch.rand(2, *case.spatial, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = mask.to(DEVICE)
    values = case.make(dtype)
    expected = losses_and_gradients(case, values, TILES[1], tma=False, positions=mask)
    used.clear()
    spoiled = [v.detach().clone() for v in values]
    spoiled = [v.masked_fill_(~mask[:, None], math.nan).requires_grad_() for v in spoiled]
    result = losses_and_gradients(case, spoiled, TILES[1], tma=True, positions=mask)
    assert used and all(used)
    assert_same(result, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_saliencies_that_are_scaled_first(used, scale: float):
    case = Case(2, 2, 64, (8, 4))
    values = case.make(torch.bfloat16, scale)
    expected = losses_and_gradients(case, values, TILES[1], tma=False)
    used.clear()
    result = losses_and_gradients(case, values, TILES[1], tma=True)
    assert used and all(used)
    assert_same(result, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 40, (7, 9)),  # rows are no 16-byte units
        Case(2, 2, 32, (4, 8), "crop"),
        Case(2, 2, 32, (4, 8), "expanded"),
        Case(3, 2, 32, (4, 8), "mixed"),  # one of the tasks is a crop
        Case(2, 3, 32),
    ],
    ids=str,
)
def test_views_that_tma_cannot_read_are_read_without(used, case: Case):
    values = case.make(torch.bfloat16)
    expected = losses_and_gradients(case, values, TILES[0], tma=False)
    used.clear()
    result = losses_and_gradients(case, values, TILES[0], tma=True)
    assert not all(used)
    assert_same(result, expected, TOLERANCE[torch.bfloat16])


def test_a_gram_matrix_that_tma_cannot_read_is_read_without(monkeypatch):
    answers: list[bool] = []
    real = tma.readable
    monkeypatch.setattr(tma, "readable", lambda x: answers.append(real(x)) or answers[-1])
    case = Case(2, 2, 40, (5, 7), "channels_last")
    values = case.make(torch.bfloat16)
    expected = losses_and_gradients(case, values, TILES[0], tma=False)
    answers.clear()
    assert_same(losses_and_gradients(case, values, TILES[0], tma=True), expected, 1e-4)
    assert sorted(set(answers)) == [False, True]  # the matrix, and the saliencies


def test_what_tma_reads():
    aligned = torch.empty(2, 32, 64, dtype=torch.bfloat16, device=DEVICE)
    assert tma.readable(aligned) and tma.readable(aligned.mT)
    assert not tma.rows_last(aligned) and tma.rows_last(aligned.mT)
    memory = torch.empty(2 * 32 * 64 + 8, dtype=torch.bfloat16, device=DEVICE)
    for view in (
        memory[1 : 1 + 2 * 32 * 64].view(2, 32, 64),  # starts anywhere
        memory[: 2 * 32 * 60].view(2, 32, 60),  # rows of 120 bytes
        aligned[:, :, ::2],
        aligned[:1].expand(2, 32, 64),
    ):
        assert not tma.readable(view)
        assert not tma.readable(view.mT)


def test_a_group_is_read_by_tma_or_not_at_all():
    tile = Tile(64, 64, 32, 4, 2, tma=True)
    good = torch.empty(2, 64, 4, 8, device=DEVICE)
    bad = torch.empty(2, 64, 4, 16, device=DEVICE)[..., ::2]
    operand = Operand.of(good)
    (x,) = tma.matrices([good], operand, tile)
    assert x.shape == (2, operand.rows, operand.depth) and x.data_ptr() == good.data_ptr()
    assert tma.matrices([good, bad], operand, tile) is None
    assert tma.matrices([good], operand, tile._replace(tma=False)) is None


def test_descriptors_are_of_blocks_as_they_lie_in_memory():
    x = torch.empty(2, 48, 64, device=DEVICE)
    first, *others = tma.descriptors([x], 16, 32)
    assert first.block_shape == [1, 16, 32] and list(first.shape) == [2, 48, 64]
    first, second, *others = tma.descriptors([x.mT, x.mT], 16, 32)
    assert first.block_shape == [1, 32, 16] and list(first.shape) == [2, 48, 64]
    assert dataclasses.is_dataclass(second) and others == [None, None]
    assert tma.descriptors(None, 16, 32) == (None,) * tma.TASKS
