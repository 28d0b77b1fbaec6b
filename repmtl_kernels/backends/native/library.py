"""The compiled libraries of ``csrc``: where they are, and why they can't be used."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels._ground import torch_private
from repmtl_kernels.backends.native import fakes
from repmtl_kernels.backends.native.files import LIBRARIES, NAMESPACES, damage, digest, note_of

PACKAGE = Path(__file__).parents[2]
NEEDED = {"cpu": "PyTorch and a C++ compiler", "cuda": "PyTorch, a C++ compiler and nvcc"}


def library_of(x: Tensor) -> str:
    """Return the key of the library that takes a tensor."""
    return x.device.type


@functools.cache
def status(library: str) -> str:
    """Load the library and return ``"ok"``, or return why it can't be loaded."""
    if library == "cuda" and torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    path = PACKAGE / LIBRARIES[library]
    if not path.exists():
        return f"{path.name} is not in {path.parent}: {_why_missing(path, library)}"
    if fault := damage(path, Path(torch_private.binary_of_torch())):
        return f"{path.name} cannot be loaded: it {fault}. Install the package again"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    if not hasattr(operators(library), "sources"):
        return f"{path.name} has no operators of this package: install the package again"
    csrc = PACKAGE.parent / "csrc"
    # In a checkout the sources may have changed since.
    if csrc.is_dir() and _sources_of(library) != digest(csrc):
        return f"{path.name} is older than {csrc.name}: install the package again"
    return "ok"


def _why_missing(path: Path, library: str) -> str:
    try:
        reason = note_of(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return (
            "the package was built without it, or these are not the installed files but the "
            f"sources. Install it where {NEEDED[library]} are, without REPMTL_SKIP_NATIVE"
        )
    return f"the package was built without it, since {' | '.join(reason.splitlines())}"


def _sources_of(library: str) -> str:
    with torch_private.without_dispatch_modes():  # torch.export would record the call
        return operators(library).sources()


def operators(library: str) -> ModuleType:
    """Return the operators of a loaded library."""
    return getattr(torch.ops, NAMESPACES[library])


def load(library: str) -> ModuleType:
    """Return the operators, known to compilers; raise ImportError if the library can't be used."""
    if (reason := status(library)) != "ok":
        raise ImportError(reason)
    fakes.register(library)
    return operators(library)
