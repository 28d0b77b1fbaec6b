"""Reasons why a head can't be trained: the operations that are known to fail, and the messages."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from repmtl_kernels._ground import torch_private


class SecondDerivativeError(RuntimeError):
    """A head can't be trained with Rep-MTL: its saliency has no derivative, or a wrong one.

    The message names the head or task, the module if it is known, the operation and what to do.
    """


class Place(NamedTuple):
    """Where a node was in its graph. Outlives the graph."""

    operation: str
    number: int  # PyTorch's sequence number

    @classmethod
    def of(cls, node: Node) -> Place:
        """Return the place of ``node``."""
        return cls(operation_of(node), torch_private.sequence_number(node))


class Fault(NamedTuple):
    """Why a head can't be trained, and what to do about it."""

    reason: str
    remedy: str
    place: Place | None = None  # in the graph of the head's forward
    cause: BaseException | None = None
    module: str | None = None

    def message(self, where: str) -> str:
        """Return the error message; ``where`` names the head."""
        return f"{where}: {self.reason}. {self.remedy}"


_SHARD_THE_ENCODER = (
    "Shard the encoder alone, with torch.distributed.fsdp.fully_shard, and leave the heads "
    "unsharded, e.g. in DistributedDataParallel; see docs/distributed.md"
)
FSDP1 = Fault(
    "FullyShardedDataParallel (FSDP1) frees its parameters before the second-order pass reaches "
    "them",
    _SHARD_THE_ENCODER,
)
SHARDED = Fault(
    "a module sharded with fully_shard frees its parameters, or reduces their gradients, before "
    "the second-order pass reaches them",
    _SHARD_THE_ENCODER,
)
STATIC_GRAPH = Fault(
    "DistributedDataParallel(static_graph=True) reduces gradients after the first backward pass "
    "through it, but that pass takes a saliency and leaves no gradients yet: the replicas would "
    "drift apart without an error",
    "Leave static_graph out, call the criterion inside the wrapped module, or take one step "
    "without the regulariser first (start=1)",
)

_SDPA = "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
# The beginnings of the names of operations, as autograd names their nodes (`Foo` of
# `FooBackward0`), why these can't be differentiated twice, and the remedy.
_KNOWN = (
    (
        ("CompiledFunction",),
        "a torch.compile region has no second derivative",
        "Compile the encoder alone, or the whole step with torch.func.grad for all gradients",
    ),
    (
        ("ScaledDotProduct",),
        "fused attention has no second derivative",
        f"Call the head under {_SDPA}",
    ),
    (
        ("FlashAttn", "FlashAttention", "EfficientAttention", "FlexAttention", "_fMHA"),
        "fused attention has no second derivative",
        f"Use torch.nn.functional.scaled_dot_product_attention under {_SDPA}",
    ),
    (
        ("CudnnRnn", "MiopenRnn"),
        "a cuDNN RNN has no second derivative",
        "Call the head under torch.backends.cudnn.flags(enabled=False)",
    ),
    (
        ("CheckpointFunction",),
        "re-entrant checkpointing can't give saliencies",
        "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    ),
    (
        ("SyncBatchNorm",),
        "SyncBatchNorm has no second derivative",
        "Use BatchNorm or GroupNorm in the heads; the encoder may keep SyncBatchNorm",
    ),
    (("RegisterPostBackwardFunction",), SHARDED.reason, SHARDED.remedy),
)
# once_differentiable wraps a function; all its wrappers share one code object.
_ONCE = once_differentiable(print).__code__


def operation_of(node: Node) -> str:
    """Return the name of the operation that ``node`` is the backward of."""
    return re.sub(r"Backward\d*$", "", node.name())


def known_fault(node: Node) -> Fault | None:
    """Return the fault of an operation that is known to have no second derivative."""
    operation = operation_of(node)
    for prefixes, reason, remedy in _KNOWN:
        if operation.startswith(prefixes):
            return Fault(f"{reason} (operation {operation})", remedy, Place.of(node))
    if operation.startswith("_DDPSink") and torch_private.ddp_waits_for_static_graph(
        torch_private.wrapped_module(node)
    ):
        return STATIC_GRAPH._replace(place=Place.of(node))
    if isinstance(node, BackwardCFunction):
        backward = torch_private.defined_function(node).backward
        if getattr(backward, "__code__", None) is _ONCE:
            return _custom_fault(node, "is marked with once_differentiable")
    return None


def fault_of(node: Node, problem: str, cause: BaseException | None = None) -> Fault:
    """Return the fault of a node whose backward has this problem; ``cause`` is what it raised."""
    if isinstance(cause, CheckpointError):  # about what checkpointing does, whatever the node
        return Fault(
            "checkpointing did not run the same operations again in the backward: "
            f"{first_line(cause)}",
            "Enter contexts, second_order() too, inside the checkpointed function, not around it; "
            "or use convert_second_order(head) in place of second_order()",
            Place.of(node),
            cause,
        )
    fault = known_fault(node)
    if fault is None and isinstance(node, BackwardCFunction):
        fault = _custom_fault(node, problem)
    if fault is None:
        fault = Fault(
            f"the backward of operation {operation_of(node)} {problem}",
            "Use operations that PyTorch can differentiate twice instead",
            Place.of(node),
        )
    return fault._replace(cause=cause)


def _custom_fault(node: Node, problem: str) -> Fault:
    return Fault(
        f"the backward of the autograd.Function {operation_of(node)} {problem}",
        "Write that backward with differentiable operations of PyTorch (no once_differentiable, "
        "detach, no_grad or own kernel), or use another operation",
        Place.of(node),
    )


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, without its period."""
    return str(error).strip().partition("\n")[0].rstrip(".")
