"""Which backends exist on this machine, and which one to use."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels._ground.checks import check_choice
from repmtl_kernels.backends.availability import native_status, refusal, triton_status

KNOWN = ("reference", "eager", "native", "triton")
# Where the stages of a backend are.
STAGES = {"eager": "eager", "native": "native.stages", "triton": "triton.stages"}


def backend_report() -> dict[str, str]:
    """Each known backend's name to ``"ok"``, or to the reason why it can't be used here.

    A backend that works on some of this machine's devices is ``"ok on ..."``, with the reason why
    not on the others.
    """
    return {
        "reference": "ok", "eager": "ok", "native": native_status(), "triton": triton_status(),
    }  # fmt: skip


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine."""
    return tuple(name for name, status in backend_report().items() if status.split()[0] == "ok")


def check_backend(backend: str, source: str = "backend") -> None:
    """That there is such a backend, not that it runs here."""
    check_choice(source, backend, ("auto", *KNOWN))


def resolve(backend: str, saliency: Tensor) -> str:
    """The name of the backend to run: never ``"auto"``.

    ``"auto"`` is REPMTL_BACKEND if that is set, else the fastest one that takes the tensor:
    ``"triton"`` on CUDA, ``"native"`` on the CPU, ``"eager"`` where neither runs. ``"native"`` on
    CUDA is by name only, until it has been measured. A backend asked for by name that can't run
    raises instead of falling back.
    """
    source = "backend"
    check_backend(backend, source)
    if backend == "auto":
        backend = os.environ.get("REPMTL_BACKEND") or "auto"
        source = "REPMTL_BACKEND"
        check_backend(backend, source)
    why_not = refusal
    if torch.compiler.is_compiling():  # no compiler traces what this asks of Triton and of CUDA
        from repmtl_kernels.backends.constant import refusal as why_not
    if backend == "auto":
        fastest = "triton" if saliency.is_cuda else "native"
        usable = why_not(fastest, saliency.dtype, saliency.device) is None
        return fastest if usable else "eager"
    if (reason := why_not(backend, saliency.dtype, saliency.device)) is not None:
        raise ValueError(f"{source}: {backend!r} cannot run here: {reason}")
    return backend


def load(name: str) -> ModuleType:
    """The stages of backend ``name``. Imported on first use: Triton is not needed before."""
    return importlib.import_module(f"repmtl_kernels.backends.{STAGES[name]}")
