"""The compiled library of ``csrc``: where it is, and why it can't be used."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch

from repmtl_kernels._sources import digest

CPU_LIBRARY = "_native_cpu.so"


@functools.cache
def status() -> str:
    """``"ok"`` once the library is loaded, or why it can't be."""
    path = Path(__file__).with_name(CPU_LIBRARY)
    if not path.exists():
        return (
            f"{path.name} is not there: the package was built without it. Install it from source "
            "where PyTorch and a C++ compiler are, without REPMTL_SKIP_NATIVE"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    csrc = path.parents[1] / "csrc"
    # In a checkout the sources may have changed since.
    if csrc.is_dir() and torch.ops.repmtl_native.sources() != digest(csrc):
        return f"{path.name} is older than {csrc.name}: install the package again"
    return "ok"


def load() -> ModuleType:
    """The operators."""
    if (reason := status()) != "ok":
        raise ImportError(reason)
    from repmtl_kernels import _native_fakes  # noqa: F401

    return torch.ops.repmtl_native
