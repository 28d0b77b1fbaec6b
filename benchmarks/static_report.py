"""The compiler's report on the Triton kernels, without a GPU: registers, spills, loads, HGMMA.

``python -m benchmarks.static_report [--capability 90] [--mode bfloat16] [--shape nyuv2]`` compiles
the kernels through the same launch code that a GPU runs, with a stand-in for the CUDA driver.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks import report, results
from benchmarks.cases import triton_products_in
from benchmarks.machine import describe
from benchmarks.shapes import SHAPES, Shape
from repmtl_kernels._heads.second_order import triton as batch_norm
from repmtl_kernels.backends.contract import Expected
from repmtl_kernels.backends.triton.affinity import affinity
from repmtl_kernels.backends.triton.first_use import launch_all

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DATACENTER = (80, 90, 100)  # in the committed report
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@contextlib.contextmanager
def compiled_instead_of_launched(
    capability: int, only: str | None = None
) -> Iterator[dict[str, object]]:
    """Compile where a kernel is launched, ``only`` this one; yield the kernels by hash."""
    compiled: dict[str, object] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if only not in (None, self.__name__):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    try:
        with stand_in_driver(capability):
            yield compiled
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def stand_in_driver(capability: int) -> Iterator[None]:
    """Answer what a launch asks of the active driver; there is no device behind it."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels of this process cannot be compiled")
    driver = SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = None


