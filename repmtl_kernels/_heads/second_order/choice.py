"""Which form of batch norm's derivatives to use."""

from __future__ import annotations

from torch import Tensor

from repmtl_kernels._heads.second_order import eager
from repmtl_kernels._heads.second_order.contract import Form
from repmtl_kernels.backends.availability import refusal


def load(x: Tensor) -> Form:
    """Return the form for tensors like ``x``: Triton on CUDA devices that it supports, or eager."""
    if x.is_cuda and refusal("triton", x.dtype, x.device) is None:
        from repmtl_kernels._heads.second_order import triton  # an optional package

        return triton
    return eager
