"""The additions of sm_100 for float32: pairs, a bfloat16 term, extremes of three."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.programs import compute

COUNT = 64
DRAW = np.random.default_rng(0)
# Register pairs (64 bits) of float32, for three operands.
PAIRS = DRAW.standard_normal((3, COUNT, 2)).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add.rn.f32x2", PAIRS[0] + PAIRS[1]),
        ("add.f32x2", PAIRS[0] + PAIRS[1]),
        ("sub.rn.f32x2", PAIRS[0] - PAIRS[1]),
        ("mul.rn.f32x2", PAIRS[0] * PAIRS[1]),
        ("fma.rn.f32x2", (PAIRS[0].astype(float) * PAIRS[1] + PAIRS[2]).astype(np.float32)),
    ],
)
def test_pairs_are_computed_each_by_itself(op: str, expected: np.ndarray):
    count = 3 if op.startswith("fma") else 2
    operands = [pair.copy().view(np.uint64).ravel() for pair in PAIRS[:count]]
    text = f"{op} {{0}}, " + ", ".join(f"{{{i + 1}}}" for i in range(count))
    result = compute(text, operands, np.uint64)
    assert np.array_equal(result.view(np.float32).reshape(COUNT, 2), expected)


def test_other_forms_of_pairs_are_refused():
    with pytest.raises(Fault, match="unknown form of add.rz.f32x2"):
        compute("add.rz.f32x2 {0}, {1}, {1}", [PAIRS[0].view(np.uint64).ravel()], np.uint64)


def test_a_bfloat16_is_added_to_a_float32():
    a, b = PAIRS[:2, :, 0]
    upper = (a.view(np.uint32) >> 16).astype(np.uint16)
    exact = (upper.astype(np.uint32) << 16).view(np.float32)
    result = compute("add.rn.f32.bf16 {0}, {1}, {2}", [upper, b.copy()], np.float32)
    assert np.array_equal(result, exact + b)


@pytest.mark.parametrize("op", ["add.bf16", "mul.rn.bf16x2", "neg.bf16", "abs.bf16x2"])
def test_bits_of_bfloat16_are_not_computed_with(op: str):
    kind = np.uint32 if op.endswith("x2") else np.uint16
    operands = "{1}" if op[:3] in ("neg", "abs") else "{1}, {1}"
    with pytest.raises(Fault, match="unknown form"):
        compute(f"{op} {{0}}, {operands}", [np.ones(32, kind)], kind)


def test_extremes_of_three():
    a, b, c = PAIRS[:, :, 0].copy()
    a[:8] = np.nan
    result = compute("max.f32 {0}, {1}, {2}, {3}", [a, b, c], np.float32)
    assert np.array_equal(result, np.fmax(np.fmax(a, b), c))
    result = compute("min.NaN.f32 {0}, {1}, {2}, {3}", [a, b, c], np.float32)
    assert np.array_equal(result, np.minimum(np.minimum(a, b), c), equal_nan=True)


def test_the_largest_of_a_warp_leaves_nan_out():
    x = PAIRS[0, :32, 0].copy()
    x[3] = np.nan
    result = compute("redux.sync.max.f32 {0}, {1}, 0xffffffff", [x], np.float32)
    assert (result == np.nanmax(x)).all()
