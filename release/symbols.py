"""The symbols that a compiled library needs: the system's, and those of PyTorch's stable ABI."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# The headers of the stable ABI, in the folder `include` of a PyTorch.
STABLE = ("torch/csrc/stable/c", "torch/csrc/inductor/aoti_torch/c")


def stable_abi(include: Path) -> set[str]:
    """Return the names of the functions of PyTorch's stable ABI."""
    headers = [path for folder in STABLE for path in sorted((include / folder).glob("*.h"))]
    return {
        name
        for path in headers
        for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", path.read_text(encoding="utf-8"))
    }


def unversioned(library: Path) -> set[str]:
    """Return the symbols that a library needs without a version.

    The compiler's and the system's libraries give theirs a version, which auditwheel judges. A weak
    symbol may be missing.
    """
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    needed = (line.split() for line in lines)
    return {name for kind, name in needed if kind == "U" and "@" not in name}


def foreign(library: Path, include: Path) -> list[str]:
    """Return the symbols that neither the system nor PyTorch's stable ABI promises."""
    return sorted(unversioned(library) - stable_abi(include))
