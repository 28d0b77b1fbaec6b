"""The files of the compiled libraries: their names, a digest of their sources, damage to them.

The build runs this module by its path. So it imports neither PyTorch nor this package.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from pathlib import Path
from typing import BinaryIO

LIBRARIES = {"cpu": "_native_cpu.so", "cuda": "_native_cuda.so"}
# The namespaces of their operators in ``torch.ops``.
NAMESPACES = {"cpu": "repmtl_native", "cuda": "repmtl_cuda"}

SOURCE_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")

MACH_O = b"\xcf\xfa\xed\xfe"
ELF = b"\x7fELF"
ELF_STRING_TABLE = 3  # a type of sections


def digest(csrc: Path) -> str:
    """Return a digest of the names and contents of all C++ and CUDA sources."""
    sha = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            name = path.relative_to(csrc).as_posix().encode()
            sha.update(name + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def note_of(library: Path) -> Path:
    """Return the text file in a library's place, where the build says why it left it out."""
    return library.with_suffix(".txt")


def damage(library: Path, like: Path | None) -> str | None:
    """Say what is wrong with a library's file, as far as its headers show it; None if nothing is.

    The loader maps the parts that the headers name and does not ask for the size of the file. So a
    file that a full disk or an interrupted copy cut off would end the process (SIGBUS).

    Args:
        library: The file to look at.
        like: A binary for the machine that the library must be for. None accepts any machine.
    """
    if not library.is_file():
        return "is not a file"
    try:
        with library.open("rb") as file:
            if sys.platform == "linux":
                return _elf_damage(file, like)
            return None if file.read(4) in (MACH_O, ELF) else "is not a library"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _elf_damage(file: BinaryIO, like: Path | None) -> str | None:
    size = os.fstat(file.fileno()).st_size
    header = file.read(64)
    if len(header) < 64 or header[:4] != ELF:
        return "is not a library"
    order = "<" if header[5] == 1 else ">"
    (machine,) = struct.unpack_from(order + "H", header, 18)
    if like is not None:
        with open(like, "rb") as other:
            other_header = other.read(20)
        if header[4:6] != other_header[4:6] or header[18:20] != other_header[18:20]:
            return f"is for another machine (number {machine} of ELF)"
    programs, sections = struct.unpack_from(order + "QQ", header, 32)
    program_size, program_count, section_size, section_count, names = struct.unpack_from(
        order + "5H", header, 54
    )
    end = max(programs + program_size * program_count, sections + section_size * section_count)
    if end > size:
        return f"is cut off at {size} bytes"
    file.seek(programs)
    table = file.read(program_size * program_count)
    for i in range(program_count):
        offset, _, _, length = struct.unpack_from(order + "4Q", table, i * program_size + 8)
        if offset + length > size:
            return f"is cut off at {size} bytes"
    if sections:  # the last part of a file, which holds zeros where a disk lost it
        file.seek(sections + names * section_size)
        _, kind = struct.unpack(order + "II", file.read(8))
        if kind != ELF_STRING_TABLE:
            return "is damaged: its table of sections is none"
    return None
