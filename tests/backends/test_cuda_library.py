"""Looks at the compiled CUDA library, without a GPU: architectures, registers, wide loads."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from repmtl_kernels.backends.native import library as native_library

LIBRARY = native_library.PACKAGE / native_library.LIBRARIES["cuda"]
TRITON = pytest.importorskip("triton", reason="cuobjdump is in its wheel")
CUOBJDUMP = Path(TRITON.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = [
    pytest.mark.slow_cpu,
    pytest.mark.skipif(not LIBRARY.exists(), reason="built without the CUDA library"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="needs cuobjdump"),
]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
# Threads of a block; a multiprocessor has 64 Ki registers.


def cuobjdump(*arguments: str) -> str:
    command = [str(CUOBJDUMP), *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def usage() -> dict[str, dict[str, dict[str, int]]]:
    """Return REG, STACK, SHARED and LOCAL of each kernel, by architecture and kernel."""
    usage: dict[str, dict[str, dict[str, int]]] = {}
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            kernels = usage.setdefault(match[1], {})
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            pairs = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            kernels[name] = {key: int(value) for key, value in pairs}
    return usage


@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="others were asked for")
def test_it_is_for_three_architectures_and_later_ones():
    assert set(ARCHITECTURES) <= set(usage())
    assert "sm_100.ptx" in cuobjdump("--list-ptx")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture: str):
    kernels = usage()[architecture]
    stages = ("statistics", "affinity", "entropy", "contrast", "gram", "products", "gradient")
    for stage in stages:  # the file's name is part of every name in its anonymous namespace
        assert any(f"{stage}_cu_" in kernel for kernel in kernels), stage
    for kernel, use in kernels.items():
        assert use["STACK"] == use["LOCAL"] == 0, kernel
        # Two blocks fit a multiprocessor, or one in double precision.
        assert use["REG"] <= (255 if "EdL" in kernel or "IdL" in kernel else 128), kernel
        assert use["SHARED"] <= 48 * 1024, kernel


@cache
def instructions(architecture: str) -> dict[str, str]:
    """Return the machine code of each kernel."""
    if shutil.which("nvdisasm", path=str(CUOBJDUMP.parent)) is None:
        pytest.skip("needs nvdisasm")
    listing = cuobjdump("--dump-sass", "-arch", architecture)
    parts = re.split(r"Function : (\S+)", listing)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saliencies_are_read_and_written_16_bytes_at_a_time(architecture: str):
    # Template arguments: the type, and how many elements a load takes.
    readers = "statistics|affinity|over_rows|over_columns|scaled_copy|add_outer"
    wide = re.compile(rf"({readers})_kernelI.*Li(8|4|2)E")
    readers_code = {k: v for k, v in instructions(architecture).items() if wide.search(k)}
    assert len(readers_code) == 2 * 6 * 4  # four types, without a mask and with one
    for kernel, code in readers_code.items():
        assert re.search(r"\bLDG\.\S*128", code), kernel
        if "scaled_copy" in kernel or "add_outer" in kernel:
            stores = re.findall(r"\bSTG\.\S*", code)
            assert stores and all(".128" in store for store in stores), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_products_of_16_bits_use_the_matrix_units(architecture: str):
    small = {k: v for k, v in instructions(architecture).items() if "small_gra" in k}
    assert len(small) == 2 * 16  # two kernels, four types, two sizes; with a mask and without
    for kernel, code in small.items():
        is_16_bit = "6__half" in kernel or "13__nv_bfloat16" in kernel
        assert bool(re.search(r"\bHMMA\.", code)) == is_16_bit, kernel
