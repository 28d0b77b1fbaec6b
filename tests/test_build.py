"""The package as it is built: wheels with and without the compiled library, and the sdist."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from repmtl_kernels import _native

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
pytest.importorskip("setuptools", minversion="77", reason="reads PEP 639 metadata")

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_native = pytest.mark.skipif(_native.status("cpu") != "ok", reason=_native.status("cpu"))
USE = (
    "import torch, repmtl_kernels as r; print(r.backend_report()['native']); "
    "print(r.rep_mtl_loss([torch.randn(4, 6, 5) for _ in range(2)], backend='auto').total.item())"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clean copy of what a build reads."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("repmtl_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def build(tree: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    """Without the network: PyTorch, setuptools and ninja are those of this environment.

    Without CUDA unless asked for, which takes a minute.
    """
    return subprocess.run(
        [sys.executable, "setup.py", *command.split()],
        cwd=tree,
        env={**os.environ, "REPMTL_SKIP_CUDA": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def use(wheel: Path, folder: Path) -> list[str]:
    """What :data:`USE` prints with only the wheel's files, away from the source tree."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # A folder of its own: neither the source tree nor its editable install may be imported.
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {USE}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def _only_contrast(tree: Path) -> Path:
    """Leaves one file of the CUDA kernels: a whole build takes a minute."""
    kept = tree / "csrc" / "cuda" / "contrast.cu"
    for source in kept.parent.glob("*.cu"):
        if source != kept:
            source.write_text("")
    return kept


@needs_native
@pytest.mark.slow
@pytest.mark.slow_cpu
@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_wheel_with_the_compiled_libraries(tree: Path, tmp_path: Path, cuda: bool):
    if cuda and NVCC is None:
        pytest.skip("needs nvcc")
    if cuda:  # little of it; a release's library is looked at in test_cuda_library.py
        _only_contrast(tree)
        options = {"REPMTL_SKIP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    done = build(tree, "bdist_wheel", **(options if cuda else {}))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name, "one wheel for every Python"
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "repmtl_kernels/_native_cpu.so" in names
    assert ("repmtl_kernels/_native_cuda.so" in names) == cuda
    assert ("built without the native backend for CUDA" in done.stderr) == (not cuda)
    assert not [n for n in names if n.startswith("csrc")]
    status, total = use(wheel, tmp_path / "installed")
    assert status == "ok" and float(total) > 0


@needs_native
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_architectures_are_those_asked_for(tree: Path):
    _only_contrast(tree).write_text("#error broken")
    ask = {"REPMTL_SKIP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "8.6;9.0a+PTX"}
    done = build(tree, "build_ext", **ask)
    assert done.returncode != 0
    assert "REPMTL_SKIP_CUDA=1 (without CUDA only) or REPMTL_SKIP_NATIVE=1" in done.stderr
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
    assert "built without the native backend: REPMTL_SKIP_NATIVE is set" in done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    status, total = use(wheel, tmp_path / "installed")
    assert "the package was built without it" in status and float(total) > 0


@needs_native
def test_skipping_in_place_leaves_no_earlier_library(tree: Path):
    left = tree / "repmtl_kernels" / _native.LIBRARIES["cpu"]
    left.write_text("of an earlier build")
    done = build(tree, "build_ext --inplace", REPMTL_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert not left.exists()


def test_sdist_has_the_sources(tree: Path):
    done = build(tree, "sdist", REPMTL_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {Path(*Path(n).parts[1:]).as_posix() for n in files.getnames()}
    sources = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names


def test_without_a_compiler_it_says_so_and_goes_on(tree: Path):
    done = build(tree, "build", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler 'no-such-compiler'" in done.stderr
    assert not list(tree.rglob("*.so"))


@needs_native
def test_a_failed_build_says_how_to_go_on(tree: Path):
    (tree / "csrc" / "entropy.cpp").write_text("#error broken")
    done = build(tree, "build_ext")
    assert done.returncode != 0
    assert "csrc could not be compiled" in done.stderr and "REPMTL_SKIP_NATIVE=1" in done.stderr
    assert not list(tree.rglob("*.so"))


@needs_native
@pytest.mark.slow
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
    sanitize = "-O1 -g -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
    done = build(tree, "build_ext --inplace", CXXFLAGS=sanitize)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "test_native.py")],
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
