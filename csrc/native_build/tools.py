"""PyTorch, compilers and ninja on this machine, and why a library can't be built with them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from native_build.libraries import CUDA, Library, is_set

OLDEST_TORCH = (2, 11)
# The default builds those that this nvcc knows, and PTX of the last for later ones.
ARCHITECTURES = ("8.0", "9.0", "10.0")
# PyTorch's names in TORCH_CUDA_ARCH_LIST.
GENERATIONS = {
    "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0 8.6", "Ada": "8.9", "Hopper": "9.0",
    "Blackwell": "10.0 12.0",
}  # fmt: skip


def why_not(library: Library) -> str | None:
    """Return why a library can't be built here or is not wanted, or None."""
    for skip in library.skipped_by:
        if is_set(skip):
            return (
                f"{skip} is set (published wheels are built so; an install from source has the "
                "library)"
            )
    if os.name != "posix":
        return f"the native backend has no build for {sys.platform} yet"
    if (torch := torch_folder()) is None:
        return (
            "PyTorch is not installed in this environment: install it first, and with a tool that "
            "builds elsewhere use --no-build-isolation"
        )
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    if version is None or tuple(map(int, version.groups())) < OLDEST_TORCH:
        return f"{torch} is not PyTorch {'.'.join(map(str, OLDEST_TORCH))} or later"
    if shutil.which(compiler()[0]) is None:
        return f"there is no C++ compiler {compiler()[0]!r}: install one, or name it in CXX"
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        return "there is no ninja: pip install ninja"
    return _why_not_nvcc(torch) if library is CUDA else None


def _why_not_nvcc(torch: Path) -> str | None:
    if nvcc() is None:
        return "there is no nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME"
    release = re.search(r"release (\d+)\.", _answer_of_nvcc("--version"))
    if release is None:
        return f"{nvcc()} --version names no release"
    of_torch = re.search(r"^cuda\b.*= '(\d+)\.", (torch / "version.py").read_text(), re.M)
    if of_torch and int(release[1]) > int(of_torch[1]):
        # Its runtime may need a newer driver than that of PyTorch.
        return f"nvcc is of CUDA {release[1]}, PyTorch of CUDA {of_torch[1]}: install that nvcc"
    if not gencode():
        asked = bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))
        where = "TORCH_CUDA_ARCH_LIST" if asked else f"{nvcc()} --list-gpu-code"
        return f"{where} has no architecture of 8.0 or later, which the kernels need"
    return None


def torch_folder() -> Path | None:
    """Return the folder of the installed PyTorch.

    In the isolated environment of a build it is that of the environment around it.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    return next((path for path in candidates if (path / "version.py").exists()), None)


def compiler() -> list[str]:
    """Return the command of the C++ compiler: the last word, after its launchers."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def ninja() -> list[str]:
    """Return the command of ninja, the package's if it is installed."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    return ["ninja"]


@functools.cache
def nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home]
    for folder in (*folders, None, "/usr/local/cuda/bin"):  # None: PATH
        if (path := shutil.which("nvcc", path=folder)) is not None:
            return path
    return None


def _answer_of_nvcc(option: str) -> str:
    try:
        return subprocess.run([str(nvcc()), option], capture_output=True, text=True).stdout
    except OSError:  # no program: it answers nothing
        return ""


def gencode() -> list[str]:
    """Return nvcc's options for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX".

    Architectures whose matrix units don't know bfloat16 are left out, since container images ask
    for some.
    """
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        for name, numbers in GENERATIONS.items():
            asked = asked.replace(name, numbers)
        names = asked.replace(";", " ").split()
    else:
        listed = _answer_of_nvcc("--list-gpu-code").split()
        names = [n for n in ARCHITECTURES if f"sm_{n.replace('.', '')}" in listed]
        names[-1:] = [f"{name}+PTX" for name in names[-1:]]
    options = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                "TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0 or 9.0+PTX, separated by "
                f"semicolons or spaces; got {name!r}"
            )
        major, minor, ptx = match.groups()
        if int(major) < 8:
            continue
        code = f"{major}{minor}"
        options.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            options.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return options
