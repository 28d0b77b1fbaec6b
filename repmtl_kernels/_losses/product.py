"""A matrix product without autocast, for the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import without_autocast


class Product(torch.autograd.Function):
    """``a @ b``. Autocast would compute it, and the products of its backward, in 16 bits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a.device):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return Product.apply(grad, b.mT), Product.apply(a.mT, grad)

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return Product.apply(da, b) + Product.apply(a, db)
