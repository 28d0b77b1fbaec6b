"""What compilers take as a constant, untraced. Importing this module loads TorchDynamo."""

from __future__ import annotations

import torch

from repmtl_kernels.backends import availability


@torch.compiler.assume_constant_result
def refusal(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    return availability.refusal(backend, dtype, device)
