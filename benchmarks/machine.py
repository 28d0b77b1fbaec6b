"""Which machine this is, which versions run on it, and how fast it can go at best."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import repmtl_kernels
from benchmarks.timing import block_ms

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "torchjd", "ecos", "mlxtend", "scipy")
# Measured files are no part of what is measured.
NOT_CODE = (":!benchmarks/results", ":!README.md", ":!benchmarks/README.md", ":!docs")


def describe(device: torch.device, *, measure: bool = True) -> dict:
    """The head of a result file: machine, versions, commit, date and measured ceilings."""
    commit, dirty = git_state()
    return {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "measured": ceilings(device) if measure else None,
    }


def machine(device: torch.device) -> dict:
    about = {
        "name": slug(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy_cores_before": busy_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": gpu.name,
            "gpu_memory_gb": round(gpu.total_memory / 1e9, 1),
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
        }
    return about


def slug(device: torch.device) -> str:
    """The machine's name in paths and markers: ``h200``, ``cpu-2core``."""
    if device.type == "cuda":
        return slug_of_gpu(torch.cuda.get_device_name(device))
    return f"cpu-{os.cpu_count()}core"


def slug_of_gpu(name: str) -> str:
    """``NVIDIA H200`` to ``h200``, ``NVIDIA A100-SXM4-80GB`` to ``a100-sxm4-80gb``."""
    words = re.sub(r"^(NVIDIA|AMD|Tesla|GeForce|\s)+", "", name)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "repmtl_kernels": repmtl_kernels.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def git_state() -> tuple[str, bool | None]:
    """The commit and whether the code differs from it; ("unknown", None) outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain", "--", ".", *NOT_CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    return commit, dirty


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def ceilings(device: torch.device) -> dict:
    """Measured rates: ``copy_gbs`` (1e9 bytes read and written per second) and ``matmul_tflops``.

    matmul_tflops has a rate for each precision that is measured: ``float32`` everywhere; ``tf32``,
    ``bfloat16`` and ``float16`` on CUDA.
    """
    gpu = device.type == "cuda"
    copy_gbs = copy_rate(1 << (30 if gpu else 26), device)
    side = 8192 if gpu else 2048
    kinds = {"float32": (torch.float32, "highest")}
    if gpu:
        kinds |= {
            "tf32": (torch.float32, "high"),
            "bfloat16": (torch.bfloat16, "highest"),
            "float16": (torch.float16, "highest"),
        }
    rates = {}
    before = torch.get_float32_matmul_precision()
    try:
        for kind, (dtype, precision) in kinds.items():
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            ms = _best_ms(partial(torch.mm, a, b, out=out), device)
            rates[kind] = round(2 * side**3 / ms / 1e9, 4)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"copy_gbs": round(copy_gbs, 1), "matmul_tflops": rates}


def copy_rate(elements: int, device: torch.device) -> float:
    """GB/s, read and written, of a copy of so many float32."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_ms(partial(target.copy_, source), device) / 1e6


def _best_ms(call: Callable[[], object], device: torch.device) -> float:
    """A ceiling is the best that was seen."""
    call()
    return min(block_ms(call, 3, device) for _ in range(8))


def busy_cores(seconds: float = 1.0) -> float | None:
    """How many cores other processes keep busy right now; None where /proc/stat does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def ticks() -> int:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        return user + nice + system + irq + softirq + steal

    before = ticks()
    time.sleep(seconds)
    return round((ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)
