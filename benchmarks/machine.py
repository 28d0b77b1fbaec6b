"""Which machine this is, and which versions run on it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "repmtl_kernels", "torch", "triton", "numpy", "torchjd", "ecos", "mlxtend", "scipy"
)  # fmt: skip
# Measured files are no part of what is measured.
NOT_CODE = (":!benchmarks/results", ":!README.md", ":!docs", ":!mkdocs.yml")


def describe(device: torch.device, measured: dict | None = None) -> dict:
    """Return the head of a result file: machine, versions, commit, date and ``measured`` rates."""
    commit, dirty = git_state()
    return {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "measured": measured,
    }


def machine(device: torch.device) -> dict:
    about = {
        "name": slug(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "busy_cores_before": busy_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def slug(device: torch.device) -> str:
    """Return the machine's name in paths and markers: ``h200``, ``cpu-2core``."""
    if device.type == "cuda":
        return slug_of_gpu(torch.cuda.get_device_name(device))
    return f"cpu-{os.cpu_count()}core"


def slug_of_gpu(name: str) -> str:
    """Turn ``NVIDIA H200`` to ``h200``, ``NVIDIA A100-SXM4-80GB`` to ``a100-sxm4-80gb``."""
    words = re.sub(r"^(NVIDIA|AMD|Tesla|GeForce|\s)+", "", name)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return name[1].strip() if name else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the installed versions; None where a package is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def git_state() -> tuple[str, bool | None]:
    """Return the commit, and whether the code differs from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", *NOT_CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def busy_cores(seconds: float = 1.0) -> float | None:
    """Return how many cores other processes keep busy; None where there is no /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def ticks() -> int:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        return user + nice + system + irq + softirq + steal

    before = ticks()
    time.sleep(seconds)
    return round((ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)
