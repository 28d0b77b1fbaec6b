"""Build entry point: compiles csrc; all metadata is in pyproject.toml.

Needs a C++17 compiler, ninja and the headers of an installed PyTorch, which is not imported: the
libraries use its stable ABI, so that one build serves every Python and every later PyTorch. The one
for CUDA is built where nvcc is; no GPU is needed. ``REPMTL_SKIP_CUDA=1`` builds the package without
it, ``REPMTL_SKIP_NATIVE=1`` without both.
"""

from __future__ import annotations

import functools
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
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 11)
SKIP, SKIP_CUDA = "REPMTL_SKIP_NATIVE", "REPMTL_SKIP_CUDA"
SOURCES_DIGEST = runpy.run_path(str(ROOT / "repmtl_kernels" / "_sources.py"))["digest"]
FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]  # fmt: skip
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Those that this nvcc knows are built, and PTX of the last for later ones.
ARCHITECTURES = ("8.0", "9.0", "10.0")
# PyTorch's names in TORCH_CUDA_ARCH_LIST.
GENERATIONS = {
    "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0 8.6", "Ada": "8.9", "Hopper": "9.0",
    "Blackwell": "10.0 12.0",
}  # fmt: skip


def torch_folder() -> Path | None:
    """The installed PyTorch, also from the isolated environment of a build in its environment."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    return next((path for path in candidates if (path / "version.py").exists()), None)


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def why_not() -> str | None:
    """Why the libraries are left out, or None."""
    if is_set(SKIP):
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


def why_not_cuda() -> str | None:
    """Why the library for CUDA is left out where the other one is built, or None."""
    if is_set(SKIP_CUDA):
        return f"{SKIP_CUDA} is set"
    if nvcc() is None:
        return "there is no nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME"
    listed = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", listed)
    if release is None:
        return f"{nvcc()} --version names no release"
    found = re.search(r"^cuda\b.*= '(\d+)\.", (torch_folder() / "version.py").read_text(), re.M)
    if found and int(release[1]) > int(found[1]):
        # Its runtime may need a newer driver than that of PyTorch.
        return f"nvcc is of CUDA {release[1]}, PyTorch of CUDA {found[1]}: install that nvcc"
    if not gencode():
        return "TORCH_CUDA_ARCH_LIST has no architecture of 8.0 or later, which the kernels need"
    return None


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@functools.cache
def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    known = [str(Path(home, "bin")) for home in homes if home]
    for path in (*known, None, "/usr/local/cuda/bin"):  # None: PATH
        if (found := shutil.which("nvcc", path=path)) is not None:
            return found
    return None


def gencode() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX".

    What is older than bfloat16 in the matrix units is left out: container images ask for it.
    """
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        for name, numbers in GENERATIONS.items():
            asked = asked.replace(name, numbers)
        names = asked.replace(";", " ").split()
    else:
        listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout
        names = [n for n in ARCHITECTURES if f"sm_{n.replace('.', '')}" in listed.split()]
        names[-1:] = [f"{name}+PTX" for name in names[-1:]]
    options = []
    for name in names:
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if found is None:
            raise SystemExit(
                "TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0 or 9.0+PTX, separated by "
                f"semicolons or spaces; got {name!r}"
            )
        major, minor, ptx = found.groups()
        if int(major) < 8:
            continue
        code = f"{major}{minor}"
        options.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            options.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return options


class BuildNative(build_ext):
    """Builds with ninja: ``repmtl_kernels/_native_cpu.so`` and ``_native_cuda.so``."""

    def get_ext_filename(self, fullname: str) -> str:
        # No tag of a Python: it is loaded by PyTorch.
        return f"{Path(*fullname.split('.'))}.so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp, extension.name).resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(extension.sources, target))
        try:
            subprocess.run([*ninja(), "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            ways = f"{SKIP}=1"
            if extension.name == CUDA:
                ways = f"{SKIP_CUDA}=1 (without CUDA only) or {ways}"
            raise SystemExit(
                f"csrc could not be compiled: {error}\nThe compiler's messages are above "
                f"(pip shows them with -v). To go on without the native backend: {ways}"
            ) from error


class Wheel(bdist_wheel):
    """Of a library that knows nothing of Python: one wheel for each platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def ninja_file(sources: list[str], target: Path) -> str:
    torch = torch_folder()
    digest = f'-DREPMTL_SOURCES="{SOURCES_DIGEST(CSRC)}"'
    flags = [*FLAGS, digest, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    objects = [f"{Path(source).stem}.o" for source in sources]
    lines = [
        f"cxx = {_shell(*compiler())}",
        f"flags = {_shell(*flags, '-isystem', str(torch / 'include'))}",
        f"libraries = {_shell(*libraries)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    needed = ""
    if any(source.endswith(".cu") for source in sources):
        # The last word is the compiler, those before are its launchers.
        host = ["-ccbin", compiler()[-1]] if os.environ.get("CXX") else []
        lines += [
            f"nvcc = {_shell(nvcc())}",
            f"nvcc_flags = {_shell(*NVCC_FLAGS, *gencode(), *host)}",
            "rule compile_cuda",
            "  command = $nvcc -MMD -MF $out.d $nvcc_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            # Stands in for the library that a CUDA build of PyTorch loads: there is none here
            # where a CPU build is installed.
            "rule stub",
            "  command = $cxx -shared -Wl,-soname,$out -o $out -x c /dev/null",
            "build libtorch_cuda.so: stub",
            "rule link",
            "  command = $nvcc $nvcc_flags -shared -cudart static $in "
            "-Xlinker --no-as-needed -L. -ltorch_cuda $libraries -o $out",
        ]
        needed = " | libtorch_cuda.so"
    else:
        lines += ["rule link", "  command = $cxx -shared $flags $in -o $out $libraries"]
    for source, object_ in zip(sources, objects, strict=True):
        rule = "compile_cuda" if source.endswith(".cu") else "compile"
        lines.append(f"build {object_}: {rule} {_path(ROOT / source)}")
    lines.append(f"build {_path(target)}: link {' '.join(objects)}{needed}")
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


def sources(*patterns: str) -> list[str]:
    found = (path for pattern in patterns for path in sorted(CSRC.glob(pattern)))
    return [path.relative_to(ROOT).as_posix() for path in found]


CPU, CUDA = "repmtl_kernels._native_cpu", "repmtl_kernels._native_cuda"
extensions = [Extension(CPU, sources("*.cpp")), Extension(CUDA, sources("cuda/*.cu", "cuda/*.cpp"))]
left_out = {}
if reason := why_not():
    left_out = {CPU: f"the native backend: {reason}", CUDA: None}
elif reason := why_not_cuda():
    left_out = {CUDA: f"the native backend for CUDA: {reason}"}
for name, reason in left_out.items():
    if reason:
        print(f"repmtl_kernels: built without {reason}", file=sys.stderr)
    # That of an earlier build would still be used.
    library = Path(*name.split(".")).with_suffix(".so")
    for left in ROOT.glob(f"build/lib*/{library}"):
        left.unlink()
    if {"editable_wheel", "develop", "--inplace"} & set(sys.argv):
        (ROOT / library).unlink(missing_ok=True)
extensions = [extension for extension in extensions if extension.name not in left_out]

setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
