"""Builds of the package: wheels with and without the libraries, failing compilers, the sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from release import symbols
from repmtl_kernels.backends.native import files
from repmtl_kernels.backends.native import library as native_library

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
setuptools = pytest.importorskip("setuptools", minversion="77", reason="reads PEP 639 metadata")
pytestmark = pytest.mark.slow  # each test builds the package

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_native = pytest.mark.skipif(
    native_library.status("cpu") != "ok", reason=native_library.status("cpu")
)
USE = (
    "import torch, repmtl_kernels as r; print(r.backend_report()['native']); "
    "print(r.rep_mtl_loss([torch.randn(4, 6, 5) for _ in range(2)], backend='auto').total.item())"
)


# A compiler for each way to fail; $out is the file that it should write.
FAKES = {
    "fails": ('echo "unsupported GNU version" >&2; exit 1', "o could not be built: .*GNU version"),
    "crashes": ("kill -SEGV $$", r"o could not be built: \| (the compiler said nothing|.*fault)"),
    "writes nothing": ("exit 0", "reported success, but wrote no _native_{}.so"),
    "writes garbage": ("echo garbage > $out", "reported success, but its _native_{}.so is not the"),
    "cannot link": (
        'case "$*" in *" -c "*) echo > $out;; *) echo "ld: disk full" >&2; exit 1;; esac',
        r"_native_{}.so could not be built: \| ld: disk full",
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a clean copy of the files that a build reads."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "_native_*.so", "_native_*.txt")
    for name in ("repmtl_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def build(tree: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with the PyTorch, setuptools and ninja of this environment, without the network.

    Leaves out CUDA, which takes a minute, unless ``environment`` says otherwise.
    """
    mine = {k: v for k, v in os.environ.items() if not k.startswith("REPMTL_REQUIRE_")}
    return subprocess.run(
        [sys.executable, "setup.py", *command.split()],
        cwd=tree,
        env={**mine, "REPMTL_SKIP_CUDA": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def fake(folder: Path, script: str, *, cxx: bool = True) -> dict[str, str]:
    """Return settings under which the script is nvcc, and c++ too with ``cxx``.

    Questions about the version and the architectures are answered before the script runs.
    """
    version = torch.version.cuda or "13.0"
    first = (
        f'case "$*" in *--version*) echo "release {version}"; exit;; '
        "*--list-gpu-code*) echo sm_90; exit;; esac\n"
        'for word; do test "$last" = -o && out=$word; last=$word; done\n'
    )
    path = folder / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{first}{script}\n")
    path.chmod(0o755)
    settings = {"CUDA_HOME": str(folder / "cuda"), "REPMTL_SKIP_CUDA": "0"}
    return settings | ({"CXX": str(path)} if cxx else {})


def earlier_libraries(tree: Path) -> list[Path]:
    """Write stand-ins for the libraries of an earlier build, where an editable install has them."""
    with_libraries = setuptools.Distribution({"ext_modules": [setuptools.Extension("any", [])]})
    command = with_libraries.get_command_obj("build")
    command.ensure_finalized()
    built = tree / command.build_lib / "repmtl_kernels"
    built.mkdir(parents=True)
    folders = (built, tree / "repmtl_kernels")
    paths = [folder / name for folder in folders for name in files.LIBRARIES.values()]
    for path in paths:
        path.write_text("of an earlier build")
    return paths


def status(tree: Path, library: str, monkeypatch) -> str:
    """Return the reason that the package in the tree gives at run time."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native_library, "PACKAGE", tree / "repmtl_kernels")
    return native_library.status.__wrapped__(library)


def _only_names(tree: Path) -> None:
    """Leave the name that the build looks for, and of the other library what nvcc compiles."""
    folder = tree / "csrc" / "cpu"
    for source in folder.glob("*.cpp"):
        source.unlink()
    name = '__attribute__((visibility("default"))) extern const char name[] = "repmtl_native";'
    (folder / "operators.cpp").write_text(name)
    for source in (tree / "csrc" / "cuda").glob("*.cpp"):
        source.write_text("")


def use(wheel: Path, folder: Path) -> list[str]:
    """Return what :data:`USE` prints with only the wheel's files, away from the source tree."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # A folder of its own: neither the source tree nor its editable install may be imported.
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {USE}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def _only_contrast(tree: Path) -> Path:
    """Leave one file of the CUDA kernels; all of them take a minute."""
    kept = tree / "csrc" / "cuda" / "contrast.cu"
    for source in kept.parent.glob("*.cu"):
        if source != kept:
            source.write_text("")
    return kept


@needs_native
@pytest.mark.slow_cpu
def test_wheel_with_the_compiled_libraries(tree: Path, tmp_path: Path):
    """With both where there is nvcc, else with the one for the CPU."""
    cuda = NVCC is not None
    options = {"CXXFLAGS": "-O0"}  # takes half the time
    if cuda:  # little of it; a release's library is looked at in test_cuda_library.py
        _only_contrast(tree)
        options |= {"REPMTL_SKIP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    done = build(tree, "bdist_wheel", **options)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name, "one wheel for every Python"
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "repmtl_kernels/_native_cpu.so" in names
    assert ("repmtl_kernels/_native_cuda.so" in names) == cuda
    assert ("built without the native backend for CUDA" in done.stderr) == (not cuda)
    assert not [n for n in names if n.startswith("csrc")]
    library = zipfile.ZipFile(wheel).extract("repmtl_kernels/_native_cpu.so", tmp_path)
    if sys.platform == "linux" and shutil.which("nm"):
        include = Path(torch.__file__).parent / "include"
        assert not symbols.foreign(Path(library), include), "more than PyTorch's stable ABI"
    status, total = use(wheel, tmp_path / "installed")
    assert status == "ok" and float(total) > 0


@needs_native
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_architectures_are_those_asked_for(tree: Path):
    _only_contrast(tree).write_text("#error broken")
    ask = {"REPMTL_SKIP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "8.6;9.0a+PTX"}
    _only_names(tree)
    done = build(tree, "build_ext", **ask)
    assert done.returncode == 0
    assert "without the native backend for CUDA: contrast.o could not be built:\n" in done.stderr
    assert "#error" in done.stderr
    for code in ("86,code=sm_86", "90a,code=sm_90a", "90a,code=compute_90a"):
        assert f"arch=compute_{code}" in done.stdout
    done = build(tree, "build_ext", **(ask | {"TORCH_CUDA_ARCH_LIST": "7.0;Hopper"}))
    assert "arch=compute_90,code=sm_90" in done.stdout and "compute_70" not in done.stdout
    done = build(tree, "build_ext", **(ask | {"TORCH_CUDA_ARCH_LIST": "new"}))
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0" in done.stderr
    done = build(tree, "build_ext", **(ask | {"TORCH_CUDA_ARCH_LIST": "Turing 7.0"}))
    assert done.returncode == 0
    assert "TORCH_CUDA_ARCH_LIST has no architecture of 8.0 or later" in done.stderr


def test_wheel_without_it(tree: Path, tmp_path: Path):
    done = build(tree, "bdist_wheel", REPMTL_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "built without the native backend for the CPU: REPMTL_SKIP_NATIVE is set" in done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    status, total = use(wheel, tmp_path / "installed")
    assert "the package was built without it, since REPMTL_SKIP_NATIVE is set" in status
    assert float(total) > 0


@pytest.mark.parametrize("command", ["build_ext --inplace", "editable_wheel"])
def test_skipping_in_place_leaves_no_earlier_library(tree: Path, monkeypatch, command):
    earlier_libraries(tree)
    done = build(tree, command, REPMTL_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stderr
    for library, name in files.LIBRARIES.items():
        assert not (tree / "repmtl_kernels" / name).exists()
        assert "since REPMTL_SKIP_NATIVE is set" in status(tree, library, monkeypatch)


def test_sdist_has_the_sources(tree: Path):
    earlier_libraries(tree)
    build(tree, "build_ext --inplace", REPMTL_SKIP_NATIVE="1")
    done = build(tree, "sdist", REPMTL_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {Path(*Path(n).parts[1:]).as_posix() for n in members.getnames()}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert not [name for name in names if "_native_" in name and not name.endswith(".py")]


def test_without_a_compiler_it_says_so_and_goes_on(tree: Path):
    done = build(tree, "build", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler 'no-such-compiler'" in done.stderr
    assert not list(tree.rglob("*.so"))


@needs_native
@pytest.mark.parametrize("how", FAKES)
def test_where_nvcc_fails_the_rest_is_built(tree: Path, tmp_path: Path, monkeypatch, how):
    script, reason = FAKES[how]
    _only_names(tree)
    earlier = earlier_libraries(tree)
    done = build(tree, "build_ext --inplace", **fake(tmp_path, script, cxx=False))
    assert done.returncode == 0, done.stderr
    assert "built without the native backend for CUDA: " in done.stderr
    assert [path.name for path in earlier if path.exists()] == ["_native_cpu.so"] * 2
    assert not (tree / "repmtl_kernels" / "_native_cpu.txt").exists()
    reported = status(tree, "cuda", monkeypatch)
    assert re.search("the package was built without it, since .*" + reason.format("cuda"), reported)


@pytest.mark.parametrize("how", FAKES)
def test_where_the_compiler_fails_both_are_left_out(tree: Path, tmp_path: Path, monkeypatch, how):
    script, reason = FAKES[how]
    earlier = earlier_libraries(tree)
    done = build(tree, "editable_wheel", **fake(tmp_path, script))
    assert done.returncode == 0, done.stderr
    assert "built without the native backend for the CPU: " in done.stderr
    assert not [p for p in earlier if p.exists() and p.parent == tree / "repmtl_kernels"]
    reported = status(tree, "cpu", monkeypatch)
    assert re.search("the package was built without it, since .*" + reason.format("cpu"), reported)
    assert "the package was built without it" in status(tree, "cuda", monkeypatch)


def test_a_wheel_tells_why_it_has_no_library(tree: Path, tmp_path: Path):
    earlier_libraries(tree)
    done = build(tree, "bdist_wheel", **fake(tmp_path, FAKES["fails"][0]))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    status, total = use(wheel, tmp_path / "installed")
    assert "unsupported GNU version" in status and float(total) > 0


def test_the_reason_is_the_end_of_what_the_first_failure_said(tree: Path, tmp_path: Path):
    script = 'i=1; while test $i -le 30; do echo "line $i of $out"; i=$((i + 1)); done; exit 1'
    done = build(tree, "build_ext", **fake(tmp_path, script))
    assert "line 1 of " in done.stdout, "everything is shown where it happens"
    (note,) = (tree / "build").glob("lib*/repmtl_kernels/_native_cpu.txt")
    first, *lines = note.read_text().splitlines()
    failed = re.fullmatch(r"(\w+\.o) could not be built:", first)[1]
    assert lines == [f"line {i} of {failed}" for i in range(19, 31)]
    assert f"{first}\nline 19 of" in done.stderr and "line 18 of" not in done.stderr


@needs_native
def test_a_library_that_is_built_removes_the_reason(tree: Path, tmp_path: Path):
    _only_names(tree)
    build(tree, "build_ext --inplace", **fake(tmp_path, "exit 1"))
    reason = tree / "repmtl_kernels" / "_native_cpu.txt"
    assert reason.exists()
    for command in ("bdist_wheel", "build_ext --inplace"):
        done = build(tree, command)
        assert done.returncode == 0, done.stderr
    assert not reason.exists() and reason.with_suffix(".so").exists()
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    native = {name for name in names if "/_native_c" in name}
    assert native == {"repmtl_kernels/_native_cpu.so", "repmtl_kernels/_native_cuda.txt"}


@needs_native
def test_a_compiler_that_turns_silent_does_not_pass_earlier_objects_for_its_own(
    tree: Path, tmp_path: Path
):
    """The compiler does link, so objects of the build before would make a library."""
    _only_names(tree)
    assert build(tree, "build_ext").returncode == 0
    real = os.environ.get("CXX") or "c++"
    silent = fake(tmp_path, f'case "$*" in *" -c "*) ;; *) exec {real} "$@";; esac')
    done = build(tree, "build_ext", **silent)
    assert "built without the native backend for the CPU" in done.stderr
    assert not list(tree.rglob("*_cpu.so"))


@pytest.mark.parametrize(
    ("required", "settings", "error"),
    [
        ("NATIVE", {"CXX": "no-such-compiler"}, "for the CPU: there is no C.. compiler"),
        ("NATIVE", {"script": FAKES["fails"][0]}, "for the CPU: .*could not be built:"),
        ("NATIVE", {"script": FAKES["writes nothing"][0]}, "for the CPU: .*wrote no"),
        ("CUDA", {"script": FAKES["writes garbage"][0]}, "for CUDA: .*is not the library"),
        ("CUDA", {"CXX": "no-such-compiler", "REPMTL_SKIP_CUDA": "0"}, "for CUDA: there is no C.."),
    ],
)
def test_what_is_required_is_an_error(tree: Path, tmp_path: Path, required, settings, error):
    if script := settings.pop("script", None):
        settings = fake(tmp_path, script)
    variable = f"REPMTL_REQUIRE_{required}"
    earlier = earlier_libraries(tree)
    done = build(tree, "build_ext --inplace", **settings, **{variable: "1"})
    assert done.returncode != 0
    message = re.search(
        f"^{variable} is set, but built without the native backend {error}", done.stderr, re.M
    )
    assert message, done.stderr
    assert done.stderr.count("is set, but") == 1, "the other part is not required"
    assert not [path for path in earlier if path.exists()]


@needs_native
def test_required_libraries_that_are_built_are_no_error(tree: Path, tmp_path: Path):
    """The library for CUDA fails, and is not the one that is required."""
    _only_names(tree)
    settings = fake(tmp_path, "exit 1", cxx=False)
    done = build(tree, "build", **settings, REPMTL_REQUIRE_NATIVE="1", REPMTL_REQUIRE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "built without the native backend for CUDA" in done.stderr


def test_an_nvcc_that_does_not_run_is_named(tree: Path, tmp_path: Path):
    settings = fake(tmp_path, "", cxx=False) | {"CXX": "false"}
    Path(settings["CUDA_HOME"], "bin", "nvcc").write_bytes(b"\0not a program")
    done = build(tree, "build_ext", **settings, REPMTL_REQUIRE_CUDA="1")
    assert done.returncode != 0
    assert "backend for CUDA: " in done.stderr and "nvcc --version names no release" in done.stderr


@pytest.mark.parametrize(
    ("require", "skip"), [("NATIVE", "NATIVE"), ("CUDA", "CUDA"), ("CUDA", "NATIVE")]
)
def test_required_and_skipped_is_refused(tree: Path, require, skip):
    settings = {"REPMTL_SKIP_CUDA": "0", f"REPMTL_SKIP_{skip}": "1"}
    done = build(tree, "build", **settings, **{f"REPMTL_REQUIRE_{require}": "1"})
    assert done.returncode != 0
    names = f"REPMTL_REQUIRE_{require}, REPMTL_SKIP_{skip}: "
    assert names + "expected one of the two, got both set" in done.stderr
    assert not [*tree.rglob("_native_*.so"), *tree.rglob("_native_*.txt")]


@needs_native
@pytest.mark.slow_cpu
def test_no_address_or_undefined_behaviour_is_found_by_the_sanitizers(tree: Path):
    compiler = os.environ.get("CXX") or "c++"
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler} has no sanitizers here")
    sanitize = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
    done = build(tree, "build_ext --inplace", CXXFLAGS=sanitize)
    assert done.returncode == 0, done.stderr
    # Without the tests of damaged files, which have processes of their own.
    tests = [str(ROOT / "tests" / "backends" / "test_native.py"), "-k", "not library_that"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests],
        cwd=tree,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": str(tree),
            "OMP_NUM_THREADS": "2",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
