"""The arguments of a training call, checked: losses, representations, masks and weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from repmtl_kernels._ground.checks import check_number, check_plain
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

WHY_NOT_STACKED = (
    "Every element of a stacked tensor backpropagates zeros through the branches of all other "
    "tasks; pass the list of losses that torch.stack was given"
)


class Copies(dict):
    """The copies of one shared representation that LibMTL gives each task, by task."""


def named_losses(
    losses: TaskLosses, representation: Representation | None, *, absent: bool = False
) -> dict[Hashable, Tensor | None]:
    """Return the losses by key, or by index for a list. With ``absent`` some may be None."""
    if isinstance(losses, Tensor):
        if isinstance(representation, list | tuple | Mapping):
            raise TypeError(
                "losses: expected a list or dict of T scalar losses, got one Tensor, and "
                f"representation: expected a Tensor, got {kind_of(representation)}. Are they "
                "swapped? The losses come first"
            )
        if losses.ndim == 0:
            raise TypeError(
                "losses: expected a list or dict of T scalar losses, got one scalar Tensor. Pass "
                "the loss of each task, not their sum ([loss] for a single task)"
            )
        raise TypeError(
            "losses: expected a list or dict of T scalar losses, got one Tensor of shape "
            f"{tuple(losses.shape)}. {WHY_NOT_STACKED}"
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
        raise ValueError(f"losses: expected at least one task, got an empty {kind_of(losses)}")
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


def per_task(name: str, values: Any, losses: TaskLosses, hint: str = "") -> list:
    """Return the values in the order of the losses, which they match by key or by position.

    Args:
        name: what messages call the values.
        values: a dict with the keys of ``losses``, or a list or tuple if that is none.
        losses: as the user gave them.
        hint: the end of a message.
    """
    if isinstance(losses, Mapping):
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{name}: losses is a dict, so expected a dict with the same keys; got "
                f"{kind_of(values)}{hint}"
            )
        if values.keys() != losses.keys():
            raise ValueError(
                f"{name}: expected the keys of losses, {list(losses)}; got {list(values)}{hint}"
            )
        return [values[task] for task in losses]
    if not isinstance(values, list | tuple):
        raise TypeError(
            f"{name}: losses is a {kind_of(losses)}, so expected a list or tuple with one value "
            f"per task; got {kind_of(values)}{hint}"
        )
    if len(values) != len(losses):
        raise ValueError(
            f"{name}: expected {len(losses)}, one for each loss; got {len(values)}{hint}"
        )
    return list(values)


def named_tensors(name: str, value: object) -> list[tuple[str, Tensor]]:
    """Return the tensor at each level, with the name that messages use."""
    if isinstance(value, Levels):
        places = [(f"{name}[{level!r}]", z) for level, z in value.items()]
    elif isinstance(value, Tensor):
        places = [(name, value)]
    else:
        raise TypeError(f"{name}: expected a Tensor, got {kind_of(value)}")
    for full_name, z in places:
        check_plain(full_name, z)
        first = places[0][1]
        if (z.dtype, z.device) != (first.dtype, first.device):
            raise ValueError(
                f"{full_name}: expected the dtype and device of {places[0][0]}, {first.dtype} on "
                f"{first.device}; got {z.dtype} on {z.device}"
            )
    return places


def masks_of_levels(
    positions: Positions | None, levels: tuple[Hashable, ...] | None
) -> list[tuple[str, Tensor | None]]:
    """Return the mask of positions at each level, with the names that messages use."""
    if positions is None:
        return [("positions", None)] * (1 if levels is None else len(levels))
    if levels is None:  # check_positions refuses anything but a Tensor
        return [("positions", cast(Tensor, positions))]
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
            f"levels; got {kind_of(positions)}"
        )
    if len(positions) != len(levels):
        raise ValueError(
            f"positions: expected {len(levels)}, one for each level; got {len(positions)}"
        )
    return [(f"positions[{i}]", mask) for i, mask in enumerate(positions)]


def checked_weights(weights: Weights | None) -> Weights | None:
    """Return a copy, so that the caller's list or dict may change."""
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return {t: check_number(f"task_weights[{t!r}]", w, minimum=0) for t, w in weights.items()}
    if isinstance(weights, list | tuple):
        return tuple(
            check_number(f"task_weights[{t}]", w, minimum=0) for t, w in enumerate(weights)
        )
    raise TypeError(
        f"task_weights: expected a list, tuple or dict of numbers, or None; got {kind_of(weights)}"
    )


def level_names(value: Shared) -> tuple[Hashable, ...] | None:
    """Return the names of the levels; None for one tensor."""
    return value.names if isinstance(value, Levels) else None


def kind_of(value: object) -> str:
    """Return the name of the type, for messages."""
    return type(value).__name__
