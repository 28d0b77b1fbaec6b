"""Counted bytes and operations, and the shapes that they are counted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from stand_ins import SMALL

from benchmarks import floors
from benchmarks.shapes import SHAPES


def test_a_cpu_gets_a_smaller_batch_and_whole_matrices():
    expected = {
        "office49": (4, 32, 512, 49),
        "office1": (4, 64, 512, 1),
        "vit196": (3, 4, 768, 196),
        "vit1024": (3, 2, 768, 1024),
        "cityscapes": (2, 4, 2048, 512),
        "nyuv2": (3, 2, 2048, 1728),
    }
    found = {s.name: s.scaled("cpu") for s in SHAPES.values()}
    assert {n: (s.tasks, s.batch, s.channels, s.positions) for n, s in found.items()} == expected
    for name, shape in SHAPES.items():
        assert shape.scaled("cuda") == shape
        assert replace(found[name], batch=shape.batch) == shape


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ("nyuv2", 0.258, 0.425),
        ("cityscapes", 0.178, 0.236),
        ("office49", 0.006, 0.009),
        ("vit196", 0.017, 0.022),
        ("vit1024", 0.125, 0.182),
    ],
)
def test_floors_of_an_h200_in_bf16(shape, forward, backward):
    """At 4.3 TB/s and 790 TFLOP/s; worked out by hand, to the digits printed."""
    for count, expected in (
        (floors.forward_passes, forward),
        (floors.backward_passes, backward),
    ):
        work = count("csa_loss", SHAPES[shape], 2, floors.TENSOR_CORES)
        assert floors.floor_ms(work, 4300, 790) == pytest.approx(expected, rel=0.01, abs=5.1e-4)


def test_tsr_reads_once_and_writes_nothing():
    shape = SHAPES["nyuv2"]
    for direction in ("forward", "forward_backward"):
        work = floors.passes("tsr_loss", shape, 2, direction, floors.EXACT)
        assert floors.floor_ms(work, 4300, 790) == pytest.approx(0.0395, rel=1e-3)


def test_exact_work_of_csa():
    """T2 B3 C8 N16: a Gram matrix of side 8 has 36 entries on and below the diagonal."""
    (_, gram), (_, write) = (
        count("csa_loss", SMALL, 4, floors.EXACT)
        for count in (floors.forward_passes, floors.backward_passes)
    )
    read = 2 * 3 * 8 * 16 * 4
    assert gram.bytes == read
    assert gram.flops == 2 * 3 * (2 * 36 * 16) + 2 * 3 * (2 * 8 * 16 * 2)
    assert write.bytes == 2 * read + 2 * 3 * 8 * 8 * 4
    assert write.flops == 2 * 3 * (2 * 8 * 8 * 16)
