"""Every kernel compiles for each GPU generation without a GPU; what it is compiled to."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow_cpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.timeout(600),
]

# N side in large tiles, N side with unaligned rows, C side.
SHAPES = ["nyuv2", "office49", "vit1024"]
MODES = ["bfloat16", "float16", "ieee", "tf32x3", "tf32"]
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTC"}

# Committed. The compiler's choices differ a little from one machine to another.
REPORT = Path(__file__).parents[2] / "benchmarks/results/compiler/static.json"
SPARE_REGISTERS = 4

HEAVY = ("_gram_kernel", "_gradient_kernel")
SHARED_KILOBYTES = {80: 163, 90: 227, 100: 227}


def compiled(capability: int, *options: str, **variables: str) -> list[dict]:
    """Rows of benchmarks.static_report; a process of its own, since this one may interpret.

    One for all modes and shapes: most kernels are the same for several of them.
    """
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REPMTL_TILES")
    }
    command = [sys.executable, "-m", "benchmarks.static_report", "--json"]
    command += ["--capability", str(capability), "--layout", "contiguous"]
    done = subprocess.run(
        [*command, *options],
        cwd=Path(__file__).parents[2],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_kernels_compile_without_spills_and_with_wide_loads(capability: int):
    disassembled = ("--disassemble", *HEAVY, "_statistics_kernel")
    rows = compiled(capability, "--mode", *MODES, "--shape", *SHAPES, *disassembled)
    for mode in MODES:
        kernels = {row["kernel"] for row in rows if row["mode"] == mode}
        assert len(kernels) >= 8, (mode, kernels)  # every stage is there
    spilled = [
        (r["kernel"], r["mode"], r["shape"], r["spill_bytes"]) for r in rows if r["spill_bytes"]
    ]
    assert not spilled
    assert max(row["shared_bytes"] for row in rows) <= SHARED_KILOBYTES[capability] * 1024
    every = set(itertools.product(HEAVY, MODES, SHAPES))
    heavy = [row for row in rows if row["kernel"] in HEAVY]
    assert {(row["kernel"], row["mode"], row["shape"]) for row in heavy} == every
    for row in heavy:
        names = "".join(row["matrix_instructions"])
        assert (TENSOR_CORES[capability] in names) == (row["mode"] != "ieee"), row
        assert not row["serial"], row
    reading = [row for row in rows if row["kernel"] == "_statistics_kernel"]
    assert {(row["mode"], row["shape"]) for row in reading} == set(itertools.product(MODES, SHAPES))
    for row in reading:
        if row["shape"] != "office49":  # 49 positions: rows that are not aligned
            assert set(row["global_loads"]) <= {"128", "32"} and row["global_loads"]["128"] > 0, row

    import triton

    report = json.loads(REPORT.read_text())
    if (version := report["versions"]["triton"]) != triton.__version__:
        pytest.skip(f"all that is above holds; the report is of Triton {version}, not of this one")
    assert not worse_than(report["rows"], rows)


def worse_than(report: list[dict], rows: list[dict]) -> list[tuple]:
    """More registers or shared memory than in the committed report, other loads or matrix units.

    After a change that is meant to be so: python -m benchmarks.static_report --everything
    """
    before = by_kernel(
        row | {"shape": shape}
        for row in report
        if row["layout"] == "contiguous"
        for shape in row["shapes"]
    )
    worse = []
    for kernel, now in by_kernel(rows).items():
        for resource, spare in (("registers", SPARE_REGISTERS), ("shared_bytes", 0)):
            most_before, most_now = (max(row[resource] for row in r) for r in (before[kernel], now))
            if most_now > most_before + spare:
                worse.append((kernel, resource, most_before, most_now))
        if now[0]["global_loads"] is not None:
            for what in ("global_loads", "matrix_instructions"):
                kinds_before, kinds_now = (
                    {kind for row in r for kind in row[what]} for r in (before[kernel], now)
                )
                if kinds_before != kinds_now:
                    worse.append((kernel, what, kinds_before, kinds_now))
    return worse


def by_kernel(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Variants of a kernel, by name and what it was compiled for."""
    variants: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "capability", "mode", "shape"))
        variants.setdefault(key, []).append(row)
    return variants


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_with_a_mask_compile_without_spills(capability: int):
    modes = ("bfloat16", "ieee", "tf32")
    options = ("--mode", *modes, "--shape", *SHAPES, "--kernels", "masked")
    rows = compiled(capability, *options, "--disassemble", *HEAVY, "_statistics_kernel")
    assert {(row["kernel"], row["mode"], row["shape"]) for row in rows} >= set(
        itertools.product((*HEAVY, "_statistics_kernel"), modes, SHAPES)
    )
    for row in rows:
        assert not row["spill_bytes"], row
        assert row["shared_bytes"] <= SHARED_KILOBYTES[capability] * 1024, row
        if row["kernel"] in HEAVY:
            names = "".join(row["matrix_instructions"])
            assert (TENSOR_CORES[capability] in names) == (row["mode"] != "ieee"), row
        if row["kernel"] in (*HEAVY, "_statistics_kernel") and row["shape"] != "office49":
            assert row["global_loads"]["128"] > 0, row


