"""Loads and stores, branches, barriers, and what lanes of a warp do together."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.programs import run

LANE = np.arange(32, dtype=np.uint32)


def test_vectors_of_elements():
    source = np.arange(32 * 4, dtype=np.uint32).reshape(32, 4)
    target = np.zeros_like(source)
    run(
        """ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];
        st.global.v2.b32 [%d1], {%r4, %r3}; st.global.v2.b32 [%d1+8], {%r2, %r1};""",
        [source, target],
    )
    np.testing.assert_array_equal(target, source[:, ::-1])


def test_narrow_loads_extend():
    source = np.full(32, -2, np.int8)
    target = np.zeros((32, 2), np.int32)
    run(
        """ld.global.s8 %r1, [%d0]; ld.global.u8 %r2, [%d0];
        st.global.b32 [%d1], %r1; st.global.b32 [%d1+4], %r2;""",
        [source, target],
    )
    assert target.tolist() == [[-2, 254]] * 32


@pytest.mark.parametrize(
    ("address", "message"),
    [("%d0+128", "outside all tensors"), ("%d0+-128", "outside"), ("%d0+2", "misaligned")],
)
@pytest.mark.parametrize("access", ["ld.global.b32 %r1, [{}]", "st.global.b32 [{}], %r1"])
def test_addresses_are_checked(access, address, message):
    with pytest.raises(Fault, match=message):
        run(f"mov.u32 %r1, 0; {access.format(address)};", [np.zeros(32, np.uint32)])


def test_an_address_is_checked_where_a_lane_is_active():
    array = np.zeros(32, np.uint32)
    text = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {}; @%p1 ld.global.b32 %r2, [%d0+4];"
    run(text.format(31), [array])
    with pytest.raises(Fault, match="outside all tensors"):
        run(text.format(32), [array])


def test_predicates_keep_the_other_lanes():
    target = np.zeros(32, np.uint32)
    run(
        """mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 1;
        mov.u32 %r3, 7; @%p1 mov.u32 %r3, 9; @!%p1 add.u32 %r3, %r3, 1;
        st.global.b32 [%d0], %r3;""",
        [target],
    )
    np.testing.assert_array_equal(target, np.where(LANE % 2 == 1, 9, 8))


def test_a_loop_of_another_length_in_each_lane():
    target = np.zeros(64, np.uint32)
    run(
        """mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.u32 %r3, 0;
        again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra done;
        add.u32 %r3, %r3, %r2; add.u32 %r2, %r2, 1; bra again;
        done: add.u32 %r3, %r3, 1000; st.global.b32 [%d0], %r3;""",
        [target],
        threads=64,
    )
    i = np.arange(64)
    np.testing.assert_array_equal(target, i * (i - 1) // 2 + 1000)


def test_braces_have_registers_and_labels_of_their_own():
    target = np.zeros(32, np.uint32)
    one = "{ .reg .pred own; setp.eq.u32 own, %r1, 0; @own bra skip; add.u32 %r2, %r2, 1; skip: }"
    run(f"mov.u32 %r1, %tid.x; mov.u32 %r2, 0; {one} {one} st.global.b32 [%d0], %r2;", [target])
    np.testing.assert_array_equal(target, np.where(LANE == 0, 0, 2))


def test_registers_that_nothing_wrote():
    target = np.zeros(32, np.uint32)
    run("mov.b32 %r1, %r2; st.global.b32 [%d0], %r1;", [target])
    assert (target == 0xFFFFFFFF).all()  # poison: NaN as a float
    with pytest.raises(Fault, match="predicate that nothing wrote"):
        run("@%p1 mov.u32 %r1, 1;")


EXCHANGE = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1;
{between}
xor.b32 %r3, %r2, {distance}; ld.shared.b32 %r4, [%r3]; st.global.b32 [%d0], %r4;"""


def exchange(between: str, distance: int, threads: int = 64) -> np.ndarray:
    target = np.zeros(threads, np.uint32)
    text = EXCHANGE.format(between=between, distance=4 * distance)
    run(text, [target], threads=threads, shared=4 * threads, ctas=1)
    return target


