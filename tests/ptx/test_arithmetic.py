"""Numbers: each instruction against Python's own exact integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.programs import compute, run

SIGNED = {"s16": np.int16, "s32": np.int32, "s64": np.int64}
UNSIGNED = {"u16": np.uint16, "u32": np.uint32, "u64": np.uint64}
INTEGERS = SIGNED | UNSIGNED


def integers(kind: str, seed: int, count: int = 200) -> np.ndarray:
    """Return random integers of all sizes, with the least, the largest and those near 0."""
    dtype = INTEGERS[kind]
    limits = np.iinfo(dtype)
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, limits.bits, count)
    numbers = draw.integers(limits.min, limits.max, count, dtype, endpoint=True)
    small = (numbers >> bits.astype(dtype)).astype(dtype)
    edges = np.array([limits.min, limits.max, 0, 1, limits.max - 1], dtype)
    return np.concatenate([small, edges, draw.permutation(edges)])


def floats(seed: int, count: int = 300) -> np.ndarray:
    """Return float32 numbers of all exponents, with zeros, infinities, NaN and subnormals."""
    draw = np.random.default_rng(seed)
    spread = draw.standard_normal(count) * 2.0 ** draw.integers(-30, 30, count)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3e38], np.float32)
    return np.concatenate([spread.astype(np.float32), edges, draw.permutation(edges)])


def wrapped(value: int, kind: str) -> int:
    bits = np.iinfo(INTEGERS[kind]).bits
    value %= 1 << bits
    return value - (1 << bits) if kind in SIGNED and value >> (bits - 1) else value


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: towards_zero(a, b) if b else -1,
    "rem": lambda a, b: a - towards_zero(a, b) * b if b else a,
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integers(name, kind):
    a, b = integers(kind, 0), integers(kind, 1)
    result = compute(f"{name}.{kind} {{0}}, {{1}}, {{2}}", [a, b], INTEGERS[kind])
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert result.tolist() == [wrapped(BINARY[name](x, y), kind) for x, y in pairs]


@pytest.mark.parametrize("kind", INTEGERS)
def test_upper_half_of_a_product(kind):
    a, b = integers(kind, 2), integers(kind, 3)
    bits = np.iinfo(INTEGERS[kind]).bits
    result = compute(f"mul.hi.{kind} {{0}}, {{1}}, {{2}}", [a, b], INTEGERS[kind])
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert result.tolist() == [wrapped(x * y >> bits, kind) for x, y in pairs]


@pytest.mark.parametrize(
    ("kind", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")]
)
def test_wide_products(kind, wide):
    a, b, c = integers(kind, 4), integers(kind, 5), integers(wide, 6)
    product = compute(f"mul.wide.{kind} {{0}}, {{1}}, {{2}}", [a, b], INTEGERS[wide])
    total = compute(f"mad.wide.{kind} {{0}}, {{1}}, {{2}}, {{3}}", [a, b, c], INTEGERS[wide])
    numbers = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert product.tolist() == [x * y for x, y, _ in numbers]
    assert total.tolist() == [wrapped(x * y + z, wide) for x, y, z in numbers]


@pytest.mark.parametrize("kind", SIGNED)
def test_sign_of_integers(kind):
    a = integers(kind, 7)
    for name, expected in (("neg", lambda x: -x), ("abs", abs)):
        result = compute(f"{name}.{kind} {{0}}, {{1}}", [a], INTEGERS[kind])
        assert result.tolist() == [wrapped(expected(x), kind) for x in a.tolist()]


def exact(value: np.floating) -> Fraction:
    return Fraction(float(value))


def nearest(value: Fraction) -> float:
    """Round to float32, ties to even, without going through float64."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 23, -149)
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while exponent > -149 and abs(value) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    rounded = round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return math.copysign(math.inf, rounded) if abs(rounded) >= 2**128 else float(rounded)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("add.f32", lambda a, b, c: a + b),
        ("sub.f32", lambda a, b, c: a - b),
        ("mul.f32", lambda a, b, c: a * b),
        ("fma.rn.f32", lambda a, b, c: a * b + c),
        ("div.rn.f32", lambda a, b, c: a / b),
    ],
)
def test_float32_rounds_once(name, expected):
    a, b, c = (floats(seed)[:300] for seed in (10, 11, 12))
    operands = [a, b, c][: 3 if name.startswith("fma") else 2]
    places = ", ".join(f"{{{i}}}" for i in range(len(operands) + 1))
    result = compute(f"{name} {places}", operands, np.float32)
    numbers = zip(map(exact, a), map(exact, b), map(exact, c), strict=True)
    assert result.tolist() == [nearest(expected(*three)) for three in numbers]


