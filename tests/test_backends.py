"""Which backend runs, and that nothing falls back without saying so."""

import os
import subprocess
import sys

import pytest
import torch
from cases import DEVICE

from repmtl_kernels import available_backends, backend_report, backends, csa_loss, tsr_loss

GOOD = [torch.randn(2, 3, 4) for _ in range(2)]


def test_report_names_every_backend():
    report = backend_report()
    assert tuple(report) == backends.KNOWN
    assert report["eager"] == report["reference"] == "ok"
    assert available_backends() == tuple(name for name in report if report[name] == "ok")


def test_auto_is_eager_on_the_cpu():
    assert backends.resolve("auto", GOOD[0]) == "eager"


@pytest.mark.gpu
def test_auto_is_triton_on_cuda_but_for_float64():
    assert backends.resolve("auto", GOOD[0].cuda()) == "triton"
    assert backends.resolve("auto", GOOD[0].cuda().double()) == "eager"


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("REPMTL_BACKEND", "reference")
    assert backends.resolve("auto", GOOD[0]) == "reference"
    assert backends.resolve("eager", GOOD[0]) == "eager"
    monkeypatch.setenv("REPMTL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="REPMTL_BACKEND: expected one of.*'nonsense'"):
        tsr_loss(GOOD)


def test_triton_refuses_float64_by_name():
    if "triton" not in available_backends():
        pytest.skip("needs the Triton backend")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: float64"):
        csa_loss([s.double().to(DEVICE) for s in GOOD], backend="triton")


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
    assert "('reference', 'eager')" in out
    assert "backend: 'triton' cannot run here: no CUDA device" in out


def test_without_triton_the_package_works_and_says_why():
    out = _run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, repmtl_kernels as r\n"
        "print(r.backend_report()['triton'])\n"
        "print(r.tsr_loss([torch.ones(2, 3)] * 2).item())\n"
    )
    assert "triton cannot be imported" in out
    assert "0.693" in out