def inspect(kernel, capability: int, *, instructions: bool = True) -> dict:
    """Return what the compiler made of one variant of a kernel.

    To count ``instructions`` takes as long as to compile: ``global_loads`` by their width in bits,
    ``matrix_instructions`` by name, and whether each HGMMA waits for the one before (``serial``).
    """
    numbers = resources(kernel.asm["cubin"])
    counted = _instructions(kernel.asm["cubin"]) if instructions else (None, None, None)
    return {
        "kernel": kernel.metadata.name,
        "capability": capability,
        "registers": numbers["REG"],
        "spill_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        **dict(zip(("global_loads", "matrix_instructions", "serial"), counted, strict=True)),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and bytes of memory: ``REG``, ``STACK``, ``LOCAL`` and ``SHARED``."""
    with _cubin_file(cubin) as file:
        usage = _cuobjdump("--dump-resource-usage", file)
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


@functools.cache  # shapes and modes have kernels in common
def _instructions(cubin: bytes) -> tuple[dict[str, int], dict[str, int], bool]:
    with _cubin_file(cubin) as file:
        sass = _cuobjdump("--dump-sass", file)
    loads = Counter(
        "tma" if load.startswith("UTMALDG") else _width(load)
        for load in re.findall(r"\b(?:LDG|LDGSTS|UTMALDG)\.[\w.]*", sass)
    )
    matrix = Counter(re.findall(r"\b(HGMMA|QGMMA|UTC\w*MMA|HMMA|IMMA|DMMA)\b", sass))
    # Products in flight together share one scoreboard, which the last of them names.
    groups = [" gsb" in product for product in re.findall(r"\bHGMMA\.[^;]*;", sass)]
    serial = len(groups) > 0 and all(groups)
    return dict(sorted(loads.items())), dict(sorted(matrix.items())), serial


def _width(load: str) -> str:
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", load)
    return bits[1] if bits else "32"


@contextlib.contextmanager
def _cubin_file(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def _cuobjdump(*args: str) -> str:
    return subprocess.run(
        [str(TOOLS / "cuobjdump"), *args], check=True, capture_output=True, text=True
    ).stdout


# Every path of the kernels: N side with 128 and 64 tiles, N = 1, C side, unaligned rows.
SPECIMENS = ("nyuv2", "cityscapes", "vit196", "vit1024", "office49", "office1")
LAYOUTS = ("contiguous", "channels_last")
MODES = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "ieee": (torch.float32, "ieee"),
    "tf32x3": (torch.float32, "tf32x3"),
    "tf32": (torch.float32, "tf32"),
}


def products_of(mode: str) -> AbstractContextManager[None]:
    """Set the precision of the Triton kernels' float32 products."""
    return triton_products_in(MODES[mode][1] or "")


def compile_stages(
    shape: Shape, mode: str, layout: str, capability: int, *, masked: bool = False
) -> list:
    """Compile what ``rep_mtl_loss`` launches, by the stages; ``masked``: with positions."""
    dtype, _ = MODES[mode]
    saliencies = [saliency(shape, dtype, layout) for _ in range(shape.tasks)]
    mask = torch.empty(shape.batch, shape.positions, dtype=torch.bool) if masked else None
    with products_of(mode), compiled_instead_of_launched(capability) as compiled:
        for entropy in itertools.product(("tasks", "space"), ("abs", "softmax")):
            expected = Expected(
                entropy, csa=True, with_grad=True, recompute=False, present=False, total=True
            )
            launch_all(saliencies, mask, expected, all_batches=False)
    return list(compiled.values())


def compile_affinity(shape: Shape, mode: str, layout: str, capability: int) -> list:
    """Compile the products of the tasks, without and with positions; float32 has one mode."""
    dtype, precision = MODES[mode]
    if precision not in (None, "ieee"):
        return []
    saliencies = [saliency(shape, dtype, layout) for _ in range(shape.tasks)]
    mask = torch.empty(shape.batch, shape.positions, dtype=torch.bool)
    with compiled_instead_of_launched(capability) as compiled:
        for positions in (None, mask):
            affinity(saliencies, mask=positions)
    return list(compiled.values())


def compile_batch_norm(shape: Shape, mode: str, layout: str, capability: int) -> list:
    """Compile batch norm's derivatives; without products, float32 has one mode."""
    dtype, precision = MODES[mode]
    if precision not in (None, "ieee"):
        return []
    x = saliency(shape, dtype, layout)
    c = torch.empty(shape.channels)
    operands = (x, x, c, c, c, x, True, (True, True, True))
    with compiled_instead_of_launched(capability) as compiled:
        batch_norm.batch_norm_backward(*operands)
        batch_norm.batch_norm_double_backward(x, None, None, *operands)
    return list(compiled.values())


def saliency(
    shape: Shape, dtype: torch.dtype, layout: str, make: Callable[..., torch.Tensor] = torch.empty
) -> torch.Tensor:
    """Return ``(B, C, N)``; memory that torch.empty made and nobody writes takes no place."""
    if layout == "channels_last":
        return make((shape.batch, shape.positions, shape.channels), dtype=dtype).mT
    return make((shape.batch, shape.channels, shape.positions), dtype=dtype)


KERNELS = {
    "losses": compile_stages,
    "batch_norm": compile_batch_norm,
    "affinity": compile_affinity,
    "masked": functools.partial(compile_stages, masked=True),
}
REPORTED = ("losses", "batch_norm", "affinity")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__)
    for name, default, choices in (
        ("capability", [90], CAPABILITIES),
        ("mode", list(MODES), list(MODES)),
        ("shape", list(SPECIMENS), SPECIMENS),
        ("layout", ["contiguous"], LAYOUTS),
        ("kernels", list(REPORTED), list(KERNELS)),
    ):
        parser.add_argument(
            f"--{name}", type=type(default[0]), nargs="+", default=default, choices=choices
        )
    parser.add_argument(
        "--disassemble", nargs="+", metavar="NAME",
        help="count the loads and matrix instructions of these kernels alone; default: of all",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all rows as JSON at the end")
    parser.add_argument(
        "--everything", action="store_true",
        help="all of that for 80, 90 and 100, whatever the other options say; written to "
        "benchmarks/results/compiler/static.json and into the tables made from it",
    )  # fmt: skip
    options = parser.parse_args()
    if options.everything:
        options.capability, options.layout, options.disassemble = DATACENTER, LAYOUTS, None
        options.mode, options.shape, options.kernels = MODES, SPECIMENS, REPORTED
    rows = []
    for capability, mode, name, layout, kernels in itertools.product(
        options.capability, options.mode, options.shape, options.layout, options.kernels
    ):
        for kernel in KERNELS[kernels](SHAPES[name], mode, layout, capability):
            wanted = options.disassemble is None or kernel.metadata.name in options.disassemble
            about = inspect(kernel, capability, instructions=wanted)
            rows.append({"shape": name, "layout": layout, "mode": mode, **about})
            if not options.json:
                print(rows[-1], flush=True)
    if options.json:
        json.dump(rows, sys.stdout)
    if options.everything:
        head = describe(torch.device("cpu")) | {"machine": {"name": "compiler"}}
        results.save(results.RESULTS / "compiler", "static", head, merged(rows))
        report.refresh_documents()


def merged(rows: list[dict]) -> list[dict]:
    """Join rows that differ in the shape alone, with ``shapes`` in place of ``shape``."""
    shapes: dict[str, list[str]] = {}
    for row in rows:
        same = json.dumps({name: value for name, value in row.items() if name != "shape"})
        shapes.setdefault(same, []).append(row["shape"])
    return [{"shapes": list(dict.fromkeys(s)), **json.loads(row)} for row, s in shapes.items()]


if __name__ == "__main__":
    main()
