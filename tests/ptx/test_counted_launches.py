"""The counters of small launches are no worse than the committed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptx import tier  # noqa: F401  (skips where nothing of this can run)
from ptx.process import Process

QUICK = (("small", "tf32", 90), ("small_odd", "bfloat16", 80))
MORE = (("small", "bfloat16", 90), ("small", "bfloat16", 80), ("small_odd", "bfloat16", 90))

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/compiler/predicted.json"
# As the compiler's choices may be a little different on another machine.
SPARE = {"instructions": 0.02}


def counts(row: dict) -> dict[str, float]:
    """Return what should not grow, of the CTAs that ran."""
    return {
        "sectors": row["sectors"],
        "requests": row["requests"],
        "wavefronts": row["wavefronts"],
        "operand_bytes": row["operand_bytes"],
        "shared_bytes": row["shared_bytes"],
        "instructions": sum(row["issued"].values()),
        **of_algorithm(row),
    }


def of_algorithm(row: dict) -> dict[str, float]:
    """Return what no version of the compiler decides about."""
    return {"flop": sum(row["flop"].values()), "dram_bytes": row["dram_bytes"]}


def worse_than(before: list[dict], now: list[dict], *, same_compiler: bool) -> list[str]:
    """Return what grew: launches, and counts of each kernel summed over its launches.

    After a change that is meant to be so: python -m benchmarks --only predicted
    """
    worse = []
    for what in (False, True):
        old, new = (sum(row["of_pytorch"] is what for row in rows) for rows in (before, now))
        if new > old:
            worse.append(f"{new} launches of {'PyTorch' if what else 'Triton'}, before {old}")
    of = counts if same_compiler else of_algorithm
    totals = [_totals(rows, of) for rows in (before, now)]
    for kernel, counted in totals[1].items():
        if kernel not in totals[0]:
            worse.append(f"{kernel}: not in the committed report")
        for name, number in counted.items():
            old = totals[0].get(kernel, {}).get(name)
            if old is not None and number > old * (1 + SPARE.get(name, 0)):
                worse.append(f"{kernel}: {number:g} {name}, before {old:g}")
    return worse


def _totals(rows: list[dict], of) -> dict[str, dict[str, float]]:
    """Return each kernel's counts of whole launches."""
    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["of_pytorch"]:
            continue
        x, y, z = row["grid"]
        kernel = totals.setdefault(row["kernel"], {})
        for name, number in of(row).items():
            if name != "shared_bytes":
                number *= x * y * z / row["sampled"]
            kernel[name] = kernel.get(name, 0) + number
    return totals


def check(shape: str, mode: str, capability: int) -> None:
    """Count the launches of a case once more, and raise AssertionError if a count grew."""
    import triton

    from benchmarks.parts import predicted

    committed = json.loads(COMMITTED.read_text())
    case = predicted.Case(predicted.SMALL[shape], mode, capability)
    labels = {"shape": shape, "mode": mode, "capability": capability}
    before = [row for row in committed["rows"] if labels.items() <= row.items()]
    assert before
    now = predicted.rows_of(case, predict=False)
    same_compiler = committed["versions"]["triton"] == triton.__version__
    worse = worse_than(before, now, same_compiler=same_compiler)
    assert not worse, "\n".join(worse)
    flop = [row["flop"] for row in now if row["kernel"] == "_gram_kernel"]
    unit = f"{'wgmma' if capability == 90 else 'mma'} {'tf32' if mode == 'tf32' else '16-bit'}"
    assert flop and all(unit in one for one in flop)  # else nothing was counted


@pytest.fixture(scope="module")
def compiling():
    """Yield the process where Triton compiles; its launches here are no tests of values."""
    process = Process()
    yield process
    process.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("shape", "mode", "capability"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.whole) for case in MORE)],
)
def test_no_counter_is_worse_than_the_committed_one(compiling, shape, mode, capability):
    case = {"shape": shape, "mode": mode, "capability": capability}
    answer = compiling.call(check, case)
    assert answer.error is None, answer.error


def test_what_is_worse_is_seen():
    kernel = {"kernel": "k", "of_pytorch": False, "grid": [4, 1, 1], "sampled": 2}
    kernel |= {"sectors": 100, "requests": 10, "wavefronts": 50, "operand_bytes": 0}
    kernel |= {"shared_bytes": 1024, "issued": {"int": 100}, "flop": {"mma tf32": 1000}}
    kernel["dram_bytes"] = 3200
    before = [kernel, {"kernel": "mul", "of_pytorch": True}]
    assert not worse_than(before, before, same_compiler=True)
    assert not worse_than(before, [{**kernel, "issued": {"int": 101}}], same_compiler=True)
    for change in (
        {"sectors": 101},
        {"requests": 11},
        {"wavefronts": 51},
        {"operand_bytes": 1},
        {"shared_bytes": 1025},
        {"issued": {"int": 100, "fp32": 3}},
        {"flop": {"mma tf32": 1001}},
        {"dram_bytes": 3232},
        {"grid": [5, 1, 1]},
    ):
        assert worse_than(before, [{**kernel, **change}], same_compiler=True), change
    assert len(worse_than(before, [*before, before[0]], same_compiler=False)) == 3
    assert worse_than(before, [*before, before[1]], same_compiler=False)
    assert worse_than(before, [{**kernel, "kernel": "another"}], same_compiler=True)
    assert not worse_than(before, [{**kernel, "wavefronts": 51}], same_compiler=False)
