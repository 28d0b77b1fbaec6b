"""The compiled libraries of ``csrc``: where they are, and why they can't be used."""

from __future__ import annotations

import functools
import os
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import torch
from torch import Tensor

from repmtl_kernels._ground import torch_private
from repmtl_kernels.backends.native import fakes
from repmtl_kernels.backends.native.sources import digest

PACKAGE = Path(__file__).parents[2]
LIBRARIES = {"cpu": "_native_cpu.so", "cuda": "_native_cuda.so"}
STRING_TABLE = 3  # of ELF's types of sections
NEEDED = {"cpu": "PyTorch and a C++ compiler", "cuda": "PyTorch, a C++ compiler and nvcc"}


def library_of(x: Tensor) -> str:
    """The key of the library that takes a tensor."""
    return x.device.type


@functools.cache
def status(library: str) -> str:
    """``"ok"`` once the library is loaded, or why it can't be."""
    if library == "cuda" and torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    path = PACKAGE / LIBRARIES[library]
    if not path.exists():
        return f"{path.name} is not in {path.parent}: {_why_missing(path, library)}"
    if damage := _damage(path):
        return f"{path.name} cannot be loaded: it {damage}. Install the package again"
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
        reason = path.with_suffix(".txt").read_text(encoding="utf-8")  # written by setup.py
    except FileNotFoundError:
        return (
            "the package was built without it, or these are not the installed files but the "
            f"sources. Install it where {NEEDED[library]} are, without REPMTL_SKIP_NATIVE"
        )
    return f"the package was built without it, since {' | '.join(reason.splitlines())}"


def _damage(path: Path) -> str | None:
    """Says what is wrong with a library's file, as far as its headers tell; None: nothing.

    The loader maps what they promise without asking for the size of the file: one that is cut off,
    by a full disk or a copy that was interrupted, would end the process (SIGBUS).
    """
    if not path.is_file():
        return "is not a file"
    try:
        with path.open("rb") as file:
            return _elf_damage(file) if sys.platform == "linux" else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _elf_damage(file: BinaryIO) -> str | None:
    size = os.fstat(file.fileno()).st_size
    header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "is not a library"
    order = "<" if header[5] == 1 else ">"
    _, machine = struct.unpack_from(order + "HH", header, 16)
    with open(torch_private.binary_of_torch(), "rb") as known:  # loaded, so it is for this machine
        own = known.read(20)
    if header[4:6] != own[4:6] or header[18:20] != own[18:20]:
        return f"is for another machine (number {machine} of ELF)"
    programs, sections = struct.unpack_from(order + "QQ", header, 32)
    program_size, programs_count, section_size, sections_count, names = struct.unpack_from(
        order + "5H", header, 54
    )
    end = max(programs + program_size * programs_count, sections + section_size * sections_count)
    if end > size:
        return f"is cut off at {size} bytes"
    file.seek(programs)
    table = file.read(program_size * programs_count)
    for i in range(programs_count):
        offset, _, _, length = struct.unpack_from(order + "4Q", table, i * program_size + 8)
        if offset + length > size:
            return f"is cut off at {size} bytes"
    if sections:  # the last part of a file: zeros where a disk lost it
        file.seek(sections + names * section_size)
        _, kind = struct.unpack(order + "II", file.read(8))
        if kind != STRING_TABLE:
            return "is damaged: its table of sections is none"
    return None


def _sources_of(library: str) -> str:
    with torch_private.without_dispatch_modes():  # torch.export would record the call
        return operators(library).sources()


def operators(library: str) -> ModuleType:
    """Those of a loaded library."""
    return torch.ops.repmtl_cuda if library == "cuda" else torch.ops.repmtl_native


def load(library: str) -> ModuleType:
    """The operators."""
    if (reason := status(library)) != "ok":
        raise ImportError(reason)
    fakes.register(library)
    return operators(library)
