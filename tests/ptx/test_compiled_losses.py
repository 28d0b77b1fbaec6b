"""The losses through compiled kernels, against the reference in float64."""

from __future__ import annotations

import pytest
from cases import (
    CASES,
    FLOOR_FORMS,
    FLOOR_IDS,
    LOSSES,
    TSR_FORMS,
    TSR_IDS,
    Case,
    Loss,
    judge,
    value_and_grads,
)
from masked_cases import BOTH, CSA, mask_of

from ptx.machine import Fault
from ptx.tier import CAPABILITIES, MARKS, MODES, compiled, diagonal

pytestmark = MARKS

TSR, _, TOTAL, *_ = LOSSES
FORMS = dict(zip(TSR_IDS + FLOOR_IDS, TSR_FORMS + FLOOR_FORMS, strict=True))


def judge_compiled(capability: int, mode: str, loss: Loss, case: Case, **options) -> None:
    of = MODES[mode]
    with compiled(capability, mode) as launches:
        judge(loss, case, of.dtype, "triton", rounding=of.rounding, **options)
    assert launches.all


def total(mode: str, case: Case) -> Loss:
    """Return both losses, or CSA alone: with one channel, its gradient is nothing but rounding."""
    return CSA if mode == "tf32" and case.channels == 1 else TOTAL


@pytest.mark.parametrize(
    ("capability", "mode", "case"), diagonal(CAPABILITIES, MODES, CASES, step=2), ids=str
)
def test_every_case(capability: int, mode: str, case: Case):
    judge_compiled(capability, mode, total(mode, case), case)


# Several tiles of a side, whole and cut off. Tiles of 128 where the smaller side has over 320 rows
# that are aligned; on the C side, channels are the smaller side.
LARGE = [
    Case(2, 2, 328, (16, 21)),  # 128, C side
    Case(1, 2, 344, (8, 41)),  # 128, N side
    Case(1, 2, 195, (11, 19)),  # 64, C side, rows that start at any address
    Case(1, 2, 344, (8, 41), "channels_last"),
    Case(1, 2, 209, (13, 15)),  # 64, N side, rows that start at any address
    Case(1, 2, 331, (11, 31)),
    Case(2, 2, 72, (8, 10), "channels_last"),
]


@pytest.mark.parametrize(
    ("capability", "mode", "case"), diagonal(CAPABILITIES, MODES, LARGE, step=2), ids=str
)
def test_several_tiles(capability: int, mode: str, case: Case):
    judge_compiled(capability, mode, CSA, case)


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_tiles(capability: int, mode: str):
    judge_compiled(capability, mode, CSA, Case(1, 2, 648, (16, 40)))


@pytest.mark.parametrize(
    ("capability", "mode", "case", "form"),
    diagonal(
        CAPABILITIES,
        ("ieee", "bfloat16", "float16"),
        [Case(3, 2, 8, (5, 6)), Case(2, 3, 5), Case(2, 2, 3, (30, 41))],
        FORMS,
    ),
    ids=str,
)
def test_distributions(capability: int, mode: str, case: Case, form: str):
    judge_compiled(capability, mode, TSR, case, **FORMS[form])


@pytest.mark.parametrize(
    ("capability", "mode", "case"),
    diagonal(CAPABILITIES, ("ieee", "bfloat16", "tf32"), CASES, step=6),
    ids=str,
)
def test_positions(capability: int, mode: str, case: Case):
    loss = BOTH if case.channels > 1 else CSA
    judge_compiled(capability, mode, loss, case, positions=mask_of(case, "random"))


@pytest.mark.parametrize(
    ("capability", "mode", "kind"), diagonal(CAPABILITIES, MODES, ["prefix", "empty"]), ids=str
)
def test_masks(capability: int, mode: str, kind: str):
    case = Case(2, 3, 40, (4, 16), "channels_last")
    judge_compiled(capability, mode, BOTH, case, positions=mask_of(case, kind))


# Products of at most 32 rows take no tensor memory.
SMALL = [case for case in CASES if case.channels <= 32]


@pytest.mark.parametrize(("mode", "case"), diagonal(MODES, SMALL, step=6), ids=str)
def test_blackwell_without_tensor_memory(mode: str, case: Case):
    judge_compiled(100, mode, total(mode, case), case)


def test_tensor_memory_is_refused():
    case = CASES[1]
    with compiled(100, "bfloat16"), pytest.raises(Fault, match="tcgen05"):
        value_and_grads(CSA.public, case, case.make(MODES["bfloat16"].dtype), backend="triton")
