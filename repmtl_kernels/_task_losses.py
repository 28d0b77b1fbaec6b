"""Task losses, their representations and weights: the checks, one form for lists and dicts, and the
saliencies (eq. 3)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repmtl_kernels._arguments import check_number, check_plain

TaskLosses = Sequence[Tensor | None] | Mapping[Hashable, Tensor | None]
Representation = Tensor | Sequence[Tensor] | Mapping[Hashable, Tensor]
Weights = Sequence[float] | Mapping[Hashable, float]

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


def named_representations(
    representation: Representation, losses: TaskLosses
) -> list[tuple[str, Tensor]]:
    """Each task's representation with the name that messages use, in the order of the losses.

    Without those of absent tasks, whose loss is None: they may be anything.
    """
    tasks = list(losses) if isinstance(losses, Mapping) else range(len(losses))
    if isinstance(representation, Tensor):
        check_plain("representation", representation)
        return [("representation", representation) for _ in present_of(tasks, losses)]
    if not isinstance(representation, list | tuple | Mapping):
        raise TypeError(
            "representation: expected a Tensor (multi-input: a list or dict of one per task), got "
            f"{_kind(representation)}"
        )
    values = per_task("representation", representation, losses)
    pairs = [(f"representation[{t!r}]", z) for t, z in zip(tasks, values, strict=True)]
    named = present_of(pairs, losses)
    for name, z in named:
        if not isinstance(z, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(z).__name__}")
        check_plain(name, z)
    return named


def present_of(values: Iterable, losses: TaskLosses) -> list:
    """The values, one for each task, of the tasks that have a loss."""
    given = losses.values() if isinstance(losses, Mapping) else losses
    return [value for value, loss in zip(values, given, strict=True) if loss is not None]


def per_task(name: str, values: Any, losses: TaskLosses) -> list:
    """The values in the order of the losses, which have them one for one, by key or by position."""
    if isinstance(losses, Mapping):
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{name}: losses is a dict, so expected a dict with the same keys; got "
                f"{_kind(values)}"
            )
        if values.keys() != losses.keys():
            raise ValueError(
                f"{name}: expected the keys of losses, {list(losses)}; got {list(values)}"
            )
        return [values[task] for task in losses]
    if not isinstance(values, list | tuple):
        raise TypeError(
            f"{name}: losses is a {_kind(losses)}, so expected a list or tuple with one value per "
            f"task; got {_kind(values)}"
        )
    if len(values) != len(losses):
        raise ValueError(f"{name}: expected {len(losses)}, one for each loss; got {len(values)}")
    return list(values)


def check_graph(named: dict[Hashable, Tensor], representations: list[tuple[str, Tensor]]) -> None:
    """That saliencies can be taken, as far as it shows without taking them."""
    if not torch.is_grad_enabled():
        raise ValueError(
            "losses: saliencies are gradients, and gradients are disabled here (torch.no_grad() or "
            "torch.inference_mode()). Enable them, or call criterion.eval() on a RepMTL first: it "
            "is then the sum of the losses alone"
        )
    for name, z in representations:
        if not z.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor with requires_grad=True, got one without a graph: "
                f"{_why_no_graph(z)}. It has to be the encoder's output, the tensor that the heads "
                "were given. Where the encoder is frozen, call representation.requires_grad_() "
                "before the heads"
            )
    stacks = {}
    for task, loss in named.items():
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{task!r}]: expected a loss with a graph, got one without: "
                f"{_why_no_graph(loss)}. For a task that is absent from this batch, pass None to "
                "RepMTL, or leave it out"
            )
        stack = _stacked_in(loss)
        if stack is None:
            continue
        if stack in stacks:
            raise ValueError(
                f"losses[{stacks[stack]!r}] and losses[{task!r}]: expected separate losses, got "
                f"elements of one stacked tensor. {_WHY_NOT_STACKED}"
            )
        stacks[stack] = task


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
    named: dict[Hashable, Tensor],
    representations: list[tuple[str, Tensor]],
    scale: Tensor | None = None,
) -> list[Tensor]:
    """Of the losses times ``scale``, a scalar that is 1 where it is None."""
    saliencies = []
    for (task, loss), (name, z) in zip(named.items(), representations, strict=True):
        seed = None if scale is None else scale.to(loss.dtype)
        (saliency,) = torch.autograd.grad(loss, z, seed, create_graph=True, allow_unused=True)
        if saliency is None:
            raise ValueError(
                f"losses[{task!r}]: does not depend on {name}. Pass the very tensor that the head "
                "of this task was given, not a copy of it; and it must not have been written in "
                "place since, e.g. by ReLU(inplace=True). A term that has no saliency, such as a "
                "penalty on weights, is added to the total instead" + _if_compiled(z, loss)
            )
        saliencies.append(saliency)
    return saliencies


def _if_compiled(z: Tensor, loss: Tensor) -> str:
    nodes = [value.grad_fn for value in (z, loss) if value.grad_fn is not None]
    if not any("CompiledFunction" in node.name() for node in nodes):
        return ""
    return (
        ". A torch.compile region gave one of the two: no gradient passes between results of the "
        "same region, so where the encoder is compiled together with heads or losses, compile the "
        "encoder alone"
    )


def weighted_sum(named: dict[Hashable, Tensor], weights: Sequence[float]) -> Tensor:
    terms = zip(named.values(), weights, strict=True)
    return sum(loss if weight == 1 else weight * loss for loss, weight in terms)


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