@pytest.mark.parametrize("capability", [80, 90])
def test_products_of_tasks_compile_without_spills_and_with_wide_loads(capability: int):
    modes, shapes = ("bfloat16", "ieee"), ("nyuv2", "office49")
    rows = compiled(capability, "--mode", *modes, "--shape", *shapes, "--kernels", "affinity")
    kernels = {(row["kernel"], row["mode"], row["shape"]) for row in rows}
    assert kernels >= set(itertools.product(("_affinity_kernel",), modes, shapes))
    assert {("_affinity_finish_kernel", mode, "nyuv2") for mode in modes} <= kernels
    for row in rows:
        assert not row["spill_bytes"], row
    # Only a mask leaves Office's 49 positions as rows that start anywhere.
    wide = [row for row in rows if row["kernel"] == "_affinity_kernel"]
    assert len(wide) == 8 and sum("128" in row["global_loads"] for row in wide) == 6


@pytest.mark.parametrize("capability", [89, 120])
def test_kernels_fit_into_consumer_gpus(capability: int):
    """GeForce and workstation cards have less shared memory than those of data centres."""
    largest = ("--mode", "bfloat16", "tf32", "--shape", "nyuv2", "vit1024", "--kernels", "losses")
    rows = compiled(capability, *largest, "--disassemble", "none")
    assert {row["kernel"] for row in rows} >= set(HEAVY)
    assert max(row["shared_bytes"] for row in rows) <= 99 * 1024


@pytest.mark.parametrize("shape", ["nyuv2", "vit1024"])
def test_tiles_that_tma_copies_have_all_products_in_flight(tmp_path, shape: str):
    from repmtl_kernels.backends.triton import tiles
    from repmtl_kernels.backends.triton.tiles import Rule, Tile

    table = tmp_path / "tiles.json"
    tile = Tile(128, 256, 64, 8, 3, tma=True)
    table.write_text(tiles.as_json(Rule(k, ("16-bit",), tile) for k in ("gram", "gradient")))
    options = ("--mode", "bfloat16", "--shape", shape, "--kernels", "losses")
    for capability in (90, 100):
        rows = compiled(
            capability, *options, "--disassemble", *HEAVY, **{tiles.VARIABLE: str(table)}
        )
        heavy = [row for row in rows if row["kernel"] in HEAVY]
        assert {row["kernel"] for row in heavy} == set(HEAVY)
        for row in heavy:
            assert "tma" in row["global_loads"], row
            assert not row["serial"], row


def test_what_is_worse_is_seen():
    row = {"kernel": "k", "capability": 90, "mode": "ieee", "shape": "s", "layout": "contiguous"}
    row |= {"registers": 100, "shared_bytes": 1024}
    row |= {"global_loads": {"128": 2}, "matrix_instructions": {"HGMMA": 1}}
    report = [{**row, "shapes": ["r", "s"]}]
    assert not worse_than(report, [row, {**row, "registers": 104}])
    assert not worse_than(report, [{**row, "global_loads": None}])
    for change in (
        {"registers": 105},
        {"shared_bytes": 1025},
        {"global_loads": {"128": 1, "32": 8}},
        {"matrix_instructions": {}},
    ):
        assert len(worse_than(report, [{**row, **change}])) == 1
