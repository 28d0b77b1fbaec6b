"""Which backends exist on this machine, and which one to use."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from repmtl_kernels._ground.checks import check_choice
from repmtl_kernels.backends.availability import native_status, refusal, triton_status
from repmtl_kernels.backends.contract import Stages
from repmtl_kernels.backends.eager import stages as eager_stages
from repmtl_kernels.backends.native import stages as native_stages

BACKENDS = ("reference", "eager", "native", "triton")
# Stages that can be imported everywhere.
STAGES: dict[str, Stages] = {"eager": eager_stages, "native": native_stages}


def backend_report() -> dict[str, str]:
    """Return each backend's name with ``"ok"``, or with the reason why it can't be used here.

    A backend that works on one kind of this machine's devices is ``"ok on ..."``, with the reason
    why it does not work on the other.
    """
    return {
        "reference": "ok", "eager": "ok", "native": native_status(), "triton": triton_status(),
    }  # fmt: skip


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that work on this machine."""
    return tuple(name for name, status in backend_report().items() if status.split()[0] == "ok")


def check_backend(backend: str, source: str = "backend") -> None:
    """Raise if no backend has this name; it need not run here.

    ``source`` is what the message calls the place that the name comes from.
    """
    check_choice(source, backend, ("auto", *BACKENDS))


def resolve(backend: str, saliency: Tensor) -> str:
    """Return the name of the backend to run: never ``"auto"``.

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
    if torch.compiler.is_compiling():  # compilers can't trace the questions to Triton and CUDA
        from repmtl_kernels.backends.untraced import refusal as why_not
    if backend == "auto":
        fastest = "triton" if saliency.is_cuda else "native"
        usable = why_not(fastest, saliency.dtype, saliency.device) is None
        return fastest if usable else "eager"
    if (reason := why_not(backend, saliency.dtype, saliency.device)) is not None:
        raise ValueError(f"{source}: {backend!r} cannot run here: {reason}")
    return backend


def load(backend: str) -> Stages:
    """Return the stages of a backend. Triton is imported on first use only."""
    if backend == "triton":
        from repmtl_kernels.backends.triton import stages as triton_stages

        return triton_stages
    return STAGES[backend]
