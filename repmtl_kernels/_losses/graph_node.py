"""The losses, and products of the reference, as nodes of a compiler's graph. Importing this module
loads TorchDynamo."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._ground.record import Config
from repmtl_kernels._losses.function import Losses
from repmtl_kernels._losses.product import Product


@torch.compiler.allow_in_graph
def graph_node(
    present: Tensor | None, positions: Tensor | None, config: tuple, *operands: Tensor
) -> tuple[Tensor, Tensor]:
    """``Losses`` traced below the compiler's front end, which can't trace an ``autograd.Function``
    inside ``torch.func.grad``; autograd and function transforms see an ordinary one here."""
    tsr, csa, *_ = Losses.apply(True, Config(*config), present, positions, *operands)
    return tsr, csa


@torch.compiler.allow_in_graph
def product_node(a: Tensor, b: Tensor) -> Tensor:
    return Product.apply(a, b)
