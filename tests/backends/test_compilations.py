"""Triton compiles nothing for another batch, and little for other sizes: counted, not compiled."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

# Makes every integer argument one that Triton compiles variants for, as it does by default.
SPECIALIZED = """
from triton.runtime import jit
from benchmarks import compilations
for kernel in jit._triton_jit_function_registry.values():
    for param in kernel.params:
        param.do_not_specialize = False
compilations.main()
"""


def run(*command: str, **variables: str):
    """Return the JSON that Python prints, in another process: this one may interpret kernels."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REPMTL_TILES")
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def counts(*command: str) -> dict[str, list[dict]]:
    """Return the rows of benchmarks.compilations by series."""
    series: dict[str, list[dict]] = {}
    for row in run(*command, "--json"):
        series.setdefault(row["series"], []).append(row)
    return series


@pytest.fixture(scope="module")
def series():
    return counts("-m", "benchmarks.compilations")


def test_another_batch_or_number_of_samples_compiles_nothing(series):
    changed = {name: rows for name, rows in series.items() if name.startswith(("batch", "ranks"))}
    assert len(changed) >= 12
    for first, *others in changed.values():
        assert sum(first["new"].values()) >= 6, first
        assert [row for row in others if row["new"]] == []


def test_another_batch_compiles_nothing_for_the_affinity(series):
    changed = {name: rows for name, rows in series.items() if name.startswith("affinity")}
    assert len(changed) == 3
    for first, *others in changed.values():
        assert "_affinity_kernel" in first["new"]
        assert [row for row in others if row["new"]] == []


def test_another_image_of_the_same_class_compiles_nothing(series):
    for name in ("images, C side", "images, N side", "images, batch norm"):
        first, *others = series[name]
        assert len(others) == 3
        assert first["new"]
        assert [row for row in others if row["new"]] == []


def test_other_classes_of_images_and_numbers_of_tasks_are_variants(series):
    for name in ("images of other classes", "tasks"):
        assert all(row["new"] for row in series[name])
    of_images = {kernel for row in series["images of other classes"][1:] for kernel in row["new"]}
    assert of_images.isdisjoint({"_entropy_over_tasks_kernel", "_contrast_products_kernel"})


def test_the_first_call_compiles_all_of_its_kernels_ahead(series):
    losses = [row for rows in series.values() for row in rows if "_gram_kernel" in row["new"]]
    assert len(losses) >= 14
    assert [row for row in losses if row["late"]] == []


def test_integers_that_triton_may_specialize_are_seen():
    name = "batch, bfloat16"
    _, *others = counts("-c", SPECIALIZED, "--series", name)[name]
    assert sum(others[0]["new"].values()) >= 8, others


# Compiles one small kernel by the first use of it, and prints what was logged and compiled.
FIRST_USE = """
import json, logging, threading
import torch, triton
from benchmarks.static_report import stand_in_driver
from repmtl_kernels.backends.triton import first_use
from repmtl_kernels.backends.triton.entropy import entropy

lines, compiled = [], []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("repmtl_kernels").addHandler(handler)
logging.getLogger("repmtl_kernels").setLevel(logging.INFO)
first_use.PATIENCE = 0.0
triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
options = dict(over="tasks", normalizer="abs", temperature=1.0, eps=0.0, with_grad=False)
with stand_in_driver(90):
    for batch in (2, 3):
        first_use.compile_together(lambda: entropy(torch.empty(2, batch, 4), **options))
print(json.dumps({"lines": lines, "compiled": compiled, "after": first_use.compiling.get()}))
"""


def test_first_use_compiles_once_and_says_so_once(tmp_path):
    seen = run("-c", FIRST_USE, TRITON_CACHE_DIR=str(tmp_path))
    assert len(seen["compiled"]) == 1 and "_entropy_over_tasks_kernel" in seen["compiled"][0]
    assert len(seen["lines"]) == 1 and seen["lines"][0].startswith("compiling 1 Triton kernel")
    assert not seen["after"]
