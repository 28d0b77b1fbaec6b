"""Build entry point: compiles csrc; all metadata is in pyproject.toml.

Needs a C++17 compiler, ninja and the headers of an installed PyTorch, which is not imported: the
libraries use its stable ABI, so that one build serves every Python and every later PyTorch.
``REPMTL_SKIP_NATIVE=1`` builds the package without them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = (
    "statistics", "entropy", "contrast", "gradient", "small_products", "operators",
)  # fmt: skip
OLDEST_TORCH = (2, 11)
SKIP = "REPMTL_SKIP_NATIVE"
FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]  # fmt: skip


def torch_folder() -> Path | None:
    """The installed PyTorch, also from the isolated environment of a build in its environment."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    return next((path for path in candidates if (path / "version.py").exists()), None)


def why_not() -> str | None:
    """Why the libraries are left out, or None."""
    if os.environ.get(SKIP, "0") not in ("", "0"):
        return f"{SKIP} is set"
    if os.name != "posix":
        return f"the native backend has no build for {sys.platform} yet"
    if (torch := torch_folder()) is None:
        return (
            "PyTorch is not installed in this environment: install it first, and with a tool that "
            "builds elsewhere use --no-build-isolation"
        )
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    if found is None or tuple(map(int, found.groups())) < OLDEST_TORCH:
        return f"{torch} is not PyTorch {'.'.join(map(str, OLDEST_TORCH))} or later"
    if shutil.which(compiler()[0]) is None:
        return f"there is no C++ compiler {compiler()[0]!r}: install one, or name it in CXX"
    return None


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


class BuildNative(build_ext):
    """Builds with ninja: ``repmtl_kernels/_native_cpu.so``."""

    def get_ext_filename(self, fullname: str) -> str:
        # No tag of a Python: it is loaded by PyTorch.
        return f"{Path(*fullname.split('.'))}.so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(extension.sources, target))
        try:
            subprocess.run([*ninja(), "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"csrc could not be compiled: {error}\nThe compiler's messages are above "
                f"(pip shows them with -v). To go on without the native backend: {SKIP}=1"
            ) from error


def ninja_file(sources: list[str], target: Path) -> str:
    torch = torch_folder()
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    objects = [f"{Path(source).stem}.o" for source in sources]
    lines = [
        f"cxx = {shlex.join(compiler())}",
        f"flags = {shlex.join(flags)} -isystem {shlex.quote(str(torch / 'include'))}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $flags $in -o $out {shlex.join(libraries)}",
        *(
            f"build {object_}: compile {_path(ROOT / source)}"
            for source, object_ in zip(sources, objects, strict=True)
        ),
        f"build {_path(target)}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _path(path: Path) -> str:
    """As ninja wants it."""
    return re.sub(r"([ :$])", r"$\1", str(path))


def ninja() -> list[str]:
    """The package's, else that of the system."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    return ["ninja"]


extensions = []
if reason := why_not():
    print(f"repmtl_kernels: built without the native backend: {reason}", file=sys.stderr)
else:
    sources = [f"csrc/{name}.cpp" for name in SOURCES]
    extensions.append(Extension("repmtl_kernels._native_cpu", sources, py_limited_api=True))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
