"""Which backend runs, and that nothing falls back without saying so."""

import os
import re
import subprocess
import sys

import pytest
import torch
from cases import DEVICE

from repmtl_kernels import available_backends, backend_report, csa_loss, tsr_loss
from repmtl_kernels.backends import availability, choice
from repmtl_kernels.backends.native import library as native_library

GOOD = [torch.randn(2, 3, 4) for _ in range(2)]
ON_CPU = "native" if "native" in available_backends() else "eager"


def test_report_names_every_backend():
    report = backend_report()
    assert tuple(report) == choice.BACKENDS
    assert report["eager"] == report["reference"] == "ok"
    assert available_backends() == tuple(name for name in report if report[name] == "ok")


def test_auto_on_the_cpu_is_native_where_that_was_built():
    assert choice.resolve("auto", GOOD[0]) == ON_CPU


@pytest.mark.gpu
def test_auto_is_triton_on_cuda_but_for_float64():
    assert choice.resolve("auto", GOOD[0].cuda()) == "triton"
    assert choice.resolve("auto", GOOD[0].cuda().double()) == "eager"


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("REPMTL_BACKEND", "reference")
    assert choice.resolve("auto", GOOD[0]) == "reference"
    assert choice.resolve("eager", GOOD[0]) == "eager"
    monkeypatch.setenv("REPMTL_BACKEND", "")
    assert choice.resolve("auto", GOOD[0]) == ON_CPU
    monkeypatch.setenv("REPMTL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="REPMTL_BACKEND: expected one of.*'nonsense'"):
        tsr_loss(GOOD)


def test_triton_refuses_float64_by_name():
    if "triton" not in available_backends():
        pytest.skip("needs the Triton backend")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: float64"):
        csa_loss([s.double().to(DEVICE) for s in GOOD], backend="triton")


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [
        (None, (7, 5), "compute capability 8.0, got 7.5"),
        ("7.0", (9, 4), "ROCm"),
        (None, (8, 0), None),
    ],
)
def test_triton_on_other_gpus(monkeypatch, hip, capability, reason):
    """`auto` must not choose kernels that can't be compiled for the device."""
    pytest.importorskip("triton")
    monkeypatch.setattr(availability, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    refusal = availability.refusal.__wrapped__("triton", torch.float32, torch.device("cuda", 0))
    status = backend_report()["triton"]
    if reason is None:
        assert refusal is None and status == "ok"
    else:
        assert reason in refusal and reason in status


def _run(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_without_a_gpu_triton_says_why():
    out = _run(
        "import torch, repmtl_kernels as r\n"
        "print(r.backend_report()['triton'])\n"
        "print(r.available_backends())\n"
        "try: r.tsr_loss([torch.ones(2, 3)], backend='triton')\n"
        "except ValueError as e: print(e)\n"
    )
    assert "no CUDA device" in out
    assert "'triton'" not in out.splitlines()[1]
    assert "backend: 'triton' cannot run here: no CUDA device" in out


def test_interpreter_that_was_asked_for_too_late():
    out = _run(
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import repmtl_kernels as r\n"
        "print(r.backend_report()['triton'])\n"
    )
    assert "set before Triton is imported" in out


@pytest.mark.parametrize("broken", [False, True])
def test_a_native_library_that_cannot_be_loaded_says_why(monkeypatch, tmp_path, broken):
    monkeypatch.setattr(native_library, "PACKAGE", tmp_path)
    if broken:
        (tmp_path / native_library.LIBRARIES["cpu"]).write_text("not a library")
    status = native_library.status.__wrapped__("cpu")
    reason = r"cannot be loaded: .*(too short|invalid|not a)" if broken else "built without it"
    assert re.search(reason, status)
    monkeypatch.setattr(native_library, "status", lambda library: status)
    refusal = availability.refusal.__wrapped__
    monkeypatch.setattr(choice, "refusal", refusal)
    assert backend_report()["native"] == status and "native" not in available_backends()
    assert choice.resolve("auto", GOOD[0]) == "eager"
    with pytest.raises(ValueError, match="backend: 'native' cannot run here: _native_cpu.so"):
        tsr_loss(GOOD, backend="native")


def test_a_native_library_older_than_its_sources_is_not_used(monkeypatch, tmp_path):
    if "native" not in available_backends():
        pytest.skip("needs the native backend")
    (tmp_path / "package").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "entropy.cpp").write_text("// changed")
    library = native_library.PACKAGE / native_library.LIBRARIES["cpu"]
    (tmp_path / "package" / library.name).symlink_to(library)
    monkeypatch.setattr(native_library, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert "older than csrc: install the package again" in native_library.status.__wrapped__("cpu")


@pytest.mark.parametrize(
    ("cpu", "cuda", "report"),
    [
        ("ok", "ok", "ok"),
        ("ok", "no nvcc", "ok on the CPU; on CUDA: no nvcc"),
        ("no c++", "ok", "ok on CUDA; on the CPU: no c++"),
        ("not built", "not built either", "not built"),
    ],
)
def test_native_reports_both_libraries_where_there_is_a_cuda_device(monkeypatch, cpu, cuda, report):
    status = {"cpu": cpu, "cuda": cuda}
    monkeypatch.setattr(native_library, "status", status.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert availability.native_status() == report
    monkeypatch.setattr(choice, "native_status", lambda: report)
    assert ("native" in available_backends()) == ("ok" in (cpu, cuda))
    refusal = availability.refusal.__wrapped__("native", torch.float32, torch.device("cpu"))
    assert refusal == (None if cpu == "ok" else cpu)
    if cuda != "ok":
        refusal = availability.refusal.__wrapped__("native", torch.float32, torch.device("cuda"))
        assert refusal == cuda


def test_where_native_is_required_it_is_there():
    if os.environ.get("REPMTL_REQUIRE_NATIVE", "0") in ("", "0"):  # as setup.py reads it
        pytest.skip("REPMTL_REQUIRE_NATIVE is not set")
    assert backend_report()["native"] == "ok"


def test_native_is_for_the_cpu_and_cuda():
    if "native" not in available_backends():
        pytest.skip("needs the native backend")
    with pytest.raises(ValueError, match="backend: 'native' cannot run here: .*on meta"):
        tsr_loss([s.to("meta") for s in GOOD], backend="native")
