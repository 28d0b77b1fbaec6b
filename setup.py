"""Build entry point: compiles csrc; all metadata is in pyproject.toml.

Needs a C++17 compiler, ninja and the headers of an installed PyTorch, which is not imported: the
libraries use its stable ABI, so that one build serves every Python and every later PyTorch. The one
for CUDA is built where nvcc is; no GPU is needed.

A library that can't be built is left out with a warning, and the rest installs. The reason is kept
in a text file in its place, for pip shows warnings only with ``-v``; the package tells it at run
time. ``REPMTL_REQUIRE_NATIVE=1`` (the library for the CPU) and ``REPMTL_REQUIRE_CUDA=1`` make it an
error. ``REPMTL_SKIP_CUDA=1`` leaves the library for CUDA out, ``REPMTL_SKIP_NATIVE=1`` both.
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
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 11)
CPU, CUDA = "repmtl_kernels._native_cpu", "repmtl_kernels._native_cuda"
TITLES = {CPU: "the native backend for the CPU", CUDA: "the native backend for CUDA"}
OPERATORS = {CPU: b"repmtl_native", CUDA: b"repmtl_cuda"}
SKIP, SKIP_CUDA = "REPMTL_SKIP_NATIVE", "REPMTL_SKIP_CUDA"
SKIPPED_BY = {CPU: (SKIP,), CUDA: (SKIP, SKIP_CUDA)}
REQUIRED_BY = {CPU: "REPMTL_REQUIRE_NATIVE", CUDA: "REPMTL_REQUIRE_CUDA"}
# The last of a compiler's messages: there nvcc and the linker have their error.
LINES_KEPT = 12
SOURCES_DIGEST = runpy.run_path(
    str(ROOT / "repmtl_kernels" / "backends" / "native" / "sources.py")
)["digest"]
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


def check_settings() -> None:
    for name, require in REQUIRED_BY.items():
        for skip in SKIPPED_BY[name]:
            if is_set(require) and is_set(skip):
                raise SystemExit(
                    f"{require}, {skip}: expected one of the two, got both set. The first makes it "
                    f"an error if {TITLES[name]} is not built, the second leaves it out"
                )


def why_not(name: str) -> str | None:
    """Why a library can't be built here or is not wanted, or None."""
    for skip in SKIPPED_BY[name]:
        if is_set(skip):
            return f"{skip} is set"
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
    return why_not_nvcc(torch) if name == CUDA else None


def why_not_nvcc(torch: Path) -> str | None:
    if nvcc() is None:
        return "there is no nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME"
    release = re.search(r"release (\d+)\.", asked_of_nvcc("--version"))
    if release is None:
        return f"{nvcc()} --version names no release"
    found = re.search(r"^cuda\b.*= '(\d+)\.", (torch / "version.py").read_text(), re.M)
    if found and int(release[1]) > int(found[1]):
        # Its runtime may need a newer driver than that of PyTorch.
        return f"nvcc is of CUDA {release[1]}, PyTorch of CUDA {found[1]}: install that nvcc"
    if not gencode():
        asked = bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))
        where = "TORCH_CUDA_ARCH_LIST" if asked else f"{nvcc()} --list-gpu-code"
        return f"{where} has no architecture of 8.0 or later, which the kernels need"
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


def asked_of_nvcc(option: str) -> str:
    try:
        return subprocess.run([nvcc(), option], capture_output=True, text=True).stdout
    except OSError:  # no program: it answers nothing
        return ""


