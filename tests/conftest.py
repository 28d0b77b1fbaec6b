"""Where the tests run: on CUDA if there is one, else on the CPU with Triton's interpreter."""

import contextlib
import os
import zlib
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if library := os.environ.get("REPMTL_EMULATED_CUDA"):  # set by test_emulated_cuda.py
    import emulated_cuda

    emulated_cuda.install(library)


def _patch_triton_language_once():
    """Half of the interpreter's time: each call of a device function patches triton.language again.

    A call within a kernel finds it patched by the kernel's launch.
    """
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope
    core = interpreter.tl.core

    def once(function):
        seen = function.__globals__.values()
        modules = [m for m in (interpreter.tl, core) if any(value is m for value in seen)]
        if modules and not any(core.is_builtin(m.load) for m in modules):
            return nothing()
        return patch(function)

    interpreter._patch_lang = once


if not CUDA:
    with contextlib.suppress(ImportError, AttributeError):  # no Triton, or another inside
        _patch_triton_language_once()


def pytest_addoption(parser):
    parser.addoption(
        "--cells",
        metavar="FOLDER",
        help="write what the tests marked `cell` found to FOLDER/compatibility.json",
    )


    parser.addoption(
        "--fast",
        action="store_true",
        help="one case of each parametrised test, and no test marked `slow` or `slow_cpu`",
    )


def pytest_configure(config):
    if config.getoption("--cells") and not hasattr(config, "workerinput"):  # of pytest-xdist
        import cells

        config.pluginmanager.register(cells.Cells(Path(config.getoption("--cells"))))


@pytest.fixture
def refused(record_property):
    """``with refused(error, match=...)``: pytest.raises, and the test's cell is a "no"."""

    @contextlib.contextmanager
    def expect(error, match):
        with pytest.raises(error, match=match) as found:
            yield
        record_property("refused", found.type.__name__)

    return expect


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        kept = set(one_case_of_each(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    for number, item in enumerate(items):
        if marker := item.get_closest_marker("cell"):
            backend = marker.kwargs.get("backend") or item.callspec.params["backend"]
            item.user_properties.append(("cell", [number, *marker.args, backend]))
    if CUDA:  # time may be short: first what is tested nowhere else
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def one_case_of_each(items):
    """Choose one case of each test that is neither slow nor sure to be skipped.

    Which case follows from the test's name, so that each run has the same ones, and tests of the
    same parameters have different ones.
    """
    cases = {}
    for item in items:
        if not any(item.get_closest_marker(m) for m in ("slow", "slow_cpu", *([] if CUDA else ["gpu"]))):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [tests[zlib.crc32(name.encode()) % len(tests)] for name, tests in cases.items()]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kind come filled with NaN, and nondeterministic operations raise."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def default_precision():
    """Float32 products at full precision, and the choice of backend to the test."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # convolutions have tf32 unless told otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REPMTL_BACKEND", raising=False)
        patch.delenv("REPMTL_FP32_PRECISION", raising=False)
        patch.delenv("REPMTL_TILES", raising=False)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
