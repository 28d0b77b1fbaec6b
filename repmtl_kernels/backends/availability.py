"""Whether a backend can run here, and if not, why."""

from __future__ import annotations

import functools

import torch

from repmtl_kernels.backends.native import library as native_library

# The least compute capability that Triton supports and that has TF32.
TRITON_CAPABILITY = (8, 0)


def triton_status() -> str:
    """Return ``"ok"``, or why the Triton kernels cannot run on this machine."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if interpreting():
        return "ok"
    if not torch.cuda.is_available():
        return (
            "no CUDA device (TRITON_INTERPRET=1, set before Triton is imported, runs the kernels "
            "on the CPU, for tests)"
        )
    if torch.version.hip is not None:
        return "the kernels are for CUDA; this PyTorch is built for ROCm"
    newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    return "ok" if newest >= TRITON_CAPABILITY else _too_old(newest)


def interpreting() -> bool:
    """Return whether Triton interprets kernels: it reads TRITON_INTERPRET at its first import."""
    import triton

    return not isinstance(triton.language.sum, triton.runtime.JITFunction)


def native_status() -> str:
    """Return ``"ok"``, or why the compiled libraries cannot be used on this machine.

    The library for CUDA counts only where there is a CUDA device. Where one of the two works, the
    status is ``"ok on ..."`` with the reason of the other.
    """
    cpu = native_library.status("cpu")
    if not torch.cuda.is_available():
        return cpu
    cuda = native_library.status("cuda")
    if "ok" not in (cpu, cuda) or cpu == cuda:
        return cpu
    return f"ok on the CPU; on CUDA: {cuda}" if cpu == "ok" else f"ok on CUDA; on the CPU: {cpu}"


@functools.cache
def refusal(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the backend cannot take saliencies of this dtype and device; None if it can."""
    if backend == "triton":
        return _triton_refusal(dtype, device)
    if backend == "native":
        return _native_refusal(device)
    return None


def _triton_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype == torch.float64:
        return "float64 saliencies are for the 'eager' and 'reference' backends"
    if (status := triton_status()) != "ok":
        return status
    if interpreting():
        return None
    if device.type != "cuda":
        return f"saliencies are on {device}, expected a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= TRITON_CAPABILITY else _too_old(capability)


def _native_refusal(device: torch.device) -> str | None:
    if device.type not in native_library.LIBRARIES:
        return f"saliencies are on {device}, expected the CPU or a CUDA device"
    if (status := native_library.status(device.type)) != "ok":
        return status
    if device.type == "cuda":
        reason = native_library.load("cuda").why_not(torch.empty(0, device=device))
        if reason:
            return f"the CUDA kernels can't run on {device}: {reason}"
    return None


def _too_old(capability: tuple[int, int]) -> str:
    needed, actual = (f"{major}.{minor}" for major, minor in (TRITON_CAPABILITY, capability))
    return f"the kernels need a GPU of compute capability {needed}, got {actual}"
