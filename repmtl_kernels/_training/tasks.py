"""The tasks of one call: each with its loss, objective, weight, representations and saliencies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._losses.arguments import (
    check_csa_batch,
    check_positions,
    check_present,
    check_saliencies,
)
from repmtl_kernels._training.arguments import (
    SHARED,
    Copies,
    Positions,
    Representation,
    TaskLosses,
    Weights,
    checked_weights,
    kind_of,
    level_names,
    masks_of_levels,
    named_losses,
    named_tensors,
    per_task,
)
from repmtl_kernels._training.levels import Levels


@dataclass(eq=False)
class Task:
    """A task that has a loss in this call. An absent task has no such record."""

    key: Hashable
    row: int  # its place among all losses, the absent ones included
    loss: Tensor
    objective: Tensor  # the loss, or its logarithm: its gradient is the saliency
    weight: float = 1.0
    # The name for messages and the representation, at each level. Without Levels there is one.
    places: list[tuple[str, Tensor]] = field(default_factory=list)
    # Whether the representations are this task's own copies of one that all tasks share.
    copies: bool = False
    # At each level; None where the loss does not depend on that level.
    saliencies: list[Tensor | None] = field(default_factory=list)

    @property
    def representations(self) -> list[Tensor]:
        """The tensors of ``places``."""
        return [z for _, z in self.places]

    @property
    def own_saliencies(self) -> list[Tensor]:
        """The saliencies at the levels that the loss depends on."""
        return [saliency for saliency in self.saliencies if saliency is not None]


class Level(NamedTuple):
    """The tensors that TSR and CSA of one level are made of. T tasks depend on the level."""

    number: int  # among all levels
    tasks: list[Task]
    saliencies: list[Tensor]  # T of (B, C, *spatial)
    present: Tensor | None  # (T, B)
    positions: Tensor | None  # (B, *spatial)


class Tasks(list[Task]):
    """The tasks of one call that have a loss, in the order of the losses.

    A call fills it in four steps. The constructor takes the losses, :meth:`place` the
    representations and :meth:`check_batch` the masks; then ``take_saliencies`` of ``saliencies.py``
    takes the saliencies.

    Args:
        losses: as the user gave them.
        representation: as the user gave it, or None; :meth:`place` checks it, this does not.
        objective: returns what is differentiated, the loss or its logarithm.
        weights: ``w_t``; None: all 1.
        absent: whether a loss may be None.
    """

    losses: dict[Hashable, Tensor | None]
    """The losses as they were given, by key or index; None for a task that is absent."""
    present: Tensor | None = None
    """Bool ``(T, B)``, one row for each of ``losses``, absent tasks included."""
    positions: Sequence[Tensor | None] = ()
    """Bool ``(B, *spatial)`` at each level."""
    level_names: tuple[Hashable, ...] | None = None
    """Those of the :class:`Levels`; None if each representation is one tensor."""

    def __init__(
        self,
        losses: TaskLosses,
        representation: Representation | None,
        *,
        objective: Callable[[Tensor], Tensor] = lambda loss: loss,
        weights: Weights | None = None,
        absent: bool = False,
    ) -> None:
        self.losses = named_losses(losses, representation, absent=absent)
        self._given = losses
        by_row = [1.0] * len(losses)
        if weights is not None:
            by_row = per_task("task_weights", checked_weights(weights), losses)
        super().__init__(
            Task(key, row, loss, objective(loss), by_row[row])
            for row, (key, loss) in enumerate(self.losses.items())
            if loss is not None
        )

    @property
    def has_levels(self) -> bool:
        """Whether the representations are :class:`Levels`."""
        return self.level_names is not None

    @property
    def some_are_absent(self) -> bool:
        """Whether a loss is None."""
        return len(self) < len(self.losses)

    def detached_losses(self) -> dict[Hashable, Tensor | None]:
        """Return the losses as they were given, without their graphs."""
        return {key: None if loss is None else loss.detach() for key, loss in self.losses.items()}

    def weighted_sum(self) -> Tensor:
        """Return ``sum_t w_t L_t``, of the logarithms where the objectives are these."""
        first, *others = (
            task.objective if task.weight == 1 else task.weight * task.objective for task in self
        )
        total = 0 + first  # a tensor of its own: the caller may write to it
        for term in others:
            total = total + term
        return total

    def place(self, representation: Representation) -> None:
        """Give each task its representations. An absent task may have anything in its place."""
        if isinstance(representation, Tensor | Levels):
            places = named_tensors("representation", representation)
            for task in self:
                task.places = places
            self.level_names = level_names(representation)
            return
        if not isinstance(representation, list | tuple | Mapping):
            raise TypeError(
                "representation: expected a Tensor (multi-input: a list or dict of one per task; "
                f"several shared ones: Levels), got {kind_of(representation)}"
            )
        values = per_task("representation", representation, self._given, f". {SHARED}")
        for task in self:
            task.places = named_tensors(f"representation[{task.key!r}]", values[task.row])
            task.copies = isinstance(representation, Copies)
        first, *others = self
        self.level_names = level_names(values[first.row])
        for task in others:
            names = level_names(values[task.row])
            if names != self.level_names:
                raise ValueError(
                    f"representation[{task.key!r}]: expected the levels of "
                    f"representation[{first.key!r}], {_shown(self.level_names)}; got "
                    f"{_shown(names)}"
                )

    def check_batch(
        self,
        present: Tensor | None,
        positions: Positions | None,
        channel_dim: int,
        *,
        csa: bool = False,
        group: str = "",
    ) -> None:
        """Take the masks, and raise if a batch is none that the losses are defined on.

        It is called on every step, so that a batch that the regulariser can't take doesn't pass
        for a while.

        Args:
            present: as the user gave it.
            positions: as the user gave them.
            channel_dim: dimension of the channels.
            csa: whether the batch has to be one for CSA.
            group: the name of the group whose other ranks may have samples; empty without.
        """
        masks = masks_of_levels(positions, self.level_names)
        places = self[0].places
        batch = places[0][1].shape[:1]
        for level, ((_, first), (name, mask)) in enumerate(zip(places, masks, strict=True)):
            names, tensors = zip(*(task.places[level] for task in self), strict=True)
            check_saliencies(tensors, channel_dim, "representation", names)
            if first.shape[:1] != batch:
                raise ValueError(
                    f"{names[0]}: expected the batch of {places[0][0]}, {batch[0]}; got "
                    f"{first.shape[0]}"
                )
            check_present(present, len(self.losses), first.shape[0], first.device)
            check_positions(mask, first, channel_dim, name)
            if csa:
                check_csa_batch(tensors, False, None, group, "representation")
        self.present, self.positions = present, [mask for _, mask in masks]

    def saliencies(self) -> list[Tensor]:
        """All saliencies that there are, level by level."""
        return [s for level in self._by_level() for s in level if s is not None]

    def drop_saliencies(self) -> None:
        """Forget the saliencies, and with them their memory and graph."""
        for task in self:
            task.saliencies = []

    def levels(self, saliencies: Sequence[Tensor]) -> list[Level]:
        """The parts of each level, without levels that only absent tasks depend on.

        Args:
            saliencies: tensors to put in place of :meth:`saliencies`, in the same order.
        """
        remaining = iter(saliencies)
        levels = []
        at_levels = zip(self._by_level(), self.positions, strict=True)
        for number, (at_level, positions) in enumerate(at_levels):
            dependent = [t for t, s in zip(self, at_level, strict=True) if s is not None]
            if not dependent:
                continue
            present = self.present
            if present is not None and len(dependent) < len(present):
                present = torch.stack([present[task.row] for task in dependent])
            own = [next(remaining) for _ in dependent]
            levels.append(Level(number, dependent, own, present, positions))
        return levels

    def _by_level(self) -> list[tuple[Tensor | None, ...]]:
        return list(zip(*(task.saliencies for task in self), strict=True))


def _shown(names: tuple[Hashable, ...] | None) -> str:
    return "one Tensor" if names is None else str(list(names))


def distinct(tasks: Iterable[Task]) -> list[Tensor]:
    """Return all representations of the tasks, each once."""
    return list({id(z): z for task in tasks for z in task.representations}.values())
