"""Gram matrices of few channels and many positions, whose long sums are cut into parts."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import DEVICE, Case
from torch import Tensor

from repmtl_kernels import rep_mtl_loss

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from repmtl_kernels.backends.triton import gram
from repmtl_kernels.backends.triton.operand import Operand
from repmtl_kernels.backends.triton.tiles import Tile, trying

TERMS = 16  # at a time
TILE = {"gram": Tile(16, 16, TERMS, 4, 2)}
# Sums in another order.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
# One tile and three, sums that parts divide and that they don't.
CASES = [
    Case(2, 2, 16, (8, 16)),
    Case(3, 2, 24, (9, 12)),
    Case(2, 2, 20, (7, 13), "channels_last"),
]


@pytest.fixture
def cut(monkeypatch) -> list[int]:
    """Sums come in parts of so many terms; the last number holds, and 0 leaves them whole."""
    terms = [0]
    monkeypatch.setattr(gram, "_is_long", lambda operand: not operand.n_side and terms[-1] > 0)
    monkeypatch.setattr(gram, "_part_depth", lambda *_: terms[-1])
    return terms


def losses_and_gradients(case: Case, values: list[Tensor], **options) -> list[Tensor]:
    with trying(TILE):
        losses = case.run(rep_mtl_loss, values, backend="triton", **options)
        return [*losses, *torch.autograd.grad(losses.total, values)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("case", "masked"), [(CASES[0], False), (CASES[1], True), (CASES[2], True)]
)
def test_parts_add_up(cut, case: Case, dtype: torch.dtype, masked: bool):
    values, options = case.make(dtype), {}
    if masked:
        generator = torch.Generator().manual_seed(0)
        options["positions"] = (torch.rand(2, *case.spatial, generator=generator) < 0.6).to(DEVICE)
    expected = losses_and_gradients(case, values, **options)
    for terms in (TERMS, 3 * TERMS):
        cut.append(terms)
        result = losses_and_gradients(case, values, **options)
        for f, e in zip(result, expected, strict=True):
            assert (f.double() - e.double()).norm() <= TOLERANCE[dtype] * e.double().norm()
        again = losses_and_gradients(case, values, **options)
        assert all(map(torch.equal, result, again))


def test_saliencies_that_are_scaled_first(cut):
    case = CASES[1]
    values = case.make(torch.bfloat16, 1e-15)
    expected = losses_and_gradients(case, values)
    cut.append(2 * TERMS)
    for f, e in zip(losses_and_gradients(case, values), expected, strict=True):
        assert (f.double() - e.double()).norm() <= 1e-4 * e.double().norm()


def test_a_gpu_full_of_programs_and_no_short_parts():
    tile = Tile(64, 64, 64, 4, 3)
    for channels, positions, tiles, parts in (
        (64, 128 * 128, 4, 16),  # parts of 1024 terms
        (64, 288 * 384, 6, 44),  # 264 programs
        (64, 128 * 128 + 8, 192, 1),
        (64, 128 * 128 + 8, 1000, 1),
    ):
        operand = Operand.of(torch.empty(1, channels, positions, device="meta"))
        depth = gram._part_depth(operand, tile, tiles)
        assert depth % tile.depth == 0
        assert -(-positions // depth) == parts


@pytest.mark.parametrize(
    ("channels", "positions", "long"),
    [
        (64, 4096, True),
        (64, 4095, False),  # a program is soon done
        (512, 8192, False),  # many tiles, large parts
        (4096, 64, False),  # N side
    ],
)
def test_what_is_cut_depends_on_no_batch(channels: int, positions: int, long: bool):
    """Another last batch would need another variant of the kernel."""
    for batch in (1, 64):
        operand = Operand.of(torch.empty(batch, channels, positions, device="meta"))
        assert gram._is_long(operand) == long
