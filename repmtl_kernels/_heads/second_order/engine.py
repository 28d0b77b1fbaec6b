"""Questions of a node to the autograd engine."""

from __future__ import annotations

from torch.autograd.function import BackwardCFunction

from repmtl_kernels._ground import torch_private
from repmtl_kernels._heads.second_order.contract import MaybeTensor


def gradients_needed(node: BackwardCFunction) -> list[bool]:
    """Return which arguments' gradients are asked for, in the ``backward`` of a Function.

    ``needs_input_grad`` says which arguments have a graph at all; ``autograd.grad(loss, z)`` wants
    only the gradients that lead to ``z``.
    """
    if not torch_private.running_backward():  # called by hand, outside of a backward pass
        return list(node.needs_input_grad)
    edges = (edge for edge, _ in node.next_functions if edge is not None)
    executed = torch_private.will_be_executed
    return [need and executed(next(edges)) for need in node.needs_input_grad]


def not_a_leaf(tensor: MaybeTensor) -> MaybeTensor:
    """Return the same tensor as a result: the engine can't answer for leaves."""
    if tensor is not None and tensor.requires_grad and tensor.is_leaf:
        return tensor.view_as(tensor)
    return tensor
