"""The compiled libraries of ``csrc``: where they are, and why one can't be loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch

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
        return f"{path.name} cannot be loaded: {error}"
    return "ok"


def load() -> ModuleType:
    """The operators."""
    if (reason := status()) != "ok":
        raise ImportError(reason)
    return torch.ops.repmtl_native
