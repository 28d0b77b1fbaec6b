"""Matrix instructions against the manual's tables of fragments, and their rules of order."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.instructions.numbers import to_bfloat16, to_float16
from ptx.programs import run

DRAW = np.random.default_rng(0)


def bits(matrix: np.ndarray, kind: str) -> np.ndarray:
    matrix = np.ascontiguousarray(matrix, np.float32)
    if kind == "tf32":
        return matrix.view(np.uint32)
    return to_bfloat16(matrix) if kind == "bf16" else to_float16(matrix)


def small_numbers(*shape: int) -> np.ndarray:
    """Return numbers that all types hold exactly."""
    return DRAW.integers(-8, 9, shape).astype(np.float32)


def packed(elements: list[np.ndarray]) -> np.ndarray:
    """Return registers (threads, n) of elements, two to a register if they have 16 bits."""
    stacked = np.stack(elements, 1)
    return stacked.view(np.uint32) if stacked.itemsize == 2 else stacked


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"), ("m16n8k8", "bf16")],
)
def test_mma(shape, kind):
    """Fragments as in the tables of the manual's section on mma of these shapes."""
    k = int(shape.split("k")[1])
    a, b, c = small_numbers(16, k), small_numbers(k, 8), small_numbers(16, 8)
    lane = np.arange(32)
    group, in_group = lane // 4, lane % 4
    if kind == "tf32":  # a0..a3, b0, b1: row and column by the manual
        of_a = [(group + 8 * (i % 2), in_group + 4 * (i // 2)) for i in range(4)]
        of_b = [(in_group + 4 * i, group) for i in range(2)]
    else:
        of_a = [
            (group + 8 * (i % 4 // 2), in_group * 2 + i % 2 + 8 * (i // 4)) for i in range(k // 2)
        ]
        of_b = [(in_group * 2 + i % 2 + 8 * (i // 2), group) for i in range(k // 4)]
    left = packed([bits(a, kind)[place] for place in of_a])
    right = packed([bits(b, kind)[place] for place in of_b])
    of_c = [(group + 8 * (i // 2), in_group * 2 + i % 2) for i in range(4)]
    sums = np.stack([c[place] for place in of_c], 1)
    out = np.zeros((32, 4), np.float32)
    names = [f"%r{i}" for i in range(20)]
    na, nb = left.shape[1], right.shape[1]
    load = "".join(
        f"ld.global.b32 %r{first + i}, [%d{array}+{4 * i}];"
        for array, first, count in ((1, 0, na), (2, 8, nb), (3, 12, 4))
        for i in range(count)
    )
    braces = [
        "{" + ", ".join(names[i:j]) + "}" for i, j in ((16, 20), (0, na), (8, 8 + nb), (12, 16))
    ]
    run(
        f"""{load} mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {", ".join(braces)};
        st.global.v4.b32 [%d0], {braces[0]};""",
        [out, left, right, sums],
    )
    result = np.zeros((16, 8), np.float32)
    for i, place in enumerate(of_c):
        result[place] = out[:, i]
    np.testing.assert_array_equal(result, a @ b + c)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_16_bits(count, transposed):
    """The manual: lane l holds elements 2 (l % 4) and the next one of row l / 4."""
    matrices = DRAW.integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    rows = np.resize(matrices.reshape(-1, 8), (32, 8)).copy()
    loaded, stored = np.zeros((32, count), np.uint32), np.zeros((32, 8), np.uint16)
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    turn = ".trans" if transposed else ""
    write = "".join(f"st.global.b32 [%d1+{4 * i}], %r{10 + i};" for i in range(count))
    run(
        f"""mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d0];
        st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{turn}.shared.b16 {registers}, [%r2]; {write}
        bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x{count}{turn}.shared.b16 [%r2+512], {registers};
        bar.warp.sync -1; setp.lt.u32 %p1, %r1, {8 * count};
        @%p1 ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2+512];
        @%p1 st.global.v4.b32 [%d2], {{%r3, %r4, %r5, %r6}};""",
        [rows, loaded, stored],
        shared=1024,
    )
    lane = np.arange(32)
    for i, matrix in enumerate(matrices):
        given = matrix.T if transposed else matrix
        expected = np.stack([given[lane // 4, lane % 4 * 2 + j] for j in range(2)], 1)
        np.testing.assert_array_equal(loaded[:, i].copy().view(np.uint16).reshape(32, 2), expected)
    np.testing.assert_array_equal(stored[: 8 * count].reshape(count, 8, 8), matrices)


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62


def core_matrices(matrix: np.ndarray, size: int) -> np.ndarray:
    """Return (rows, K) as core matrices, 8 rows of 16 bytes; K runs slowest. No swizzle."""
    per_unit = 16 // size
    rows, depth = matrix.shape
    parts = matrix.reshape(rows // 8, 8, depth // per_unit, per_unit)
    return np.ascontiguousarray(parts.transpose(2, 0, 1, 3)).ravel()


def swizzled_rows(matrix: np.ndarray, size: int) -> np.ndarray:
    """Return (rows, K) with rows of 128 bytes whose units of 16 are exchanged by the row."""
    rows = matrix.shape[0]
    units = np.zeros((rows, 8, 16 // size), matrix.dtype)
    given = matrix.reshape(rows, -1, 16 // size)
    for row in range(rows):
        for unit in range(given.shape[1]):
            units[row, unit ^ (row % 8)] = given[row, unit]
    return units.ravel()


WGMMA = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mov.u32 %r3, 0;
fill: add.u32 %r4, %r2, %r3; mul.wide.u32 %d5, %r4, 1; mov.u64 %d7, {tid0}; add.u64 %d6, %d7, %d5;
ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d6]; st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
add.u32 %r3, %r3, 2048; setp.lt.u32 %p1, %r3, {bytes}; @%p1 bra fill;
{zero} {fence} {barrier}
{wgmma_fence}
mov.u64 %d10, {a}; mov.u64 %d11, {b}; setp.ne.b32 %p2, {scale}, 0;
wgmma.mma_async.sync.aligned.m64n8k{k}.f32.{kind}.{kind}
    {{%r20, %r21, %r22, %r23}}, %d10, %d11, %p2, 1, 1{flags};
wgmma.commit_group.sync.aligned;
{between}
{wait}
st.global.v4.b32 [%d0], {{%r20, %r21, %r22, %r23}}; {end}"""
ZERO = "".join(f"mov.b32 %r{i}, 0f3f800000;" for i in range(20, 24))
FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


def product(kind: str = "bf16", layout: str = "swizzled", **parts: str) -> tuple:
    """Return ``(result, expected)`` (64, 8) of a wgmma whose operands lie in this layout."""
    size = 4 if kind == "tf32" else 2
    k = 32 // size
    a, b = small_numbers(64, k), small_numbers(8, k)
    if layout == "swizzled":
        memory = [swizzled_rows(bits(one, kind), size) for one in (a, b)]
        places = [descriptor(start, 16, 1024, 1) for start in (0, 8192)]
        flags = ""
    elif layout == "cores":
        memory = [core_matrices(bits(one, kind), size) for one in (a, b)]
        places = [descriptor(0, 1024, 128, 0), descriptor(64 * 32, 128, 128, 0)]
        flags = ""
    else:  # rows are neighbours: K x rows, swizzled
        memory = [
            swizzled_rows(bits(one.T, kind), size) for one in (a, np.pad(b, ((0, 56), (0, 0))))
        ]
        places = [descriptor(0, 2048, 1024, 1), descriptor(k * 128, 2048, 1024, 1)]
        flags = ", 1, 1"
    if kind != "tf32" and not flags:
        flags = ", 0, 0"
    everything = np.concatenate(memory)
    everything = np.pad(everything, (0, -everything.size % (2048 // size)))
    out = np.zeros((128, 4), np.float32)
    parts = {
        "zero": ZERO, "fence": FENCE, "barrier": BARRIER, "wait": WAIT, "between": "", "end": "",
        "wgmma_fence": "wgmma.fence.sync.aligned;", "scale": "1", "tid0": "%d9", **parts,
    }  # fmt: skip
    text = WGMMA.format(
        a=places[0], b=places[1], k=k, kind=kind, flags=flags, bytes=everything.nbytes, **parts
    )
    base = "ld.param.b64 %d9, [a1];"
    run(base + text, [out, everything], threads=128, shared=everything.nbytes)
    thread = np.arange(128)
    result = np.zeros((64, 8), np.float32)
    for i in range(4):  # the manual's figure of the accumulators
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2)
        result[row, thread % 4 * 2 + i % 2] = out[:, i]
    return result, a @ b.T + int(parts["scale"] != "0")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind in ("bf16", "f16", "tf32")
        for layout in ("swizzled", "cores", "transposed")
        if (kind, layout) != ("tf32", "transposed")  # there is no such form
    ],
)
def test_wgmma(kind, layout):
    np.testing.assert_array_equal(*product(kind, layout))


def test_wgmma_without_its_accumulators():
    result, expected = product(scale="0")
    np.testing.assert_array_equal(result, expected)


def test_accumulators_are_poison_until_they_are_waited_for():
    result, _ = product(wait="", end=WAIT)
    assert np.isnan(result).all()


@pytest.mark.parametrize(
    ("part", "replaced", "message"),
    [
        ("wgmma_fence", "", "written after the last wgmma.fence"),
        ("fence", "", "before no fence.proxy.async"),
        ("barrier", "", "race: a product reads what other threads wrote"),
        ("between", "mov.b32 %r20, 0;", "accumulator was written while its product"),
        ("between", "st.shared.b32 [0], 1;", "that a product under way reads"),
        # A read of its own does not hide the product's.
        (
            "between",
            "ld.shared.b32 %r30, [0]; bar.sync 0; st.shared.b32 [0], 1;",
            "that a product under way reads",
        ),
        ("wait", "", "ends with a product under way"),
    ],
)
def test_rules_of_wgmma(part, replaced, message):
    with pytest.raises(Fault, match=message):
        product(**{part: replaced})


def test_a_fence_of_the_reader_counts_too():
    product(fence="", barrier=f"{BARRIER} {FENCE}")
