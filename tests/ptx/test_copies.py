"""Asynchronous copies: cp.async, TMA and mbarriers."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.programs import run

COPY = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; {begin}
{wait}
xor.b32 %r3, %r2, {distance};
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3]; st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};
{end}"""
BEGIN = "cp.async.cg.shared.global [%r2], [%d0], 16{size}; cp.async.commit_group;"
WAIT = "cp.async.wait_group 0; bar.sync 0;"


def copied(
    *, size: str = "", wait: str = WAIT, distance: int = 1, end: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    source = np.arange(64 * 4, dtype=np.uint32).reshape(64, 4)
    target = np.zeros_like(source)
    begin = BEGIN.format(size=size)
    text = COPY.format(begin=begin, wait=wait, distance=16 * distance, end=end)
    run(text, [source, target], threads=64, shared=1024)
    return source, target


def test_copies_arrive():
    source, target = copied()
    np.testing.assert_array_equal(target, source[np.arange(64) ^ 1])


def test_what_a_copy_does_not_read_is_zero():
    source, target = copied(size=", 8")
    np.testing.assert_array_equal(target[:, :2], source[np.arange(64) ^ 1, :2])
    assert not target[:, 2:].any()


@pytest.mark.parametrize(
    ("wait", "distance"),
    [("bar.sync 0;", 1), ("cp.async.wait_group 1; bar.sync 0;", 1), ("", 0)],
)
def test_a_copy_is_there_when_it_was_waited_for(wait, distance):
    with pytest.raises(Fault, match="asynchronous copy has not delivered"):
        copied(wait=wait, distance=distance, end=WAIT)


def test_others_see_a_copy_after_a_barrier():
    copied(wait="cp.async.wait_group 0;", distance=0)
    with pytest.raises(Fault, match="race"):
        copied(wait="cp.async.wait_group 0;")


def test_only_the_newest_groups_may_be_under_way():
    source = np.arange(64 * 4, dtype=np.uint32).reshape(64, 4)
    two = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4;" + "".join(
        f"cp.async.cg.shared.global [%r2+{1024 * i}], [%d0], 16; cp.async.commit_group;"
        for i in range(2)
    )
    read = "ld.shared.b32 %r4, [%r2+{}]; cp.async.wait_all;"
    run(f"{two} cp.async.wait_group 1; {read.format(0)}", [source], threads=64, shared=2048)
    with pytest.raises(Fault, match="has not delivered"):
        run(f"{two} cp.async.wait_group 1; {read.format(1024)}", [source], threads=64, shared=2048)


def test_nobody_writes_under_a_copy():
    with pytest.raises(Fault, match="writes to shared memory under an asynchronous copy"):
        copied(wait="st.shared.b32 [%r2], %r1;", end=WAIT)


def test_a_launch_does_not_end_with_a_copy_under_way():
    text = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4;" + BEGIN.format(size="")
    with pytest.raises(Fault, match="ends with an asynchronous copy under way"):
        run(text, [np.zeros((32, 4), np.uint32)], shared=512)


TMA = """mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, 1024;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; {barrier}
mov.b64 %d1, blob; cvta.param.u64 %d1, %d1;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {expected};
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    [0], [%d1, {{{x}, {y}}}], [%r2];
{{ .reg .pred complete; wait: mbarrier.try_wait.parity.shared.b64 complete, [%r2], 0;
{wait} }}
shl.b32 %r3, %r1, 3; ld.shared.v2.b32 {{%r4, %r5}}, [%r3]; st.global.v2.b32 [%d0], {{%r4, %r5}};
bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r2];"""
LOOP = "@!complete bra.uni wait;"


class TensorMap(ctypes.Structure):
    """A tensor's map, as the driver of these tests makes it."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("address", "element", "rank", "swizzle")]
    _fields_ += [("sizes", ctypes.c_uint64 * 3), ("strides", ctypes.c_uint64 * 2)]
    _fields_ += [("box", ctypes.c_uint64 * 3), ("unused", ctypes.c_uint64 * 4)]


def bulk_copied(
    x: int = 0,
    y: int = 0,
    *,
    swizzle: int = 0,
    expected: int = 256,
    wait: str = LOOP,
    before: str = "",
    barrier: str = "bar.sync 0;",
) -> tuple[np.ndarray, np.ndarray]:
    """Copy 4 rows of 32 elements of a 6 x 40 tensor."""
    tensor = np.arange(6 * 40, dtype=np.uint16).reshape(6, 40)
    target = np.zeros((32, 4), np.uint16)
    tensor_map = TensorMap(tensor.ctypes.data, 2, 2, swizzle, (40, 6), (80,), (32, 4))
    text = before + TMA.format(expected=expected, x=x, y=y, wait=wait, barrier=barrier)
    run(text, [target], shared=1032, blob=bytes(tensor_map), memory=[tensor])
    return tensor, target.reshape(4, 32)


def test_tma_copies_a_box():
    tensor, box = bulk_copied(8, 2)
    np.testing.assert_array_equal(box, tensor[2:6, 8:40])


@pytest.mark.parametrize(("x", "y"), [(20, 4), (-5, -1)])
def test_elements_outside_the_tensor_are_zero(x, y):
    tensor, box = bulk_copied(x, y)
    padded = np.pad(tensor, ((8, 8), (40, 40)))
    np.testing.assert_array_equal(box, padded[8 + y : 12 + y, 40 + x : 72 + x])


@pytest.mark.parametrize(("swizzle", "bits"), [(1, 1), (2, 3), (3, 7)])
def test_swizzles(swizzle, bits):
    """Units of 16 bytes change places within rows of 128 bytes, as the manual draws it."""
    tensor, box = bulk_copied(swizzle=swizzle)
    flat = box.view(np.uint8).reshape(-1, 16)  # in the order of shared memory
    plain = np.ascontiguousarray(tensor[:4, :32]).view(np.uint8).reshape(-1, 16)
    for unit in range(16):
        row = unit * 16 >> 7
        np.testing.assert_array_equal(flat[unit ^ (row & bits)], plain[unit])


def test_tma_delivers_what_its_mbarrier_waits_for():
    with pytest.raises(Fault, match="has not delivered"):
        bulk_copied(wait="")
    with pytest.raises(Fault, match="waits for an mbarrier for ever"):
        bulk_copied(expected=258)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", ""),
        ("st.shared.b32 [%r7], %r1; fence.proxy.async.shared::cta; bar.sync 0;", ""),
        ("st.shared.b32 [%r7], %r1; bar.sync 0;", "before no fence.proxy.async"),
    ],
)
def test_tma_writes_over_what_was_written(written, message):
    begin = f"mov.u32 %r1, %tid.x; shl.b32 %r7, %r1, 2; {written}"
    if message:
        with pytest.raises(Fault, match=message):
            bulk_copied(before=begin)
    else:
        bulk_copied(before=begin)


def test_an_mbarrier_is_used_after_a_barrier():
    with pytest.raises(Fault, match="race"):
        bulk_copied(barrier="")


def test_an_mbarrier_is_initialised_once_there_is_one():
    with pytest.raises(Fault, match="that nobody wrote"):
        run("mbarrier.try_wait.parity.shared.b64 %p1, [0], 0;", shared=16)
    begin = (
        "mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [0], 1;"
    )
    twice = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [0], 0;" * 2
    with pytest.raises(Fault, match="more arrivals than it counts"):
        run(begin + twice, shared=16)
