"""The times that counts predict for an H200, and the tables of them."""

from __future__ import annotations

import pytest
from stand_ins import HEAD

from benchmarks import h200
from benchmarks.parts import predicted
from benchmarks.shapes import SHAPES

NOTHING = h200.Launch(132, 1, 0, 0, 0, {}, {})


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [
        (256, 124, 98304, 2),  # shared memory, and registers too
        (256, 255, 0, 1),  # two programs of 256 threads would need 131,072 registers
        (256, 128, 160000, 1),  # shared memory
        (128, 32, 0, 16),  # 64 warps
        (32, 16, 0, 32),
        (128, 168, 24576, 3),
    ],
)
def test_programs_of_a_multiprocessor(threads, registers, shared, expected):
    assert h200.resident(threads, registers, shared) == expected


@pytest.mark.parametrize(
    ("counts", "resource", "us"),
    [
        ({"dram_bytes": 4.3e9}, "dram", 1000),
        ({"l2_bytes": 6e9}, "l2", 1000),
        ({"flop": {"wgmma 16-bit": 790e9}}, "matrix", 1000),
        ({"flop": {"mma tf32": 395e9}}, "matrix", 1000 / 0.62),
        ({"shared_bytes": 132 * 128 * 1755}, "shared", 1),
        ({"issued": {"special": 132 * 1755}}, "special", 2),
        ({"issued": {"control": 132 * 4 * 1755}}, "issue", 1),
        ({"latency_clocks": 1755}, "latency", 1),
    ],
)
def test_times_by_rates(counts, resource, us):
    times = h200.times_us(NOTHING._replace(**counts), 6000)
    assert times[resource] == pytest.approx(us)
    assert max(times, key=times.__getitem__) == resource


def test_the_busiest_multiprocessor_decides():
    """133 programs on 132 multiprocessors: one has two of them, the others wait."""
    work = {"flop": {"wgmma 16-bit": 790e9}, "dram_bytes": 4.3e8}
    times = h200.times_us(NOTHING._replace(ctas=133, **work), 6000)
    assert times["matrix"] == pytest.approx(1000 * 2 * 132 / 133)
    assert times["dram"] == pytest.approx(100)
    few = NOTHING._replace(ctas=12, latency_clocks=1755, resident=2)
    assert h200.waves(few) == pytest.approx(12 / 264)
    assert h200.times_us(few, 6000)["latency"] == pytest.approx(1)
    assert h200.times_us(few._replace(ctas=265), 6000)["latency"] == pytest.approx(2)


def kernel_row(**values) -> dict:
    row = {
        "kernel": "_gram_kernel",
        "direction": "forward",
        "of_pytorch": False,
        "grid": [840, 3, 1],
        "sampled": 105,
        "threads": 256,
        "registers": 124,
        "shared_bytes": 98304,
        "requests": 1000,
        "sectors": 16000,
        "requested_sectors": 16000,
        "least_sectors": 16000,
        "wavefronts": 3000,
        "least_wavefronts": 1000,
        "conflicts": {"st.shared.b32": 16.0},
        "operand_bytes": 0,
        "bulk_bytes": 0,
        "dram_bytes": 1 << 20,
        "flop": {"wgmma 16-bit": 7.4e9},
        "issued": {"int": 100},
        "latency_clocks": 5000,
    }
    return row | values


def rows() -> list[dict]:
    case = predicted.Case(SHAPES["nyuv2"], "bfloat16", 90)
    found = [
        kernel_row(),
        kernel_row(kernel="_statistics_kernel", flop={}, wavefronts=0, least_wavefronts=0),
        {"kernel": "mul", "direction": "backward", "of_pytorch": True, "dram_bytes": 4300},
    ]
    found = [{"shape": "nyuv2", "mode": "bfloat16", "capability": 90} | row for row in found]
    for row in found:
        row |= predicted._prediction(row)
    labels = {"shape": "nyuv2", "mode": "bfloat16", "capability": 90}
    return [*found, *(labels | call for call in predicted._calls(case, found))]


@pytest.mark.parametrize(
    ("grid", "ran"),
    [
        ((840, 3, 1), [(x, 0) for x in range(105)]),  # one task's tiles of one sample
        ((1344, 1, 1), [(x, 0) for x in range(56)]),
        ((10, 2, 1), [(x, y) for x in range(10) for y in range(2)]),  # by something else: all
        ((1001, 1, 1), [(x, 0) for x in range(2, 1001, 4)]),  # too many
    ],
)
def test_sampled_programs(grid, ran):
    pytest.importorskip("triton")
    from benchmarks import launches

    shape = SHAPES["nyuv2"]
    x, y, _ = grid
    every = [(i, j) for i in range(x) for j in range(y)]
    assert [one for one in every if launches.sample_of(grid, shape)(*one, 0)] == ran
    for place in (0.0, 0.5, 0.99):
        assert sum(launches.one_of(grid, shape, place)(*one, 0) for one in every) == 1


def test_a_sample_stands_for_the_launch():
    launch = predicted.as_launch(kernel_row())
    assert (launch.ctas, launch.resident) == (2520, 2)
    assert launch.dram_bytes == 24 << 20
    assert launch.l2_bytes == 24 * 32 * 16000
    assert launch.shared_bytes == 24 * 128 * 3000
    assert launch.flop == {"wgmma 16-bit": 24 * 7.4e9}


def test_a_call_is_the_sum_of_its_launches():
    gram, statistics, operation, forward, both = rows()
    assert operation["us"] == pytest.approx(h200.LAUNCH_US + 0.001)
    assert (gram["bound"], gram["next"]) == ("matrix", "latency")
    assert forward["us"] == pytest.approx(gram["us"] + statistics["us"], rel=1e-4)
    assert both["us"] == pytest.approx(forward["us"] + operation["us"], rel=1e-4)
    assert (both["launches"], both["launches_of_pytorch"]) == (3, 1)
    assert forward["floor_us"] == pytest.approx(258, rel=0.01)


def test_tables_of_predictions():
    result = {**HEAD, "rows": [*rows(), kernel_row(shape="small", mode="tf32", capability=80)]}
    result["versions"] = {"triton": "3.9.0"}
    calls = predicted.calls_table(result)
    assert calls.count("\n| nyuv2") == 2
    assert "Predicted, not measured" in calls and "small" not in calls
    table = predicted.kernels_table(result)
    (gram,) = [line for line in table.split("\n") if "`_gram_kernel`" in line]
    assert "3x" in gram and "`st.shared.b32` 16x" in gram
    assert " 83% " in gram