def test_directed_rounding():
    a, b = floats(13)[:300], floats(14)[:300]
    down = compute("add.rm.f32 {0}, {1}, {2}", [a, b], np.float32).astype(np.float64)
    up = compute("add.rp.f32 {0}, {1}, {2}", [a, b], np.float32).astype(np.float64)
    cut = compute("add.rz.f32 {0}, {1}, {2}", [a, b], np.float32).astype(np.float64)
    total = a.astype(np.float64) + b.astype(np.float64)
    assert (down <= total).all() and (total <= up).all() and (down < up).any()
    np.testing.assert_array_equal(cut, np.where(total < 0, up, down))
    # Neighbours, where the sum is no float32.
    np.testing.assert_array_equal(
        np.nextafter(down.astype(np.float32), np.float32(np.inf))[down < up],
        up.astype(np.float32)[down < up],
    )


def test_special_numbers_of_floats():
    a, b = floats(15), floats(16)
    largest = compute("max.f32 {0}, {1}, {2}", [a, b], np.float32)
    strict = compute("max.NaN.f32 {0}, {1}, {2}", [a, b], np.float32)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [y if math.isnan(x) else x if math.isnan(y) else max(x, y) for x, y in pairs]
    np.testing.assert_array_equal(largest, np.array(expected, np.float32))
    assert np.isnan(strict[np.isnan(a) | np.isnan(b)]).all()
    flushed = compute("add.ftz.f32 {0}, {1}, {2}", [a, np.zeros_like(a)], np.float32)
    assert flushed[np.abs(a) == np.float32(1e-40)].tolist() == [0.0, 0.0]
    clipped = compute("add.sat.f32 {0}, {1}, {2}", [a, np.zeros_like(a)], np.float32)
    expected = np.clip(np.nan_to_num(a, nan=0.0, posinf=1, neginf=0), 0, 1)
    np.testing.assert_array_equal(clipped, expected)


@pytest.mark.parametrize(
    ("name", "function", "bound"),
    [
        ("sqrt.rn.f32", np.sqrt, 0.5),
        ("rcp.rn.f32", lambda x: 1 / x, 0.5),
        ("ex2.approx.f32", np.exp2, 2),
        ("lg2.approx.f32", np.log2, 2),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2),
        ("div.full.f32", lambda x: x / 3, 2),
    ],
)
def test_functions(name, function, bound):
    x = np.abs(floats(17)[:300])
    x = x[x < 64] if name.startswith("ex2") else x
    operands = [x, np.full_like(x, 3)] if name.startswith("div") else [x]
    places = ", ".join(f"{{{i}}}" for i in range(len(operands) + 1))
    result = compute(f"{name} {places}", operands, np.float32)
    expected = function(x.astype(np.float64))
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(result - expected) <= bound * spacing * 1.0001).all()


def test_float64():
    draw = np.random.default_rng(18)
    a, b = draw.standard_normal((2, 64))
    np.testing.assert_array_equal(compute("add.f64 {0}, {1}, {2}", [a, b], np.float64), a + b)
    np.testing.assert_array_equal(compute("mul.f64 {0}, {1}, {2}", [a, b], np.float64), a * b)
    small = compute("fma.rn.f64 {0}, {1}, {2}, {3}", [a, b, -(a * b)], np.float64)
    lost = [float(Fraction(x) * Fraction(y) - Fraction(x * y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(small, lost)


def test_a_form_that_nobody_knows_is_a_fault():
    with pytest.raises(Fault, match="unknown form of add.cc.u32"):
        run("mov.u32 %r1, 1; add.cc.u32 %r2, %r1, %r1;")
    with pytest.raises(Fault, match="unknown instruction: frobnicate"):
        run("frobnicate.b32 %r1, 1;")