def gencode() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX".

    What is older than bfloat16 in the matrix units is left out: container images ask for it.
    """
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        for name, numbers in GENERATIONS.items():
            asked = asked.replace(name, numbers)
        names = asked.replace(";", " ").split()
    else:
        listed = asked_of_nvcc("--list-gpu-code").split()
        names = [n for n in ARCHITECTURES if f"sm_{n.replace('.', '')}" in listed]
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
    """Builds with ninja: ``repmtl_kernels/_native_cpu.so`` and ``_native_cuda.so``.

    In the place of one that is left out there is a text file with the reason.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # No tag of a Python: it is loaded by PyTorch.
        return f"{Path(*fullname.split('.'))}.so"

    def run(self) -> None:
        # All of it, since the compiler that setuptools looks for is not used.
        check_settings()
        reasons = {e.name: self._build(e) for e in self.extensions}
        if self.inplace:
            for built, in_place in self._files():
                in_place.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy(built, in_place)
        required = [n for n, why in reasons.items() if why and is_set(REQUIRED_BY[n])]
        if required:
            raise SystemExit(
                "\n".join(f"{REQUIRED_BY[n]} is set, but {reasons[n]}" for n in required)
            )

    def _build(self, extension: Extension) -> str | None:
        """Writes the library, or the reason why it is left out, which is also returned."""
        library = Path(self.build_lib, self.get_ext_filename(extension.name)).resolve()
        folder = Path(self.build_temp, extension.name).resolve()
        for path in (library.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        note = library.with_suffix(".txt")
        reason = why_not(extension.name) or compile_library(extension, library, folder)
        if reason is None:
            note.unlink(missing_ok=True)
            return None
        # The library of an earlier build would still be used.
        library.unlink(missing_ok=True)
        note.write_text(f"{reason}\n", encoding="utf-8")
        message = f"built without {TITLES[extension.name]}: {reason}"
        print(f"repmtl_kernels: {message}", file=sys.stderr, flush=True)
        return message

    def _files(self) -> Iterator[tuple[Path, Path]]:
        """The files that a build may leave, in its folder and with ``--inplace`` in the tree."""
        for extension in self.extensions:
            library = Path(self.get_ext_filename(extension.name))
            for path in (library, library.with_suffix(".txt")):
                yield Path(self.build_lib, path), ROOT / path

    def get_outputs(self) -> list[str]:
        return [str(built) for built, _ in self._files() if built.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        pairs = self._files() if self.inplace else ()
        return {str(built): str(in_place) for built, in_place in pairs if built.exists()}


class Wheel(bdist_wheel):
    """One wheel for each platform, since the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").get_outputs()
        compiled = any(path.endswith(".so") for path in built)
        return "py3", "none", super().get_tag()[2] if compiled else "any"


def compile_library(extension: Extension, library: Path, folder: Path) -> str | None:
    """Why it failed, or None."""
    (folder / "build.ninja").write_text(ninja_file(extension.sources, library))
    try:
        status, lines = run_and_show([*ninja(), "-C", str(folder)])
    except OSError as error:
        return f"ninja does not run: {error}"
    if status != 0:
        return failure(lines)
    if not library.exists():
        return f"the compiler reported success, but wrote no {library.name}"
    content = library.read_bytes()
    # ELF or Mach-O. PyTorch alone could load it, and is not imported here.
    is_binary = content.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe"))
    if not is_binary or OPERATORS[extension.name] not in content:
        return f"the compiler reported success, but its {library.name} is not the library"
    return None


def run_and_show(command: list[str]) -> tuple[int, list[str]]:
    """The exit status and all lines of a command, which are also printed as they come."""
    sys.stdout.flush()
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}  # failure() knows it
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines = []
    with subprocess.Popen(command, env=environment, **pipe) as process:
        for line in process.stdout:
            os.write(1, line)  # bytes: a compiler's quotation marks may be none of the locale's
            lines.append(line.decode(errors="replace").rstrip())
    return process.returncode, lines


def failure(lines: list[str]) -> str:
    """The first command of ninja's that failed, and its last words."""
    failed = [i for i, line in enumerate(lines) if line.startswith("FAILED: ")]
    if not failed:
        return "\n".join(["ninja failed:", *lines[-LINES_KEPT:]])
    # Its target is the last word; the command follows, then what it said.
    target = Path(lines[failed[0]].split()[-1]).name
    ours = re.compile(r"\[\d+/\d+\] |FAILED: |ninja: ").match
    said = [*takewhile(lambda line: not ours(line), lines[failed[0] + 2 :])]
    said = said[-LINES_KEPT:] or ["the compiler said nothing"]
    return "\n".join([f"{target} could not be built:", *said])


def ninja_file(sources: list[str], target: Path) -> str:
    torch = torch_folder()
    digest = f'-DREPMTL_SOURCES="{SOURCES_DIGEST(CSRC)}"'
    flags = [*FLAGS, digest, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    objects = [f"{Path(source).stem}.o" for source in sources]
    # Removed first: where a compiler writes nothing, an earlier file would pass for its work.
    lines = [
        f"cxx = {_shell(*compiler())}",
        f"flags = {_shell(*flags, '-isystem', str(torch / 'include'))}",
        f"libraries = {_shell(*libraries)}",
        "rule compile",
        "  command = rm -f $out && $cxx -MMD -MF $out.d $flags -c $in -o $out",
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
            "  command = rm -f $out && $nvcc -MMD -MF $out.d $nvcc_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            # Stands in for the library that a CUDA build of PyTorch loads: there is none here
            # where a CPU build is installed.
            "rule stub",
            "  command = rm -f $out && $cxx -shared -Wl,-soname,$out -o $out -x c /dev/null",
            "build libtorch_cuda.so: stub",
            "rule link",
            "  command = rm -f $out && $nvcc $nvcc_flags -shared -cudart static $in "
            "-Xlinker --no-as-needed -L. -ltorch_cuda $libraries -o $out",
        ]
        needed = " | libtorch_cuda.so"
    else:
        lines += [
            "rule link",
            "  command = rm -f $out && $cxx -shared $flags $in -o $out $libraries",
        ]
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


setup(
    ext_modules=[
        Extension(CPU, sources("*.cpp")),
        Extension(CUDA, sources("cuda/*.cu", "cuda/*.cpp")),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
