"""Options and fixtures of all tests, which run on CUDA or with Triton's interpreter on the CPU."""

import contextlib
import importlib
import os
from pathlib import Path

import pairs
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if library := os.environ.get("REPMTL_EMULATED_CUDA"):  # set by test_emulated_cuda.py
    import emulated_cuda

    emulated_cuda.install(library)
    if kernels := os.environ.get("REPMTL_EMULATED_PTX"):  # set by ptx/test_csrc.py
        from ptx import csrc

        csrc.install(library, kernels)


if not CUDA:
    with contextlib.suppress(ImportError, AttributeError):  # no Triton, or another release
        import interpreter

        interpreter.speed_up()


def pytest_addoption(parser):
    parser.addoption(
        "--cells",
        metavar="FOLDER",
        help="write the outcomes of the tests marked `cell` to FOLDER/compatibility.json",
    )
    parser.addoption(
        "--compiled",
        metavar="FOLDER",
        help="run all cases of compiled kernels, and write a table of them to FOLDER/compiled.json",
    )
    parser.addoption(
        "--fast",
        action="store_true",
        help="run one case of each test, and none that is slow",
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="under an interpreter too, run each case, not only one for every pair of values",
    )


def pytest_configure(config):
    if config.getoption("--cells") and not hasattr(config, "workerinput"):  # of pytest-xdist
        import cells

        config.pluginmanager.register(cells.Cells(Path(config.getoption("--cells"))))
    if config.getoption("--compiled") and not hasattr(config, "workerinput"):
        from ptx import report

        config.pluginmanager.register(report.Report(Path(config.getoption("--compiled"))))
    if config.getoption("--fast"):
        import fast

        left_out = ("slow", "slow_cpu") if CUDA else ("slow", "slow_cpu", "gpu")
        config.pluginmanager.register(fast.Fast(left_out))


@pytest.fixture
def refused(record_property):
    """Return a ``pytest.raises`` that also makes the test's cell a "no"."""

    @contextlib.contextmanager
    def expect(error, match):
        with pytest.raises(error, match=match) as raised:
            yield
        record_property("refused", raised.type.__name__)

    return expect


def pytest_collection_modifyitems(config, items):
    if not CUDA and not config.getoption("--every-case"):
        kept = pairs.chosen(items, "native" if library else "triton")
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    for number, item in enumerate(items):
        if marker := item.get_closest_marker("cell"):
            backend = marker.kwargs.get("backend") or item.callspec.params["backend"]
            item.user_properties.append(("cell", [number, *marker.args, backend]))
    if CUDA:  # time may be short: tests that run nowhere else come first
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty and its kind with NaN, and raise at nondeterministic operations."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def default_precision():
    """Set full precision for float32 products, and ignore the environment's options."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # by default convolutions use tf32
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REPMTL_BACKEND", raising=False)
        patch.delenv("REPMTL_FP32_PRECISION", raising=False)
        patch.delenv("REPMTL_TILES", raising=False)
        yield


@pytest.fixture(autouse=True)
def second_order_of_any_size(monkeypatch):
    """Give small layers the double backward that second_order() has for large ones."""
    choice = importlib.import_module("repmtl_kernels._heads.second_order.choice")
    monkeypatch.setattr(choice, "SMALLEST", choice.Smallest(0, 0, 0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> list[dict[str, str]]:
    """Run the CHECKS of the test's module on two ranks, and return what failed on each."""
    import ranks

    return ranks.run(request.module.CHECKS, tmp_path_factory.mktemp("ranks"))
