"""Build entry point: compiles csrc; all metadata is in pyproject.toml.

Needs a C++17 compiler, ninja and the headers of an installed PyTorch, which is not imported: the
library uses its stable ABI, so that one build serves every Python and every later PyTorch.
``REPMTL_SKIP_NATIVE=1`` builds the package without it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = (
    "statistics", "entropy", "contrast", "gradient", "small_products", "operators",
)  # fmt: skip
OLDEST_TORCH = (2, 11)
SKIP = "REPMTL_SKIP_NATIVE"
SOURCES_DIGEST = runpy.run_path(str(ROOT / "repmtl_kernels" / "_sources.py"))["digest"]
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
    """Why the library is left out, or None."""
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
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        return "there is no ninja: pip install ninja"
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


class Wheel(bdist_wheel):
    """Of a library that knows nothing of Python: one wheel for each platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def ninja_file(sources: list[str], target: Path) -> str:
    torch = torch_folder()
    digest = f'-DREPMTL_SOURCES="{SOURCES_DIGEST(ROOT / "csrc")}"'
    flags = [*FLAGS, digest, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    objects = [f"{Path(source).stem}.o" for source in sources]
    lines = [
        f"cxx = {_shell(*compiler())}",
        f"flags = {_shell(*flags, '-isystem', str(torch / 'include'))}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $flags $in -o $out {_shell(*libraries)}",
        *(
            f"build {object_}: compile {_path(ROOT / source)}"
            for source, object_ in zip(sources, objects, strict=True)
        ),
        f"build {_path(target)}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _shell(*words: str) -> str:
    """Words of a command in a ninja file."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """A target or source in a ninja file."""
    return re.sub(r"([ :$])", r"$\1", str(path))


def ninja() -> list[str]:
    """The package's, else that of the system."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    return ["ninja"]


extensions = []
if reason := why_not():
    print(f"repmtl_kernels: built without the native backend: {reason}", file=sys.stderr)
    if {"editable_wheel", "develop", "--inplace"} & set(sys.argv):
        # That of an earlier build would still be used.
        (ROOT / "repmtl_kernels" / "_native_cpu.so").unlink(missing_ok=True)
else:
    sources = [f"csrc/{name}.cpp" for name in SOURCES]
    extensions.append(Extension("repmtl_kernels._native_cpu", sources))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
