"""The ninja file of a library: commands, flags and targets."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from native_build.libraries import CSRC, ROOT, files
from native_build.tools import OLDEST_TORCH, compiler, gencode, nvcc

FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
    # Nobody reads errno or the floating-point exceptions, which keep loops from becoming vectors.
    "-fno-math-errno", "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]  # fmt: skip
# PyTorch's libraries export functions of libstdc++ that their compiler put into them. The linker
# takes a function from the first library that has it, and only libstdc++ promises to keep it.
STANDARD_FIRST = ["-lstdc++"] if sys.platform == "linux" else []
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

# Each rule removes its target first. Otherwise an earlier file would pass for the work of a
# compiler that writes nothing.
COMPILE = """\
rule compile
  command = rm -f $out && $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
"""
LINK = """\
rule link
  command = rm -f $out && $cxx -shared $flags $in -o $out $libraries
"""
# The stub stands in for the library that a CUDA build of PyTorch loads. A CPU build lacks it.
COMPILE_AND_LINK_CUDA = """\
rule compile_cuda
  command = rm -f $out && $nvcc -MMD -MF $out.d $nvcc_flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule stub
  command = rm -f $out && $cxx -shared -Wl,-soname,$out -o $out -x c /dev/null
build libtorch_cuda.so: stub
rule link
  command = rm -f $out && $nvcc $nvcc_flags -shared -cudart static $in $
    -Xlinker --no-as-needed -L. -ltorch_cuda $libraries -o $out
"""


def ninja_file(sources: list[str], target: Path, torch: Path) -> str:
    """Return the text that compiles ``sources``, relative to the root, to ``target``."""
    is_cuda = any(source.endswith(".cu") for source in sources)
    digest = f'-DREPMTL_SOURCES="{files.digest(CSRC)}"'
    flags = [*FLAGS, digest, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    variables = {
        "cxx": compiler(),
        "flags": [*flags, "-isystem", str(torch / "include")],
        "libraries": [*STANDARD_FIRST, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"],
    }
    if is_cuda:
        host = ["-ccbin", compiler()[-1]] if os.environ.get("CXX") else []
        variables |= {"nvcc": [str(nvcc())], "nvcc_flags": [*NVCC_FLAGS, *gencode(), *host]}
    text = "".join(f"{name} = {_shell(words)}\n" for name, words in variables.items())
    text += COMPILE + (COMPILE_AND_LINK_CUDA if is_cuda else LINK)
    objects = [f"{Path(source).stem}.o" for source in sources]
    for source, object_ in zip(sources, objects, strict=True):
        rule = "compile_cuda" if source.endswith(".cu") else "compile"
        text += f"build {object_}: {rule} {_path(ROOT / source)}\n"
    stub = " | libtorch_cuda.so" if is_cuda else ""
    return text + f"build {_path(target)}: link {' '.join(objects)}{stub}\n"


def _shell(words: list[str]) -> str:
    """Return the words of a command as a ninja file writes them."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """Return a target or source as a ninja file writes it."""
    return re.sub(r"([ :$])", r"$\1", str(path))
