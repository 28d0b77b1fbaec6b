"""wmma: tiles in any layout and address space, and what the manual asks of their addresses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.instructions.numbers import to_bfloat16, to_float16
from ptx.programs import run

DRAW = np.random.default_rng(0)
LAYOUTS = ("row", "col")
TO_BITS = {"bf16": to_bfloat16, "f16": to_float16}
OPERAND_STRIDE, SUM_STRIDE = 24, 20  # elements


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def in_memory(matrix: np.ndarray, layout: str, stride: int) -> np.ndarray:
    """Return lines of a matrix (16, 16), ``stride`` apart, as an array for the threads of a warp.

    It begins at a multiple of 32 bytes.
    """
    size = 16 * stride
    room = np.zeros(size + 32, matrix.dtype)
    start = -room.ctypes.data % 32 // room.itemsize
    lines = room[start : start + size].reshape(16, stride)
    lines[:, :16] = matrix if layout == "row" else matrix.T
    return lines.reshape(32, -1)


def small_numbers() -> np.ndarray:
    return DRAW.integers(-8, 9, (16, 16)).astype(np.float32)


BASES = "".join(f"ld.param.b64 %d{10 + i}, [a{i}];\n" for i in range(4))
STRIDES = f"mov.u32 %r100, {OPERAND_STRIDE}; mov.u32 %r101, {SUM_STRIDE};\n"


def product(kind: str, layouts: tuple[str, ...], of_mma: tuple[str, ...], space: str) -> str:
    """Return the body of a kernel that makes a0 = a1 a2 + a3."""
    a, b, c, d = layouts
    count = 8 if kind == "f16" else 4
    form = "m16n16k16.f32.f32" if kind == "f16" else "m16n16k16.f32.bf16.bf16.f32"
    tiles = [registers(first, n) for first, n in ((50, 8), (20, count), (30, count), (40, 8))]
    return f"""{BASES} {STRIDES}
    wmma.load.a.sync.aligned.{a}.m16n16k16{space}.{kind} {tiles[1]}, [%d11], %r100;
    wmma.load.b.sync.aligned.{b}.m16n16k16{space}.{kind} {tiles[2]}, [%d12], %r100;
    wmma.load.c.sync.aligned.{c}.m16n16k16{space}.f32 {tiles[3]}, [%d13], %r101;
    wmma.mma.sync.aligned.{".".join(of_mma)}.{form} {", ".join(tiles)};
    wmma.store.d.sync.aligned.{d}.m16n16k16{space}.f32 [%d10], {tiles[0]}, %r101;"""


@pytest.mark.parametrize("space", ["", ".global"])
@pytest.mark.parametrize("kind", TO_BITS)
def test_products_in_all_layouts(kind: str, space: str):
    for layouts in itertools.product(LAYOUTS, repeat=4):
        a, b, c = small_numbers(), small_numbers(), small_numbers()
        out = in_memory(np.zeros((16, 16), np.float32), "row", SUM_STRIDE)
        operands = [
            in_memory(TO_BITS[kind](x), layout, OPERAND_STRIDE)
            for x, layout in zip((a, b), layouts, strict=False)
        ]
        operands.append(in_memory(c, layouts[2], SUM_STRIDE))
        run(product(kind, layouts, layouts[:2], space), [out, *operands])
        lines = out.reshape(16, SUM_STRIDE)[:, :16]
        np.testing.assert_array_equal(lines if layouts[3] == "row" else lines.T, a @ b + c)


def test_a_product_in_another_layout_than_the_load_is_wrong():
    a, b, c = small_numbers(), small_numbers(), small_numbers()
    out = in_memory(np.zeros((16, 16), np.float32), "row", SUM_STRIDE)
    operands = [in_memory(to_float16(x), "row", OPERAND_STRIDE) for x in (a, b)]
    operands.append(in_memory(c, "row", SUM_STRIDE))
    run(product("f16", ("row",) * 4, ("col", "row"), ""), [out, *operands])
    assert not np.array_equal(out.reshape(16, SUM_STRIDE)[:, :16], a @ b + c)


def tile_of_sums(change: str = "", barrier: str = "bar.sync 0;", stride: int = 16) -> str:
    """Return a kernel that copies a1 to a0 through a tile in shared memory."""
    return f"""ld.param.b64 %d11, [a1]; mov.u32 %r0, %tid.x; mov.u32 %r1, 0;
    mov.u32 %r101, {stride}; mov.u32 %r2, 16; {change}
    wmma.load.c.sync.aligned.row.m16n16k16.global.f32 {registers(40, 8)}, [%d11], %r101;
    wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%r1], {registers(40, 8)}, %r2;
    {barrier}
    mul.lo.u32 %r3, %r0, 32; xor.b32 %r3, %r3, 512;
    ld.shared.v4.b32 {registers(60, 4)}, [%r3]; ld.shared.v4.b32 {registers(64, 4)}, [%r3+16];
    xor.b32 %r4, %r0, 16; ld.param.b64 %d12, [a0]; mad.wide.u32 %d12, %r4, 32, %d12;
    st.global.v4.b32 [%d12], {registers(60, 4)}; st.global.v4.b32 [%d12+16], {registers(64, 4)};"""


def run_tile(**options) -> tuple[np.ndarray, np.ndarray]:
    values = in_memory(DRAW.random((16, 16), np.float32), "row", 16)
    out = in_memory(np.zeros((16, 16), np.float32), "row", 16)
    run(tile_of_sums(**options), [out, values], shared=1040)
    return out, values


def test_a_tile_in_shared_memory():
    out, values = run_tile()
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"barrier": ""}, "race"),
        ({"change": "add.s64 %d11, %d11, 16;"}, "multiple of 32 bytes"),
        ({"change": "mov.u32 %r1, 16;"}, "multiple of 32 bytes"),
        ({"change": "mov.u32 %r1, 32;"}, "outside"),
        ({"stride": 18}, "multiple of 16 bytes"),
        ({"stride": 20}, "outside"),
        ({"change": "and.b32 %r2, %r0, 16;"}, "different tiles"),
        ({"change": "mul.lo.u32 %r1, %r0, 32;"}, "different tiles"),
        ({"change": "setp.eq.u32 %p1, %r0, 0; @%p1 bra END;", "barrier": "END:"}, "part of a warp"),
    ],
    ids=str,
)
def test_tiles_that_hardware_would_not_take(options: dict, message: str):
    with pytest.raises(Fault, match=message):
        run_tile(**options)


@pytest.mark.parametrize(
    "name",
    [
        "wmma.load.a.sync.aligned.row.m16n16k16.global.s8",
        "wmma.load.a.sync.aligned.row.m32n8k16.global.f16",
        "wmma.load.c.sync.aligned.row.m16n16k16.global.f16",
    ],
)
def test_other_forms_are_refused(name: str):
    out = in_memory(np.zeros((16, 16), np.float32), "row", 16)
    with pytest.raises(Fault, match="unknown form of wmma"):
        run(f"mov.u32 %r100, 16; {name} {registers(20, 8)}, [%d0], %r100;", [out])
