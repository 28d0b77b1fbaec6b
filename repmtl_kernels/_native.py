"""The compiled libraries of ``csrc``: where they are, and why they can't be used."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from repmtl_kernels._sources import digest

LIBRARIES = {"cpu": "_native_cpu.so", "cuda": "_native_cuda.so"}
NEEDED = {"cpu": "PyTorch and a C++ compiler", "cuda": "PyTorch, a C++ compiler and nvcc"}


def library_of(x: Tensor) -> str:
    """The key of the library that takes a tensor."""
    return x.device.type


@functools.cache
def status(library: str) -> str:
    """``"ok"`` once the library is loaded, or why it can't be."""
    if library == "cuda" and torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    path = Path(__file__).with_name(LIBRARIES[library])
    if not path.exists():
        return f"{path.name} is not in {path.parent}: {_why_missing(path, library)}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    csrc = path.parents[1] / "csrc"
    # In a checkout the sources may have changed since.
    if csrc.is_dir() and _sources_of(library) != digest(csrc):
        return f"{path.name} is older than {csrc.name}: install the package again"
    return "ok"


def _why_missing(path: Path, library: str) -> str:
    try:
        reason = path.with_suffix(".txt").read_text(encoding="utf-8")  # written by setup.py
    except FileNotFoundError:
        return (
            "the package was built without it, or these are not the installed files but the "
            f"sources. Install it where {NEEDED[library]} are, without REPMTL_SKIP_NATIVE"
        )
    return f"the package was built without it, since {' | '.join(reason.splitlines())}"


def _sources_of(library: str) -> str:
    with _disable_current_modes():  # torch.export would record the call
        return operators(library).sources()


def operators(library: str) -> ModuleType:
    """Those of a loaded library."""
    return torch.ops.repmtl_cuda if library == "cuda" else torch.ops.repmtl_native


def load(library: str) -> ModuleType:
    """The operators."""
    if (reason := status(library)) != "ok":
        raise ImportError(reason)
    from repmtl_kernels import _native_fakes

    _native_fakes.register(library)
    return operators(library)
