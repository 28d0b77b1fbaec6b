"""Builds the files of a release, and checks them as they lie in ``dist``.

The wheels are built from the source archive. One has the library for the CPU and the tag that its
symbols allow. The other has no compiled code and fits any platform: pip takes it only where the
first does not fit.

libstdc++ is not linked into the library, although that would allow an older tag: exceptions of the
library end in PyTorch, so both need the same one. An old image keeps the tag old
(.github/workflows/dist.yml).
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from release import symbols
from release.commands import run
from release.versions import ROOT, declared

# An installed PyTorch has loaded them before it loads the package's library.
OF_TORCH = ("libtorch_cpu.so", "libc10.so")
LIBRARY = "repmtl_kernels/_native_cpu.so"
OLDEST_PYTHON = "3.10"


class Files(NamedTuple):
    """The files of one release."""

    sdist: Path
    pure: Path
    compiled: Path


def build(folder: Path, platform: str) -> Files:
    """Build into a folder; ``platform`` is the tag that the library has to fit, or "auto"."""
    python = sys.executable
    command = ("-m", "build", "--no-isolation", "--sdist", "--outdir", folder)
    run(python, *command, folder=ROOT)
    sdist = _only(folder, "*.tar.gz")
    wheel = (python, "-m", "pip", "wheel", "--no-cache-dir", "--no-deps", "--no-build-isolation")
    run(*wheel, "--wheel-dir", folder, sdist, folder=folder, REPMTL_SKIP_NATIVE="1")
    pure = _only(folder, "*.whl")
    with tempfile.TemporaryDirectory() as plain:
        settings = {"REPMTL_REQUIRE_NATIVE": "1", "REPMTL_SKIP_CUDA": "1"}
        run(*wheel, "--wheel-dir", plain, sdist, folder=folder, **settings)
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        repair = ("auditwheel", "repair", "--plat", platform, *excluded, "--wheel-dir", folder)
        run(*repair, _only(Path(plain), "*.whl"), folder=folder)
    return Files(sdist, pure, _only(folder, "*-manylinux*.whl"))


def check(files: Files) -> list[str]:
    """Return what was checked, a line each; exit if a check fails."""
    names = [f"repmtl_kernels-{declared()}{end}" for end in (".tar.gz", "-py3-none-any.whl")]
    if [files.sdist.name, files.pure.name] != names:
        raise SystemExit(f"expected {names}, got {files.sdist.name}, {files.pure.name}")
    run("twine", "check", "--strict", *files, folder=files.sdist.parent)
    for wheel, expected in ((files.pure, []), (files.compiled, [LIBRARY])):
        libraries = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
        if libraries != expected:
            raise SystemExit(f"{wheel.name}: expected the libraries {expected}, got {libraries}")
    return ["twine check --strict: passed", _check_tag(files.compiled), _check_abi(files.compiled)]


def _check_tag(wheel: Path) -> str:
    shown = json.loads(run("auditwheel", "show", "--json", wheel, folder=wheel.parent))
    tag, others = shown["sym_tag"], shown["external_libs"].keys()
    if tag not in wheel.name or not others <= {*OF_TORCH} or shown["unsupported_isa"]:
        raise SystemExit(
            f"{wheel.name}: expected its tag to be that of its symbols, only {OF_TORCH} beside the "
            f"system's libraries and no special processor, got {shown}"
        )
    return f"auditwheel: its symbols fit {tag}; not of the system: {', '.join(sorted(others))}"


def _check_abi(wheel: Path) -> str:
    oldest = ("--strict", "--assume-minimum-abi3", OLDEST_PYTHON)
    run("abi3audit", *oldest, wheel, folder=wheel.parent)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(zipfile.ZipFile(wheel).extract(LIBRARY, folder))
        spec = find_spec("torch")  # an import takes seconds
        assert spec is not None and spec.origin is not None
        if foreign := symbols.foreign(library, Path(spec.origin).parent / "include"):
            raise SystemExit(f"{wheel.name}: expected PyTorch's stable ABI alone, got {foreign}")
        count = len(symbols.unversioned(library))
    return f"abi3audit, nm: {count} symbols of PyTorch {version('torch')}, all of its stable ABI"


def _only(folder: Path, pattern: str) -> Path:
    """Return the one file of a folder that fits a pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one file {pattern}, got {[path.name for path in found]}")
    return found[0]
