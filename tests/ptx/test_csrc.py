"""The kernels of ``csrc/cuda`` as nvcc compiles them, through the tests of the native backend.

The host code is that of the emulated library. These tests run in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_cuda import SOURCES, TESTS, run_tests

if not SOURCES.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from ptx import csrc

if reason := csrc.why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.whole, pytest.mark.timeout(1800)]

CUDA = str(TESTS / "backends" / "test_native_cuda.py")
STAGES = str(TESTS / "backends" / "test_stages.py")
DISTRIBUTIONS = str(TESTS / "losses" / "test_losses.py") + "::test_distributions"
BFLOAT16 = "13__nv_bfloat16"  # as it is in names

Run = Callable[..., int]


@pytest.fixture
def cache(request) -> Path:
    return Path(request.config.cache.mkdir("csrc"))


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Run:
    """Return a function that runs tests for an architecture, and returns how many passed."""

    def run(architecture: int, *arguments: str) -> int:
        return run_tests(
            csrc.cached_library(cache),
            *arguments,
            REPMTL_EMULATED_PTX=str(csrc.cached_kernels(cache, architecture)),
            REPMTL_EMULATED_PTX_RAN=str(tmp_path / "ran"),
        )

    return run


def test_every_way_through_every_kernel(run: Run, cache: Path, tmp_path: Path):
    assert run(90, CUDA, DISTRIBUTIONS) > 150
    kernels = csrc.Kernels(csrc.cached_kernels(cache, 90))
    assert set((tmp_path / "ran").read_text().split()) == set(kernels.texts)


@pytest.mark.parametrize("part", ["statistics or entropy or contrast", "gram"])
def test_stages(run: Run, part: str):
    assert run(90, STAGES, "-k", f"native and ({part})") > 100


def test_ampere(run: Run, cache: Path, tmp_path: Path):
    """The PTX for sm_80 is that for sm_90, but for conversions from bfloat16."""
    kernels = csrc.Kernels(csrc.cached_kernels(cache, 80)).texts
    hopper = csrc.Kernels(csrc.cached_kernels(cache, 90)).texts
    assert kernels.keys() == hopper.keys()
    names = {name for name in kernels if BFLOAT16 in name}
    for name in kernels.keys() - names:
        assert kernels[name].partition(".entry")[2] == hopper[name].partition(".entry")[2]
    assert run(80, CUDA, "-k", "every_way and dtype2") == 33
    assert names <= set((tmp_path / "ran").read_text().split())


def test_damage_is_noticed(run: Run):
    assert run(90, str(Path(__file__).with_name("csrc_damage.py")), "-k", "damage") == 28
