"""Task losses, their representations and weights: the checks, one record for each task, and the
saliencies (eq. 3)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repmtl_kernels._ground.checks import check_number, check_plain
from repmtl_kernels._ground.torch_private import backward_hooks
from repmtl_kernels._training.levels import Levels

TaskLosses = Sequence[Tensor | None] | Mapping[Hashable, Tensor | None]
Shared = Tensor | Levels
Representation = Shared | Sequence[Shared] | Mapping[Hashable, Shared]
Positions = Tensor | Sequence[Tensor | None] | Mapping[Hashable, Tensor | None]
Weights = Sequence[float] | Mapping[Hashable, float]

SHARED = (
    "A list or dict has one representation for each task (multi-input). Where all tasks share "
    "several, such as the levels of a feature pyramid, pass Levels(...) of them"
)

_WHY_NOT_STACKED = (
    "Every element of a stacked tensor backpropagates zeros through the branches of all other "
    "tasks; pass the list of losses that torch.stack was given"
)


def named_losses(
    losses: TaskLosses, representation: Representation, *, absent: bool = False
) -> dict[Hashable, Tensor | None]:
    """The losses by key, or by index where they are a list; with ``absent`` some may be None."""
    if isinstance(losses, Tensor):
        if isinstance(representation, list | tuple | Mapping):
            raise TypeError(
                "losses: expected a list or dict of T scalar losses, got one Tensor, and "
                f"representation: expected a Tensor, got {_kind(representation)}. Are they "
                "swapped? The losses come first"
            )
        if losses.ndim == 0:
            raise TypeError(
                "losses: expected a list or dict of T scalar losses, got one scalar Tensor. Pass "
                "the loss of each task, not their sum ([loss] for a single task)"
            )
        raise TypeError(
            "losses: expected a list or dict of T scalar losses, got one Tensor of shape "
            f"{tuple(losses.shape)}. {_WHY_NOT_STACKED}"
        )
    if isinstance(losses, Mapping):
        named = dict(losses)
    elif isinstance(losses, list | tuple):
        named = dict(enumerate(losses))
    else:
        raise TypeError(
            "losses: expected a list, tuple or dict of T scalar losses; got "
            f"{type(losses).__name__}"
        )
    if not named:
        raise ValueError(f"losses: expected at least one task, got an empty {_kind(losses)}")
    if absent and all(loss is None for loss in named.values()):
        raise ValueError(
            f"losses: expected the loss of at least one task, got None for all of {list(named)}. "
            "Skip a batch without any label; with a group, skip it on every rank"
        )
    for task, loss in named.items():
        if absent and loss is None:
            continue
        if not isinstance(loss, Tensor):
            hint = ". For a task that is absent from this batch, pass None" if absent else ""
            raise TypeError(
                f"losses[{task!r}]: expected a scalar Tensor, got {type(loss).__name__}{hint}"
            )
        check_plain(f"losses[{task!r}]", loss)
        if loss.is_complex() or loss.is_quantized or loss.layout != torch.strided:
            raise TypeError(
                f"losses[{task!r}]: expected a real, strided Tensor; got {loss.dtype}, layout "
                f"{loss.layout}"
            )
        if loss.ndim != 0:
            remedy = ".mean() or .squeeze()" if loss.numel() == 1 else ".mean() or .sum()"
            raise ValueError(
                f"losses[{task!r}]: expected a scalar of shape (), got shape "
                f"{tuple(loss.shape)}. Reduce it with {remedy}"
            )
    return named


class Copies(dict):
    """One shared representation that each task has a copy of, by task, as LibMTL's have."""


@dataclass(eq=False)
class Task:
    """A task of one call, with all that belongs to it. A task that is absent has none."""

    key: Hashable
    row: int  # its place among all losses, absent ones too
    loss: Tensor
    objective: Tensor  # what its saliencies are gradients of: the loss, or its logarithm
    weight: float = 1.0
    # At each level the name that messages use and the representation; one level where there are no
    # Levels.
    places: list[tuple[str, Tensor]] = field(default_factory=list)
    # Whether the representations are the task's own copies of what is one representation.
    copies: bool = False
    # At each level; None where the loss does not depend on that level.
    saliencies: list[Tensor | None] = field(default_factory=list)

    @property
    def representations(self) -> list[Tensor]:
        return [z for _, z in self.places]


def place(
    tasks: Sequence[Task], representation: Representation, losses: TaskLosses
) -> tuple[Hashable, ...] | None:
    """Gives the tasks their representations, and returns the names of the levels.

    None: there are no :class:`Levels`. The representations of absent tasks may be anything.
    """
    if isinstance(representation, Tensor | Levels):
        places = _places("representation", representation)
        for task in tasks:
            task.places = places
        return _level_names(representation)
    if not isinstance(representation, list | tuple | Mapping):
        raise TypeError(
            "representation: expected a Tensor (multi-input: a list or dict of one per task; "
            f"several shared ones: Levels), got {_kind(representation)}"
        )
    values = per_task("representation", representation, losses, f". {SHARED}")
    for task in tasks:
        task.places = _places(f"representation[{task.key!r}]", values[task.row])
        task.copies = isinstance(representation, Copies)
    first, *others = tasks
    names = _level_names(values[first.row])
    for task in others:
        if _level_names(values[task.row]) != names:
            raise ValueError(
                f"representation[{task.key!r}]: expected the levels of "
                f"representation[{first.key!r}], {_shown(names)}; got "
                f"{_shown(_level_names(values[task.row]))}"
            )
    return names


