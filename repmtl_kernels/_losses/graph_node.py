"""The losses, and products of the reference, as nodes of a compiler's graph.

Importing this module loads TorchDynamo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._losses.config import Config, Constant
from repmtl_kernels._losses.function import Losses
from repmtl_kernels._losses.product import Product


@torch.compiler.allow_in_graph
def graph_node(
    present: Tensor | None,
    positions: Tensor | None,
    config: tuple[Constant, ...],
    *operands: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(total, tsr, csa)``, traced below the compiler's front end.

    The front end can't trace an ``autograd.Function`` inside ``torch.func.grad``. Autograd and
    function transforms see an ordinary one here.
    """
    results = Losses.apply(True, Config.from_flat(config), present, positions, *operands)
    return results[:3]


@torch.compiler.allow_in_graph
def product_node(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, traced in the same way."""
    return Product.apply(a, b)
