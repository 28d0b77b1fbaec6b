"""Questions of a node: which gradients are wanted, and does a transform run?"""

from __future__ import annotations

from torch.autograd.function import BackwardCFunction

from repmtl_kernels._ground import torch_private
from repmtl_kernels._heads.second_order.contract import MaybeTensor


def wanted(node: BackwardCFunction) -> list[bool]:
    """Return which arguments' gradients are asked for, in the ``backward`` of a Function.

    ``needs_input_grad`` says which arguments have a graph at all; ``autograd.grad(loss, z)`` wants
    only the gradients that lead to ``z``.
    """
    if not torch_private.running_backward():  # called by hand, outside of a backward pass
        return list(node.needs_input_grad)
    edges = (edge for edge, _ in node.next_functions if edge is not None)
    executed = torch_private.will_be_executed
    return [need and executed(next(edges)) for need in node.needs_input_grad]


def transformed() -> bool:
    """Return whether a ``torch.func`` transform is active, which ``Function.apply`` is not for.

    In a backward it is the ``vmap`` of a caller who wants the rows of a Jacobian at once;
    ``is_grads_batched`` has another ``vmap``.
    """
    return torch_private.is_transform_active()


def visible(tensor: MaybeTensor) -> MaybeTensor:
    """Return the same tensor, not as a leaf: the engine can't answer :func:`wanted` for a leaf."""
    if tensor is not None and tensor.requires_grad and tensor.is_leaf:
        return tensor.view_as(tensor)
    return tensor