def test_barriers_order_shared_memory():
    np.testing.assert_array_equal(exchange("bar.sync 0;", 32), np.arange(64) ^ 32)
    np.testing.assert_array_equal(exchange("bar.warp.sync -1;", 1), np.arange(64) ^ 1)
    np.testing.assert_array_equal(exchange("", 0), np.arange(64))  # its own: no barrier


@pytest.mark.parametrize(
    ("between", "distance"), [("", 1), ("", 32), ("bar.warp.sync -1;", 32), ("membar.cta;", 1)]
)
def test_reading_what_another_thread_wrote_is_a_race(between, distance):
    with pytest.raises(Fault, match="race: reads shared memory that another thread wrote"):
        exchange(between, distance)


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
@pytest.mark.parametrize("second", ["ld.shared.b32 %r4, [%r3]", "st.shared.b32 [%r3], %r1"])
def test_writing_over_what_another_thread_used_is_a_race(second, barrier):
    text = f"""mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1; bar.sync 0;
    xor.b32 %r3, %r2, 128; {second}; {barrier} st.shared.b32 [%r2], %r1;"""
    if barrier:
        run(text, threads=64, shared=256)
    else:
        with pytest.raises(Fault, match="race: writes over what another thread"):
            run(text, threads=64, shared=256)