def at_each_level(
    positions: Positions | None, levels: tuple[Hashable, ...] | None
) -> list[tuple[str, Tensor | None]]:
    """The masks of positions at the levels, with the names that messages use."""
    if positions is None:
        return [("positions", None)] * (1 if levels is None else len(levels))
    if levels is None:
        return [("positions", positions)]
    if isinstance(positions, Mapping):
        if set(positions) != set(levels):
            raise ValueError(
                f"positions: expected the names of the levels, {list(levels)}; got "
                f"{list(positions)}"
            )
        return [(f"positions[{name!r}]", positions[name]) for name in levels]
    if not isinstance(positions, list | tuple):
        raise TypeError(
            f"positions: expected a list, tuple or dict with one mask for each of {len(levels)} "
            f"levels; got {_kind(positions)}"
        )
    if len(positions) != len(levels):
        raise ValueError(
            f"positions: expected {len(levels)}, one for each level; got {len(positions)}"
        )
    return [(f"positions[{i}]", mask) for i, mask in enumerate(positions)]


def _places(name: str, value: object) -> list[tuple[str, Tensor]]:
    if isinstance(value, Levels):
        places = [(f"{name}[{level!r}]", z) for level, z in value.items()]
    elif isinstance(value, Tensor):
        places = [(name, value)]
    else:
        raise TypeError(f"{name}: expected a Tensor, got {_kind(value)}")
    for name_of_z, z in places:
        check_plain(name_of_z, z)
        first = places[0][1]
        if (z.dtype, z.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name_of_z}: expected the dtype and device of {places[0][0]}, {first.dtype} on "
                f"{first.device}; got {z.dtype} on {z.device}"
            )
    return places


def _level_names(value: Shared) -> tuple[Hashable, ...] | None:
    return value.names if isinstance(value, Levels) else None


def _shown(names: tuple[Hashable, ...] | None) -> str:
    return "one Tensor" if names is None else str(list(names))


def distinct(tasks: Iterable[Task]) -> list[Tensor]:
    """All representations of the tasks, each once."""
    return list({id(z): z for task in tasks for z in task.representations}.values())


def per_task(name: str, values: Any, losses: TaskLosses, hint: str = "") -> list:
    """The values in the order of the losses, which have them one for one, by key or by position.

    ``hint`` ends the message where they don't.
    """
    if isinstance(losses, Mapping):
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{name}: losses is a dict, so expected a dict with the same keys; got "
                f"{_kind(values)}{hint}"
            )
        if values.keys() != losses.keys():
            raise ValueError(
                f"{name}: expected the keys of losses, {list(losses)}; got {list(values)}{hint}"
            )
        return [values[task] for task in losses]
    if not isinstance(values, list | tuple):
        raise TypeError(
            f"{name}: losses is a {_kind(losses)}, so expected a list or tuple with one value per "
            f"task; got {_kind(values)}{hint}"
        )
    if len(values) != len(losses):
        raise ValueError(
            f"{name}: expected {len(losses)}, one for each loss; got {len(values)}{hint}"
        )
    return list(values)


def check_graph(tasks: Sequence[Task]) -> None:
    """Raises where saliencies can't be taken, as far as it shows without taking them."""
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
    stacks = {}
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
                f"got elements of one stacked tensor. {_WHY_NOT_STACKED}"
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


def _stacked_in(loss: Tensor) -> torch.autograd.graph.Node | None:
    """The node of the stacked tensor that ``loss`` is an element of."""
    node = loss.grad_fn
    if node is None or not node.name().startswith(("UnbindBackward", "SelectBackward")):
        return None
    whole = node.next_functions[0][0]
    # CopySlices: losses written one by one into a tensor, `out[t] = loss`.
    stacking = ("StackBackward", "CatBackward", "CopySlices")
    return whole if whole is not None and any(s in whole.name() for s in stacking) else None


def take_saliencies(
    tasks: Sequence[Task], scale: Tensor | None = None, *, some_absent: bool = False
) -> None:
    """Takes them of the objectives times ``scale``, a scalar that is 1 where it is None.

    some_absent: other tasks, absent now, may be those that depend on a level.
    """
    with without_hooks(distinct(tasks)):
        for task in tasks:
            seed = None if scale is None else scale.to(task.objective.dtype)
            found = torch.autograd.grad(
                task.objective, task.representations, seed, create_graph=True, allow_unused=True
            )
            if all(saliency is None for saliency in found):
                raise ValueError(_not_dependent(task))
            task.saliencies = list(found)
    for level, (name, _) in enumerate([] if some_absent else tasks[0].places):
        if all(task.saliencies[level] is None for task in tasks):
            raise ValueError(f"{name}: expected a level that a loss depends on; none of them does")


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Gradients that are taken at these tensors inside of it pass by their hooks.

    A hook of the user's is meant for the gradient of the whole backward pass: it would change each
    saliency, and ``retain_grad`` would add it to ``.grad``.
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
        for hooks, given in zip(live, kept, strict=True):
            hooks.update(given)
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
        ". A torch.compile region gave one of the two: no gradient passes between results of the "
        "same region, so where the encoder is compiled together with heads or losses, compile the "
        "encoder alone"
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


def weighted_sum(tasks: Sequence[Task]) -> Tensor:
    return sum(t.objective if t.weight == 1 else t.weight * t.objective for t in tasks)


def checked_weights(weights: Weights | None) -> Weights | None:
    """A copy, so that the caller's list or dict may change."""
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return {t: check_number(f"task_weights[{t!r}]", w, minimum=0) for t, w in weights.items()}
    if isinstance(weights, list | tuple):
        return tuple(
            check_number(f"task_weights[{t}]", w, minimum=0) for t, w in enumerate(weights)
        )
    raise TypeError(
        f"task_weights: expected a list, tuple or dict of numbers, or None; got {_kind(weights)}"
    )


def _kind(value: object) -> str:
    return type(value).__name__
