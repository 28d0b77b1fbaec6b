"""Counters of PTX that was written for a known answer, damaged layouts among them."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import machine, program
from ptx.counters import Counters, wavefronts

THREADS = 64
HEAD = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 shared_memory[];
.visible .entry counted(.param .u64 in, .param .u64 out)
.reqntid 64
{
    .reg .pred %p<4>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<20>;
    ld.param.b64 %rd1, [in];
    ld.param.b64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, shared_memory;
"""


def counted(body: str, grid: int = 1) -> Counters:
    """Run instructions: ``%r1`` is the thread, ``%rd1`` and ``%rd2`` memory, ``%r2`` shared."""
    kernel = program.parse(f"{HEAD}{body}\n    ret;\n}}\n")["counted"]
    memory = [np.zeros(1 << 16, np.uint8) for _ in range(3)]
    # Aligned as a GPU's allocations are.
    first = [m.ctypes.data + (-m.ctypes.data) % 256 for m in memory[:2]]
    counters = Counters()
    machine.run(
        kernel,
        (grid, 1, 1),
        (THREADS, 1, 1),
        [address.to_bytes(8, "little") for address in first],
        shared=1 << 14,
        allowed=[(m.ctypes.data, m.ctypes.data + m.nbytes) for m in memory[:2]],
        observer=counters,
        races=False,
    )
    return counters


def load(stride: int) -> str:
    """Read four bytes a thread, ``stride`` bytes apart."""
    return f"""
    mul.wide.u32 %rd3, %r1, {stride};
    add.s64 %rd4, %rd1, %rd3;
    ld.global.b32 %r3, [%rd4];"""


@pytest.mark.parametrize(
    ("stride", "sectors", "least"), [(4, 4, 4), (8, 8, 4), (12, 12, 4), (32, 32, 4), (0, 1, 1)]
)
def test_sectors_of_a_request(stride: int, sectors: int, least: int):
    counters = counted(load(stride))
    assert counters.accesses == {
        "ld.global.b32": {"requests": 2, "sectors": 2 * sectors, "least_sectors": 2 * least}
    }
    # Both warps read the first sector if none of them moves on.
    assert counters.read.bytes_of_sectors() == 32 * sectors * (2 if stride else 1)
    assert counters.written.bytes_of_sectors() == 0


def test_a_line_is_read_once_however_many_ask():
    counters = counted(load(4), grid=3)
    assert counters.ctas == 3
    assert counters.accesses["ld.global.b32"]["sectors"] == 3 * 8
    assert counters.read.bytes_of_sectors() == 256


@pytest.mark.parametrize(("cache", "requested"), [("", 2), (".cv", 4)])
def test_a_plain_load_hits_where_its_cta_has_loaded_before(cache: str, requested: int):
    """Two CTAs load 256 bytes twice each, and store them once."""
    twice = "".join(f"\n    ld.global{cache}.b32 %r{r}, [%rd4];" for r in (3, 4))
    counters = counted(
        f"""
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;{twice}
    add.s64 %rd5, %rd2, %rd3;
    st.global.b32 [%rd5], %r4;""",
        grid=2,
    )
    assert counters.requested == 8 * (requested + 2)


def test_inactive_lanes_ask_for_nothing():
    counters = counted(f"    setp.lt.u32 %p1, %r1, 8;\n@%p1 bra inside;\n ret;\ninside:{load(4)}")
    assert counters.accesses["ld.global.b32"] == {"requests": 1, "sectors": 1, "least_sectors": 1}


def test_wide_loads_and_stores():
    counters = counted("""
    mul.wide.u32 %rd3, %r1, 16;
    add.s64 %rd4, %rd1, %rd3;
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd4];
    add.s64 %rd5, %rd2, %rd3;
    st.global.v4.b32 [%rd5], {%r4, %r5, %r6, %r7};""")
    each = {"requests": 2, "sectors": 32, "least_sectors": 32}
    assert counters.accesses == {"ld.global.v4.b32": each, "st.global.v4.b32": each}
    assert counters.read.bytes_of_sectors() == counters.written.bytes_of_sectors() == 1024


