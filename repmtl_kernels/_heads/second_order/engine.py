"""What nodes have to know of the autograd engine and of who calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._ground import torch_private


def wanted(node: torch.autograd.graph.Node) -> list[bool]:
    """In the ``backward`` of an ``autograd.Function``: which arguments' gradients are asked for?

    ``needs_input_grad`` says which arguments have a graph at all; ``autograd.grad(loss, z)`` wants
    only those that lead to ``z``.
    """
    if not torch_private.running_backward():  # called by hand, outside of a backward pass
        return list(node.needs_input_grad)
    edges = (edge for edge, _ in node.next_functions if edge is not None)
    executed = torch_private.will_be_executed
    return [need and executed(next(edges)) for need in node.needs_input_grad]


def transformed() -> bool:
    """Whether a ``torch.func`` transform is active: ``Function.apply`` is not for these.

    In a backward it is the ``vmap`` of who wants the rows of a Jacobian at once; that of
    ``is_grads_batched`` is another one.
    """
    return torch_private.is_transform_active()


def visible(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, not as a leaf: about leaves the engine answers :func:`wanted` nothing."""
    if tensor is not None and tensor.requires_grad and tensor.is_leaf:
        return tensor.view_as(tensor)
    return tensor
