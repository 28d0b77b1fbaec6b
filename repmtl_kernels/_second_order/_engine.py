"""What a node's backward has to know of the autograd engine."""

from __future__ import annotations

import torch
from torch import Tensor


def wanted(node: torch.autograd.graph.Node) -> list[bool]:
    """In the ``backward`` of an ``autograd.Function``: which arguments' gradients are asked for?

    ``needs_input_grad`` says which arguments have a graph at all; ``autograd.grad(loss, z)`` wants
    only those that lead to ``z``.
    """
    if torch._C._current_graph_task_id() == -1:  # called by hand, outside of a backward pass
        return list(node.needs_input_grad)
    edges = (edge for edge, _ in node.next_functions if edge is not None)
    return [
        need and torch._C._will_engine_execute_node(next(edges)) for need in node.needs_input_grad
    ]


def visible(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, not as a leaf: about leaves the engine answers :func:`wanted` nothing."""
    if tensor is not None and tensor.requires_grad and tensor.is_leaf:
        return tensor.view_as(tensor)
    return tensor
