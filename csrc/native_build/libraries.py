"""The two libraries: their sources, and the variables that ask for them or leave them out."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


def _files_of_package() -> ModuleType:
    """Load ``repmtl_kernels.backends.native.files`` by its path: the package imports PyTorch."""
    path = ROOT / "repmtl_kernels" / "backends" / "native" / "files.py"
    spec = importlib.util.spec_from_file_location("repmtl_native_files", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files = _files_of_package()


@dataclass(frozen=True)
class Library:
    """One compiled library."""

    key: str
    title: str
    patterns: tuple[str, ...]
    required_by: str
    skipped_by: tuple[str, ...]

    @property
    def extension_name(self) -> str:
        """Return the name as that of a module in the package."""
        return f"repmtl_kernels.{Path(files.LIBRARIES[self.key]).stem}"

    @property
    def namespace(self) -> str:
        """Return the namespace of the operators, which is a string in the compiled file."""
        return files.NAMESPACES[self.key]

    def sources(self) -> list[str]:
        """Return the sources, relative to the root as setuptools wants them."""
        paths = (path for pattern in self.patterns for path in sorted(CSRC.glob(pattern)))
        return [path.relative_to(ROOT).as_posix() for path in paths]


SKIP, SKIP_CUDA = "REPMTL_SKIP_NATIVE", "REPMTL_SKIP_CUDA"
CPU = Library(
    key="cpu",
    title="the native backend for the CPU",
    patterns=("cpu/*.cpp",),
    required_by="REPMTL_REQUIRE_NATIVE",
    skipped_by=(SKIP,),
)
CUDA = Library(
    key="cuda",
    title="the native backend for CUDA",
    patterns=("cuda/*.cu", "cuda/*.cpp"),
    required_by="REPMTL_REQUIRE_CUDA",
    skipped_by=(SKIP, SKIP_CUDA),
)
BY_EXTENSION = {library.extension_name: library for library in (CPU, CUDA)}


def is_set(variable: str) -> bool:
    """Return whether a variable of the environment asks for something."""
    return os.environ.get(variable, "0") not in ("", "0")


def check_settings() -> None:
    """Exit if a library is both required and left out."""
    for library in BY_EXTENSION.values():
        for skip in library.skipped_by:
            if is_set(library.required_by) and is_set(skip):
                raise SystemExit(
                    f"{library.required_by}, {skip}: expected one of the two, got both set. The "
                    f"first makes it an error if {library.title} is not built, the second leaves "
                    "it out"
                )
