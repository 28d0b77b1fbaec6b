"""The entry to the losses: the ``autograd.Function``, or under a compiler its graph node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_kernels._ground.torch_private import is_fake
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.function import Losses


def evaluate(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(total, tsr, csa)``, a tensor without elements for what is left out."""
    if torch.compiler.is_compiling():
        # Imported while the compiler traces: it must not be loaded by `import repmtl_kernels`.
        from repmtl_kernels._losses.graph_node import graph_node

        return graph_node(present, positions, config.flat(), *operands)
    # Fake tensors have no values that a backend could read.
    results = Losses.apply(is_fake(operands[0]), config, present, positions, *operands)
    return results[:3]
