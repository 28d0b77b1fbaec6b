"""Bits, comparisons, selections and conversions, one number at a time in Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ptx.programs import compute, run
from ptx.test_arithmetic import INTEGERS, floats, integers, wrapped

BITS = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


def bits_of(kind: str, seed: int) -> np.ndarray:
    return integers("u" + kind[1:], seed)


@pytest.mark.parametrize("kind", BITS)
def test_logic(kind):
    a, b = bits_of(kind, 0), bits_of(kind, 1)
    for name, expected in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        result = compute(f"{name}.{kind} {{0}}, {{1}}, {{2}}", [a, b], BITS[kind])
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(compute(f"not.{kind} {{0}}, {{1}}", [a], BITS[kind]), ~a)


@pytest.mark.parametrize("kind", ["b32", "b64", "u32", "s32", "s64"])
@pytest.mark.parametrize("name", ["shl", "shr"])
def test_shifts(name, kind):
    if name == "shl":
        kind = "b" + kind[1:]
    number = kind if kind[0] != "b" else "u" + kind[1:]
    x = integers(number, 2)
    width = np.iinfo(INTEGERS[number]).bits
    count = np.resize(np.arange(width + 10), len(x)).astype(np.uint32)
    result = compute(f"{name}.{kind} {{0}}, {{1}}, {{2}}", [x, count], INTEGERS[number])
    pairs = zip(x.tolist(), count.tolist(), strict=True)
    shift = (lambda a, n: a << n) if name == "shl" else (lambda a, n: a >> n)
    assert result.tolist() == [wrapped(shift(a, n), number) for a, n in pairs]


def test_funnel_shifts():
    low, high = bits_of("b32", 3), bits_of("b32", 4)
    count = np.resize(np.arange(40), len(low)).astype(np.uint32)
    numbers = list(zip(low.tolist(), high.tolist(), count.tolist(), strict=True))
    for mode, by in (("wrap", lambda n: n % 32), ("clamp", lambda n: min(n, 32))):
        left = compute(f"shf.l.{mode}.b32 {{0}}, {{1}}, {{2}}, {{3}}", [low, high, count], "u4")
        right = compute(f"shf.r.{mode}.b32 {{0}}, {{1}}, {{2}}, {{3}}", [low, high, count], "u4")
        both = [(h << 32 | a, by(n)) for a, h, n in numbers]
        assert left.tolist() == [(x << n) >> 32 & 0xFFFFFFFF for x, n in both]
        assert right.tolist() == [x >> n & 0xFFFFFFFF for x, n in both]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extracted_fields(kind):
    x = integers(kind, 5)
    width = np.iinfo(INTEGERS[kind]).bits
    place = np.resize(np.arange(width), len(x)).astype(np.uint32)
    length = np.random.default_rng(6).integers(0, width + 5, len(x)).astype(np.uint32)
    result = compute(f"bfe.{kind} {{0}}, {{1}}, {{2}}, {{3}}", [x, place, length], INTEGERS[kind])

    def field(a: int, first: int, count: int) -> int:  # as the manual's pseudocode
        a %= 1 << width
        sign = 0
        if kind[0] == "s" and count:
            sign = a >> min(first + count - 1, width - 1) & 1
        found = sum(
            (a >> first + i & 1 if i < count and first + i < width else sign) << i
            for i in range(width)
        )
        return wrapped(found, kind)

    three = zip(x.tolist(), place.tolist(), length.tolist(), strict=True)
    assert result.tolist() == [field(*one) for one in three]


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_inserted_fields(kind):
    inserted, x = bits_of(kind, 7), bits_of(kind, 8)
    width = np.iinfo(BITS[kind]).bits
    place = np.resize(np.arange(width), len(x)).astype(np.uint32)
    length = np.random.default_rng(9).integers(0, width + 1, len(x)).astype(np.uint32)
    operands = [inserted, x, place, length]
    result = compute(f"bfi.{kind} {{0}}, {{1}}, {{2}}, {{3}}, {{4}}", operands, BITS[kind])
    full = (1 << width) - 1
    numbers = zip(*(one.tolist() for one in operands), strict=True)
    masks = [(a, b, n, ((1 << m) - 1) << n & full) for a, b, n, m in numbers]
    assert result.tolist() == [b & ~mask & full | a << n & mask for a, b, n, mask in masks]


def test_counts_and_order_of_bits():
    x = bits_of("b32", 10)
    text = [f"{a:032b}" for a in x.tolist()]
    assert compute("popc.b32 {0}, {1}", [x], "u4").tolist() == [a.count("1") for a in text]
    leading = [len(a) - len(a.lstrip("0")) for a in text]
    assert compute("clz.b32 {0}, {1}", [x], "u4").tolist() == leading
    assert compute("brev.b32 {0}, {1}", [x], "u4").tolist() == [int(a[::-1], 2) for a in text]


def test_permuted_bytes():
    a, b, selector = (bits_of("b32", seed) for seed in (11, 12, 13))
    result = compute("prmt.b32 {0}, {1}, {2}, {3}", [a, b, selector], "u4")

    def chosen(x: int, y: int, by: int) -> int:
        given = (y << 32 | x).to_bytes(8, "little")
        nibbles = [by >> 4 * i & 15 for i in range(4)]
        out = [(255 * (given[n & 7] >> 7)) if n & 8 else given[n & 7] for n in nibbles]
        return int.from_bytes(out, "little")

    three = zip(a.tolist(), b.tolist(), selector.tolist(), strict=True)
    assert result.tolist() == [chosen(*one) for one in three]


@pytest.mark.parametrize("table", [0x80, 0xE8, 0x96, 0x1B])
def test_three_operands(table):
    a, b, c = (bits_of("b32", seed) for seed in (14, 15, 16))
    result = compute(f"lop3.b32 {{0}}, {{1}}, {{2}}, {{3}}, {table}", [a, b, c], "u4")

    def looked_up(x: int, y: int, z: int) -> int:
        rows = [(x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1 for i in range(32)]
        return sum((table >> row & 1) << i for i, row in enumerate(rows))

    three = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    assert result.tolist() == [looked_up(*one) for one in three]


ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def compared(name: str, kind: str, a: np.ndarray, b: np.ndarray) -> list[bool]:
    text = f"setp.{name}.{kind} %p1, {{1}}, {{2}}; selp.b32 {{0}}, 1, 0, %p1"
    return compute(text, [a, b], "u4").astype(bool).tolist()


@pytest.mark.parametrize("kind", INTEGERS)
def test_comparisons_of_integers(kind):
    a, b = integers(kind, 17), integers(kind, 18)
    b[::3] = a[::3]
    for name, holds in ORDERED.items():
        expected = [holds(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert compared(name, kind, a, b) == expected


def test_comparisons_of_floats():
    a, b = floats(19), floats(20)
    b[::3] = a[::3]
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    unordered = [math.isnan(x) or math.isnan(y) for x, y in pairs]
    for name, holds in ORDERED.items():
        expected = [holds(x, y) for x, y in pairs]
        either = [e or u for e, u in zip(expected, unordered, strict=True)]
        both = [e and not u for e, u in zip(expected, unordered, strict=True)]
        assert compared(name, "f32", a, b) == both
        assert compared(f"{name}u", "f32", a, b) == either
    assert compared("nan", "f32", a, b) == unordered
    assert compared("num", "f32", a, b) == [not u for u in unordered]


def test_two_predicates_and_a_third_one():
    a, b = integers("s32", 21), integers("s32", 22)
    text = """setp.gt.s32 %p3, {1}, 0;
        setp.lt.and.s32 %p1|%p2, {1}, {2}, %p3;
        selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; add.s32 {0}, %r1, %r2"""
    result = compute(text, [a, b], "u4")
    # The second one is for the opposite comparison, combined alike.
    np.testing.assert_array_equal(result, np.where(a > 0, np.where(a < b, 1, 2), 0))


def test_conversions_of_integers():
    x = integers("s32", 23)
    np.testing.assert_array_equal(compute("cvt.s64.s32 {0}, {1}", [x], "i8"), x)
    np.testing.assert_array_equal(
        compute("cvt.u64.u32 {0}, {1}", [x], "u8"), x.view(np.uint32).astype(np.uint64)
    )
    np.testing.assert_array_equal(compute("cvt.u16.u32 {0}, {1}", [x], "u2"), x.astype(np.uint16))
    # A narrow result fills a wide register: with its sign, or with zeros.
    low = x.astype(np.int16)
    np.testing.assert_array_equal(compute("cvt.s32.s16 {0}, {1}", [low], "i4"), low)
    np.testing.assert_array_equal(compute("cvt.u32.u16 {0}, {1}", [low], "u4"), low.view(np.uint16))
    np.testing.assert_array_equal(
        compute("cvt.rn.f32.s32 {0}, {1}", [x], "f4"), x.astype(np.float32)
    )


@pytest.mark.parametrize(
    ("mode", "whole"),
    [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)],
)
def test_floats_to_integers(mode, whole):
    x = floats(24)
    x[:40] = np.arange(-20, 20) / np.float32(2)
    result = compute(f"cvt.{mode}.s32.f32 {{0}}, {{1}}", [x], "i4")

    def expected(value: float) -> int:
        if math.isnan(value):
            return 0
        if math.isinf(value):
            return 2**31 - 1 if value > 0 else -(2**31)
        return min(max(whole(value), -(2**31)), 2**31 - 1)

    assert result.tolist() == [expected(value) for value in x.tolist()]


def test_small_floats():
    x = floats(25)
    x = x[~np.isnan(x)]
    half = compute("cvt.rn.f16.f32 {0}, {1}", [x], "u2").view(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, x.astype(np.float16))
    np.testing.assert_array_equal(
        compute("cvt.f32.f16 {0}, {1}", [half], "f4"), half.astype(np.float32)
    )
    brain = compute("cvt.rn.bf16.f32 {0}, {1}", [x], "u2")
    back = compute("cvt.f32.bf16 {0}, {1}", [brain], "f4")
    # The nearest of the two neighbours; ties go to the even one.
    below = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    above = (below.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    finite = np.isfinite(x)
    wide, below, above = (one[finite].astype(np.float64) for one in (x, below, above))
    to_below, to_above = np.abs(wide - below), np.abs(wide - above)
    even = below.astype(np.float32).view(np.uint32) & np.uint32(0x10000) == 0
    nearer = (to_below < to_above) | ((to_below == to_above) & even)
    nearest = np.where(nearer, below, above)
    np.testing.assert_array_equal(back[finite], nearest)
    np.testing.assert_array_equal(back[~finite], x[~finite])


def test_pairs_of_small_floats():
    x, y = np.float32([1.5, -3]), np.float32([2.25, 1e-3])
    pair = compute("cvt.rn.bf16x2.f32 {0}, {1}, {2}", [x, y], "u4")
    upper = compute("cvt.rn.bf16.f32 {0}, {1}", [x], "u2")
    lower = compute("cvt.rn.bf16.f32 {0}, {1}", [y], "u2")
    np.testing.assert_array_equal(pair >> 16, upper)
    np.testing.assert_array_equal(pair & 0xFFFF, lower)


def test_tf32_rounds_ties_away():
    x = np.float32([1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-20, 1 + 2.0**-12, -1 - 2.0**-11, np.inf])
    result = compute("cvt.rna.tf32.f32 {0}, {1}", [x], "f4")
    np.testing.assert_array_equal(
        result, np.float32([1 + 2.0**-10, 1 + 2.0**-10, 1, -1 - 2.0**-10, np.inf])
    )


def test_packing_and_unpacking():
    low, high = bits_of("b32", 26), bits_of("b32", 27)
    both = compute("mov.b64 {0}, {{{1}, {2}}}", [low, high], "u8")
    np.testing.assert_array_equal(
        both, low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    )
    np.testing.assert_array_equal(compute("mov.b64 {{_, {0}}}, {1}", [both], "u4"), high)


def test_places_of_threads():
    out = np.zeros((64, 4), np.uint32)
    run(
        """mov.u32 %r1, %tid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %laneid; mov.u32 %r4, %warpid;
        st.global.v4.b32 [%d0], {%r1, %r2, %r3, %r4};""",
        [out],
        threads=64,
    )
    i = np.arange(64)
    np.testing.assert_array_equal(out, np.stack([i, 0 * i + 64, i % 32, i // 32], 1))
