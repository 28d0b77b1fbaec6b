"""Task saliencies (eq. 3): when they can be taken, and how."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node

from repmtl_kernels._ground.torch_private import backward_hooks
from repmtl_kernels._training.arguments import WHY_NOT_STACKED
from repmtl_kernels._training.tasks import Task, Tasks, distinct


def check_graph(tasks: Tasks) -> None:
    """Raise if saliencies can't be taken, as far as that shows before they are."""
    if not torch.is_grad_enabled():
        raise ValueError(
            "losses: saliencies are gradients, and gradients are disabled here (torch.no_grad() or "
            "torch.inference_mode()). Enable them, or call criterion.eval() on a RepMTL first: it "
            "is then the sum of the losses alone"
        )
    for name, z in (pair for task in tasks for pair in task.places):
        if not z.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor with requires_grad=True, got one without a graph: "
                f"{_why_no_graph(z)}. It has to be the encoder's output, the tensor that the heads "
                "were given. Where the encoder is frozen, call representation.requires_grad_() "
                "before the heads"
            )
    stacks: dict[Node, Hashable] = {}
    for task in tasks:
        if not task.loss.requires_grad:
            raise ValueError(
                f"losses[{task.key!r}]: expected a loss with a graph, got one without: "
                f"{_why_no_graph(task.loss)}. {_ABSENT}"
            )
        stack = _stacked_in(task.loss)
        if stack is None:
            continue
        if stack in stacks:
            raise ValueError(
                f"losses[{stacks[stack]!r}] and losses[{task.key!r}]: expected separate losses, "
                f"got elements of one stacked tensor. {WHY_NOT_STACKED}"
            )
        stacks[stack] = task.key


_ABSENT = (
    "For a task that has no labels in this batch, pass None to RepMTL in place of the loss, or "
    "leave it out"
)


def _why_no_graph(value: Tensor) -> str:
    if value.is_inference():
        return "it was computed under torch.inference_mode()"
    return (
        "it was detached (.detach(), .data, torch.tensor()), computed under torch.no_grad(), or "
        "computed from tensors that need no gradient"
    )


def _stacked_in(loss: Tensor) -> Node | None:
    """Return the node of the stacked tensor that ``loss`` is an element of, if it is one."""
    node = loss.grad_fn
    if node is None or not node.name().startswith(("UnbindBackward", "SelectBackward")):
        return None
    stack = node.next_functions[0][0]
    # CopySlices: losses written one by one into a tensor, `out[t] = loss`.
    stacking = ("StackBackward", "CatBackward", "CopySlices")
    return stack if stack is not None and any(s in stack.name() for s in stacking) else None


def take_saliencies(
    tasks: Tasks, scale: Tensor | None = None, *, create_graph: bool = True
) -> None:
    """Give each task its saliencies: the gradients of its objective. The losses keep their graph.

    Args:
        tasks: with representations and checked graphs.
        scale: a scalar that the objectives are multiplied with; None: 1.
        create_graph: give the saliencies a graph, for a loss on them.

    Raises:
        ValueError: a loss depends on none of its representations, or no loss on a level. With
            absent tasks a level may be theirs alone.
    """
    with without_hooks(distinct(tasks)):
        for task in tasks:
            seed = None if scale is None else scale.to(task.objective.dtype)
            saliencies = torch.autograd.grad(
                task.objective,
                task.representations,
                seed,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
            if all(saliency is None for saliency in saliencies):
                raise ValueError(_not_dependent(task))
            task.saliencies = list(saliencies)
    if tasks.some_are_absent:
        return
    for level, (name, _) in enumerate(tasks[0].places):
        if all(task.saliencies[level] is None for task in tasks):
            raise ValueError(f"{name}: expected a level that a loss depends on; none of them does")


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Take the hooks away from these tensors while gradients at them are taken.

    A user's hook is meant for the gradient of the backward pass. It would change each saliency, and
    ``retain_grad`` would add the saliency to ``.grad``.
    """
    if torch.compiler.is_compiling():  # no compiler traces this
        yield
        return
    live = [hooks for hooks in map(backward_hooks, tensors) if hooks]
    kept = [dict(hooks) for hooks in live]
    grads = [(t, t.grad) for t in tensors if t.retains_grad]
    for hooks in live:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in zip(live, kept, strict=True):
            hooks.update(own)
        for tensor, grad in grads:
            tensor.grad = grad


def _not_dependent(task: Task) -> str:
    names = [name for name, _ in task.places]
    what = names[0] if len(names) == 1 else f"any of {', '.join(names)}"
    return (
        f"losses[{task.key!r}]: does not depend on {what}. Pass the very tensor that the head "
        "of this task was given, not a copy of it; and it must not have been written in "
        f"place since, e.g. by ReLU(inplace=True). {_ABSENT}. A term that has no saliency, such as "
        "a penalty on weights, is added to the total instead"
        + _if_compiled(task)
        + "".join(map(_if_converted, task.places))
    )


def _if_compiled(task: Task) -> str:
    nodes = [v.grad_fn for v in (*task.representations, task.loss) if v.grad_fn is not None]
    if not any("CompiledFunction" in node.name() for node in nodes):
        return ""
    return (
        ". The representation or the loss is a result of a torch.compile region: no gradient "
        "passes between results of the same region, so where the encoder is compiled together with "
        "heads or losses, compile the encoder alone"
    )


def _if_converted(place: tuple[str, Tensor]) -> str:
    name, z = place
    if z.grad_fn is None or not z.grad_fn.name().startswith("ToCopyBackward"):
        return ""
    return (
        f". {name} is a copy in {z.dtype}, as a model prepared by Accelerate for mixed precision "
        "returns it: the heads inside that model were given the original. Prepare encoder and "
        "heads one by one, or take losses and criterion into the model's forward"
    )
