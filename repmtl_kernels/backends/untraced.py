"""An answer that compilers take as a constant: they do not trace how it is computed.

A module of its own, since importing it loads TorchDynamo.
"""

from __future__ import annotations

import torch

from repmtl_kernels.backends import availability


@torch.compiler.assume_constant_result
def refusal(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what :func:`availability.refusal` returns."""
    return availability.refusal(backend, dtype, device)
