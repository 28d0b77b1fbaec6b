"""The check of a loss on its first training call, through the graph that it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import Node, get_gradient_edge

from repmtl_kernels._ground import torch_private
from repmtl_kernels._heads.preflight.derivatives import Derivatives
from repmtl_kernels._heads.preflight.faults import (
    FSDP1,
    SHARDED,
    STATIC_GRAPH,
    Fault,
    SecondDerivativeError,
    known_fault,
)
from repmtl_kernels._heads.preflight.graph import (
    Ends,
    Visited,
    depends,
    ends_of,
    made_after,
    nodes_below,
)
from repmtl_kernels._training.arguments import SHARED as PASS_LEVELS
from repmtl_kernels._training.saliencies import without_hooks
from repmtl_kernels._training.tasks import Task


def check_losses(new: Sequence[Task], tasks: Sequence[Task], applied: bool) -> bool:
    """Look at the graphs of losses, and raise if Rep-MTL can't train with one of them.

    Operations that are known to have no second derivative come first, since they may fail with an
    error that doesn't explain it, or with none. Taking the derivatives shows all others.

    Args:
        new: the tasks to look at, with a graph between each loss and its representations.
        tasks: all tasks of the call.
        applied: whether this call has the regulariser.

    Returns:
        False where this has to be called again on a later step: the first backward pass through a
        static graph of DistributedDataParallel will be one without saliencies.

    Raises:
        SecondDerivativeError: an operation between a loss and its representations has no second
            derivative.
        ValueError: a loss depends on a representation that belongs to another task alone.
    """
    visited: dict[frozenset[tuple[Node, int]], Visited] = {}  # by the ends of the walk
    dependent: list[tuple[Task, Ends]] = []  # taking the saliencies refuses others
    for task in new:
        _refuse_shared(task, tasks)
        ends: Ends = ends_of(task.representations)
        is_dependent = depends([task.loss], ends)
        key = frozenset((node, number) for node, numbers in ends.items() for number in numbers)
        nodes = nodes_below([task.loss.grad_fn], ends, visited.setdefault(key, {}))
        _refuse_wrapped(task, nodes, is_dependent)
        for node, leads in nodes.items():
            fault = known_fault(node) if leads else None
            if fault is None:
                continue
            if fault.reason == STATIC_GRAPH.reason and not applied:
                return False
            raise _error(task, fault)
        if is_dependent:
            dependent.append((task, ends))
    for task, ends in dependent:
        result = Derivatives(task.loss, task.representations, ends, own=False).result()
        if isinstance(result, Fault):
            raise _error(task, result) from result.cause
    return True


def _error(task: Task, fault: Fault) -> SecondDerivativeError:
    names = " or ".join(name for name, _ in task.places)
    return SecondDerivativeError(
        f"losses[{task.key!r}]: {fault.reason}, and it is between {names} and this loss. "
        f"{fault.remedy}. RepMTL.check(heads, z) finds the module"
    )


def _refuse_wrapped(task: Task, nodes: Visited, is_dependent: bool) -> None:
    """Raise where a wrapper for distributed training is between a loss and a representation."""
    for name, z in task.places:
        fault = _sharded_fault(z, made_after(z, nodes))
        if fault is not None:
            raise SecondDerivativeError(
                f"losses[{task.key!r}]: {fault.reason}, and it is between {name} and this loss, "
                f"or returned {name}. {fault.remedy}"
            )
        is_copied = z.grad_fn is not None and z.grad_fn.name().startswith("_DDPSink")
        if is_copied and not is_dependent:
            raise SecondDerivativeError(
                f"losses[{task.key!r}]: does not depend on {name}, a result of "
                "DistributedDataParallel, which copies its results where static_graph or "
                "find_unused_parameters is set. Call the criterion inside the wrapped module"
            )


def _sharded_fault(z: Tensor, nodes: Iterable[Node]) -> Fault | None:
    """Return the fault of sharded parameters below a loss, or of hooks that a wrapper put on ``z``.

    Every saliency fires these hooks.
    """
    sharded: set[int] = set()
    for hook in torch_private.backward_hooks(z).values():
        if torch_private.is_hook_of_fsdp1(hook):
            return FSDP1
        sharded |= {id(p) for p in torch_private.unsharded_parameters(hook)}
    for node in nodes:
        leaf = getattr(node, "variable", None)
        if leaf is None:
            continue
        if torch_private.is_flat_parameter(leaf):
            return FSDP1
        if id(leaf) in sharded:
            return SHARDED
    return None


def _refuse_shared(task: Task, tasks: Sequence[Task]) -> None:
    """Raise where a loss depends on a representation that belongs to another task alone."""
    if all(other.places is task.places for other in tasks):  # shared by all
        return
    own = ends_of(task.representations)
    if not depends([task.loss], own):
        return  # taking the saliencies says so
    # A walk does not pass through the task's own representations: encoders may share anything.
    blocked: dict[Node, set[int]] = {node: set() for node in own}
    for other in tasks:
        for name, z in other.places:
            edge = get_gradient_edge(z)
            if edge.output_nr in own.get(edge.node, ()):
                continue
            ends = {**blocked, edge.node: {edge.output_nr}}
            if depends([task.loss], ends) and _has_gradient(task.loss, z):
                raise ValueError(
                    f"losses[{task.key!r}]: expected a loss that depends on {task.places[0][0]} "
                    f"alone, got one that depends on {name} too. {PASS_LEVELS}"
                )


def _has_gradient(loss: Tensor, z: Tensor) -> bool:
    """Return whether the gradient is not zero.

    Each element of a stack of losses depends on everything that the other elements depend on, but
    with gradients of zero.
    """
    with without_hooks([z]):
        (gradient,) = grad(loss, z, retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())