def in_shared(stride: int, instruction: str) -> str:
    return f"""
    mul.lo.s32 %r3, %r1, {stride};
    add.s32 %r3, %r2, %r3;
    {instruction};"""


@pytest.mark.parametrize(
    ("stride", "instruction", "taken", "least"),
    [
        (4, "st.shared.b32 [%r3], %r1", 1, 1),
        (8, "st.shared.b32 [%r3], %r1", 2, 1),
        (128, "st.shared.b32 [%r3], %r1", 32, 1),
        (132, "st.shared.b32 [%r3], %r1", 1, 1),  # padded rows
        (0, "ld.shared.b32 %r4, [%r3]", 1, 1),  # all lanes share a word
        (8, "st.shared.v2.b32 [%r3], {%r1, %r1}", 2, 2),
        (16, "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]", 4, 4),
        (32, "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]", 8, 4),
        (128, "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]", 32, 4),
    ],
)
def test_wavefronts_of_shared_memory(stride: int, instruction: str, taken: int, least: int):
    (count,) = counted(in_shared(stride, instruction)).shared.values()
    assert count == {"requests": 2, "wavefronts": 2 * taken, "least_wavefronts": 2 * least}


def test_ctas_that_differ_are_counted_each():
    counters = counted(
        """
    mov.u32 %r5, %ctaid.x;
    add.s32 %r5, %r5, 2;
    shl.b32 %r3, %r1, %r5;
    add.s32 %r3, %r2, %r3;
    st.shared.b32 [%r3], %r1;""",
        grid=3,
    )
    count = counters.shared["st.shared.b32"]
    assert count == {"requests": 6, "wavefronts": 2 * (1 + 2 + 4), "least_wavefronts": 2 * 3}
    alike = counted(in_shared(8, "st.shared.b32 [%r3], %r1"), grid=3).shared["st.shared.b32"]
    assert alike == {"requests": 6, "wavefronts": 12, "least_wavefronts": 6}


@pytest.mark.parametrize(
    ("layout", "taken"),
    [
        ("shl.b32 %r3, %r1, 4;", 4),  # rows one after the other
        ("shl.b32 %r3, %r1, 7;", 32),  # a column of a matrix with rows of 128 bytes
        # The same in a layout that exchanges the 16-byte parts of a row by its number.
        (
            "shl.b32 %r3, %r1, 7; and.b32 %r4, %r1, 7; shl.b32 %r4, %r4, 4; xor.b32 %r3, %r3, %r4;",
            4,
        ),
    ],
)
def test_only_a_swizzled_layout_is_without_conflicts(layout: str, taken: int):
    (count,) = counted(f"""
    {layout}
    add.s32 %r3, %r2, %r3;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r3];""").shared.values()
    assert (count["wavefronts"], count["least_wavefronts"]) == (2 * taken, 2 * 4)


def test_products_and_instructions():
    counters = counted("""
    mov.b32 %r4, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r10, %r11, %r12, %r13},
        {%r4, %r4, %r4, %r4}, {%r4, %r4}, {%r4, %r4, %r4, %r4};
    add.f32 %r5, %r10, %r11;
    add.s32 %r6, %r1, 1;
    cvt.rn.bf16x2.f32 %r7, %r5, %r5;
    ex2.approx.f32 %r8, %r5;
    shfl.sync.bfly.b32 %r9, %r8, 1, 31, -1;
    bar.sync 0;""")
    assert counters.flop == {"mma 16-bit": 2 * 2 * 16 * 8 * 16}
    assert counters.issued_by_class == {
        "matrix": 2, "fp32": 2, "int": 2, "conversion": 2, "special": 2, "shuffle": 2,
        "control": 4,
    }  # fmt: skip


def test_wavefronts_of_narrow_and_inactive_lanes():
    lanes = np.arange(32)
    some = lanes[None] < 4
    assert wavefronts(2 * lanes[None], np.ones((1, 32), bool), 2) == (1, 1)
    assert wavefronts(256 * lanes[None], some, 4) == (4, 1)
    assert wavefronts(256 * lanes[None], some & False, 4) == (0, 0)
    assert wavefronts(16 * lanes[None], some, 16) == (1, 1)