def test_a_race_is_found_in_every_loop():
    """A barrier at the end of a loop is missing: the next turn writes what others still read."""
    text = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; mov.u32 %r5, 0;
    again: st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r4, [%r3]; {}
    add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 3; @%p1 bra again;"""
    run(text.format("bar.sync 0;"), threads=64, shared=256)
    with pytest.raises(Fault, match="race"):
        run(text.format(""), threads=64, shared=256)


def test_lanes_that_store_together_hold_one_value():
    same = "mov.u32 %r1, 5; mov.u32 %r2, 0; st.shared.b32 [%r2], %r1;"
    run(same, shared=16)
    with pytest.raises(Fault, match="different values in one place"):
        run(
            "mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 8; mov.u32 %r2, 0; st.shared.b32 [%r2], %r1;",
            shared=16,
        )


def test_lanes_may_differ_by_rounding():
    text = """mov.u32 %r1, %tid.x; and.b32 %r1, %r1, 1; mul.lo.u32 %r1, %r1, {step};
    add.u32 %r1, %r1, {first}; st.shared.b32 [0], %r1;"""
    one = 0x3F800000
    run(text.format(step=16, first=one), shared=16)
    for step, first in ((17, one), (1, 3), (1, 0x7F800000)):  # too far; a small integer; infinity
        with pytest.raises(Fault, match="different values in one place"):
            run(text.format(step=step, first=first), shared=16)


def test_shared_memory_that_nobody_wrote():
    with pytest.raises(Fault, match="that nobody wrote"):
        run("ld.shared.b32 %r1, [0];", shared=16)


def test_shared_memory_has_an_end():
    text = "mov.u32 %r1, {}; st.shared.b32 [%r1], %r1;"
    run(text.format(12), shared=16)
    for place, message in ((16, "outside the 16 bytes"), (-4, "outside"), (2, "misaligned")):
        with pytest.raises(Fault, match=message):
            run(text.format(place), shared=16)


def test_barriers_that_some_threads_miss():
    some = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32;"
    with pytest.raises(Fault, match="have ended, others wait"):
        run(some + "@%p1 bra out; bar.sync 0; out:", threads=64)
    with pytest.raises(Fault, match="wait at different barriers"):
        run(some + "@%p1 bra other; bar.sync 0; bra out; other: bar.sync 1; out:", threads=64)
    with pytest.raises(Fault, match="barrier for some lanes only"):
        run(some + "@%p1 bar.sync 0;", threads=64)


def test_threads_of_a_cta_may_reach_one_barrier_on_two_ways():
    target = np.zeros(64, np.uint32)
    run(
        """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; setp.lt.u32 %p1, %r1, 32; @%p1 bra other;
        st.shared.b32 [%r2], 1; bar.sync 0; bra out;
        other: st.shared.b32 [%r2], 2; bar.sync 0;
        out: xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]; st.global.b32 [%d0], %r4;""",
        [target],
        threads=64,
        shared=256,
    )
    assert target.tolist() == [1] * 32 + [2] * 32


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "expected"),
    [
        ("bfly", 5, 31, LANE ^ 5),
        ("idx", 3, 31, np.full(32, 3)),
        ("up", 2, 0, np.where(LANE >= 2, LANE - 2, LANE)),
        ("down", 3, 31, np.where(LANE < 29, LANE + 3, LANE)),
        # In segments of eight lanes: the upper bits of `clamp` are their mask.
        ("down", 3, 0x181F, np.where(LANE % 8 < 5, LANE + 3, LANE)),
        ("idx", 2, 0x181F, LANE // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, by, clamp, expected):
    target = np.zeros((32, 2), np.uint32)
    run(
        f"""mov.u32 %r1, %tid.x; shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;
        selp.u32 %r3, 1, 0, %p1; st.global.v2.b32 [%d0], {{%r2, %r3}};""",
        [target],
    )
    np.testing.assert_array_equal(target[:, 0], expected)
    inside = np.ones(32) if mode in ("bfly", "idx") else expected != LANE
    np.testing.assert_array_equal(target[:, 1], inside)


def test_lanes_of_a_mask_have_to_be_there():
    some = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @!%p1 bra out;"
    run(some + "shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xFFFF; out:")
    for instruction in ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1", "bar.warp.sync -1"):
        with pytest.raises(Fault, match="names other lanes than are there"):
            run(f"{some} {instruction}; out:")
    with pytest.raises(Fault, match="reads a lane that is not there"):
        run(some + "shfl.sync.bfly.b32 %r2, %r1, 16, 31, 0xFFFF; out:")


def test_votes_and_sums_of_a_warp():
    target = np.zeros((64, 4), np.uint32)
    run(
        """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r2, %p1, -1;
        vote.sync.all.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2;
        vote.sync.any.pred %p3, %p1, -1; selp.u32 %r4, 1, 0, %p3;
        redux.sync.add.s32 %r5, %r1, -1; st.global.v4.b32 [%d0], {%r2, %r3, %r4, %r5};""",
        [target],
        threads=64,
    )
    assert target[:32].tolist() == [[0xFFFFFFFF, 1, 1, 496]] * 32
    assert target[32:].tolist() == [[0xFF, 0, 1, 496 + 1024]] * 32


def test_one_lane_is_elected():
    target = np.zeros(64, np.uint32)
    run(
        """mov.u32 %r1, %tid.x; elect.sync %r2|%p1, -1;
        mov.u32 %r3, 0; @%p1 mov.u32 %r3, 1; st.global.b32 [%d0], %r3;""",
        [target],
        threads=64,
    )
    assert np.flatnonzero(target).tolist() == [0, 32]


def test_local_memory_is_each_threads_own():
    target = np.zeros(64, np.uint32)
    run(
        """.local .align 8 .b8 depot[16]; mov.u32 %r1, %tid.x; mov.u32 %r2, depot;
        st.local.b32 [%r2+8], %r1; ld.local.b32 %r3, [%r2+8]; st.global.b32 [%d0], %r3;""",
        [target],
        threads=64,
    )
    np.testing.assert_array_equal(target, np.arange(64))
    with pytest.raises(Fault, match="outside local memory"):
        run(".local .align 8 .b8 depot[16]; mov.u32 %r2, depot; st.local.b32 [%r2+16], %r2;")


def test_ctas_have_shared_memory_of_their_own():
    target = np.zeros(64, np.uint32)
    run(
        """mov.u32 %r1, %ctaid.x; st.shared.b32 [0], %r1; bar.sync 0; ld.shared.b32 %r2, [0];
        mul.wide.u32 %d5, %r1, 128; add.u64 %d6, %d0, %d5; st.global.b32 [%d6], %r2;""",
        [target],
        ctas=2,
        shared=16,
    )
    assert target.tolist() == [0] * 32 + [1] * 32
