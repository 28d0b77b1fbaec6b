"""The longest chain of instructions that wait for each other, of a few that were written here."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest

from ptx.latency import CriticalPath, Latencies

OF = Latencies()


def clocks(*lines: str, warps: int = 4) -> float:
    """Return the clocks of these instructions, which all warps execute in this order."""
    path = CriticalPath()
    path.start(None, (9, 1, 1), (32 * warps, 1, 1), 0, 1)
    feed(path, *lines, warps=warps)
    return path.clocks


def feed(path: CriticalPath, *lines: str, warps: int = 4, first: int = 0) -> None:
    """Issue instructions; the same lines are the same place in the kernel."""
    places: dict[str, int] = {}
    for text in itertools.chain.from_iterable(map(_split, lines)):
        index = first + places.setdefault(text, len(places))
        op, *modifiers = re.sub(r"^@\S+ ", "", text).split(" ")[0].rstrip(";").split(".")
        instruction = SimpleNamespace(op=op, modifiers=tuple(modifiers), index=index, text=text)
        path.issued(instruction, warps)
        if "bulk" in modifiers:
            path.bulk_copy(instruction, range(1024), 4, 1)


def _split(line: str) -> list[str]:
    return [f"{part.strip()};" for part in line.split(";") if part.strip()]


LOAD = "ld.global.b32 %r1, [%rd1]"


def test_instructions_that_wait_take_longer_than_others():
    independent = [f"add.f32 %f{i}, %f0, %f0" for i in range(1, 9)]
    chain = [f"add.f32 %f{i}, %f{i - 1}, %f0" for i in range(1, 9)]
    assert clocks(*independent) == 7 + OF.arithmetic
    assert clocks(*chain) == 8 * OF.arithmetic
    assert clocks(*independent, warps=8) == 14 + OF.arithmetic


def test_loads_wait_for_their_addresses_alone():
    one = clocks(LOAD)
    assert one == OF.memory + 4 * 128 / OF.port_bytes
    assert clocks(LOAD, "ld.global.b32 %r2, [%rd2]") == pytest.approx(one, abs=10)
    assert clocks(LOAD, "mul.wide.u32 %rd3, %r1, 4", "ld.global.b32 %r2, [%rd3]") > 2 * OF.memory


def test_a_loop_waits_for_what_it_uses():
    step = [LOAD, "add.f32 %f1, %f1, %r1", "@%p1 bra $again"]
    assert clocks(*2 * step) > 2 * OF.memory
    assert clocks(*2 * [LOAD, "@%p1 bra $again"]) < 1.1 * OF.memory


def test_copies_in_flight_are_not_waited_for():
    copy = "cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 16; cp.async.commit_group"
    wait = "cp.async.wait_group {}; bar.sync 0"
    both, one_by_one = (
        clocks(copy, copy, wait.format(1), wait.format(0)),
        clocks(copy, wait.format(0), copy, wait.format(0)),
    )
    assert OF.memory < both < 1.2 * OF.memory < 2 * OF.memory < one_by_one


def test_a_wait_leaves_the_newest_copies_alone():
    copy = "cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 16; cp.async.commit_group"
    chain = [f"add.f32 %f{i}, %f{i - 1}, %f0" for i in range(1, OF.memory // OF.arithmetic)]
    wait = "cp.async.wait_group {}"
    between = (*chain, "bar.sync 0")
    taken = clocks(copy, *between, copy, wait.format(1), *between, wait.format(0))
    assert 2 * OF.memory < taken < 2.2 * OF.memory
    first = clocks(copy, *between, copy, wait.format(0), *between)
    assert first > 2.8 * OF.memory


def test_products_of_warpgroups_follow_each_other():
    product = (
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%f1, %f2}, %rd1, %rd2, 1, 1, 1, 0, 1; "
        "wgmma.commit_group.sync.aligned"
    )
    wait = "wgmma.wait_group.sync.aligned 0"
    work = 2 * 64 * 128 * 16 / OF.flop_16_bit
    assert clocks(product, wait) == pytest.approx(work + OF.product_of_warpgroup, abs=4)
    assert clocks(product, product, wait) == pytest.approx(
        2 * work + OF.product_of_warpgroup, abs=4
    )
    assert clocks(product, wait, product, wait) == pytest.approx(
        2 * (work + OF.product_of_warpgroup), abs=6
    )


def test_a_bulk_copy_arrives_at_its_barrier():
    copy = (
        "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 4096; "
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%r2], [%rd1, {%r3, %r4}], [%r1]"
    )
    wait = "mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0"
    assert OF.memory < clocks(copy, copy, wait, wait) < 1.5 * OF.memory
    assert clocks(copy, wait, copy, wait) > 2 * OF.memory


def test_a_loop_that_waits_for_a_copy_waits_for_that_one_alone():
    copy = (
        "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 4096; "
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%r2], [%rd1, {%r3, %r4}], [%r1]"
    )
    chain = [f"add.f32 %f{i}, %f{i - 1}, %f0" for i in range(1, OF.memory // OF.arithmetic)]
    path = CriticalPath()
    path.start(None, (9, 1, 1), (128, 1, 1), 0, 1)
    spin = "mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra $wait"
    feed(path, copy, *chain, "bar.sync 0", copy)
    feed(path, *3 * [spin], first=500)
    at_first = path.clock
    feed(path, spin, first=900)
    assert OF.memory < at_first < 1.2 * OF.memory
    assert path.clock > 1.9 * OF.memory


def test_one_cta_only():
    with pytest.raises(ValueError, match="one CTA, got 2"):
        CriticalPath().start(None, (2, 1, 1), (32, 1, 1), 0, 2)
