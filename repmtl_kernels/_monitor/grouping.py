"""Which tasks to train together, for a given number of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repmtl_kernels._ground.checks import check_int, check_plain
from repmtl_kernels._monitor.names import names_of
from repmtl_kernels._monitor.partitions import ranked, task_scores
from repmtl_kernels._monitor.summary import SaliencySummary, check_observed

if TYPE_CHECKING:
    from repmtl_kernels._monitor.partitions import Labels, Matrix

# Similarities of float32 that differ by so much of the largest one are equal.
ROUNDING = 1e-5


class Grouping(NamedTuple):
    """Groups of tasks, one network each, as :func:`group_tasks` finds them."""

    groups: tuple[tuple[str, ...], ...]
    """The names of each group's tasks."""
    score: float
    """The mean of ``task_scores``. A higher one is better, for other numbers of groups too."""
    task_scores: dict[str, float]
    """The sum of each task's affinities with the other tasks of its group; 0 where it is alone."""
    next_best: Grouping | None
    """The best other grouping with as many groups; None: there is no other."""

    def __str__(self) -> str:
        """Return the groups in one line, the score, and the next best ones in another line."""
        text = f"{self.score:+.4f}  " + " | ".join(", ".join(group) for group in self.groups)
        return text if self.next_best is None else f"{text}\n{self.next_best}"


def group_tasks(
    affinity: Tensor | SaliencySummary, groups: int, *, names: Sequence[str] | None = None
) -> Grouping:
    """Return which tasks to train together in so many networks.

    A task's score is the sum of its affinities with the other tasks of its group, and the score of
    a grouping is the mean over all tasks. All of it can be checked by hand, and higher is better. A
    step on the sum of a group's losses adds up what each of them does to a task, and so does the
    score. A task that is alone has 0: nothing helps it and nothing disturbs it.

    Scores of different numbers of groups can be compared. If ``group_tasks(affinity, 1)`` has the
    higher one, the tasks help each other so much that one network is expected to be better. With
    affinities above 0 alone that is always so: the best groups then keep as many tasks together as
    possible, and leave out those that lose least by it.

    With at most 12 tasks, the result is the best of all groupings, and ``next_best`` the second.
    With more it is the best of four clusterings by scikit-learn (hierarchical with three linkages,
    and spectral), after steps that move one task to another group, or exchange two, for as long as
    the score rises. A better grouping may exist then. ``next_best`` is the best other one that the
    search came by, and at least as good as all that are one step away. Between groupings of one
    score, the one that keeps the earlier tasks together is the better one.

    Whether tasks with higher affinity gain more from each other has to be measured for each kind
    of data: docs/grouping.md has a study. The question is that of Fifty et al. (2021, arXiv
    2109.04617). Their affinity is the change of one task's loss after a step for another, and their
    score has the mean over the group where this one has the sum. Sherif et al. (STG-MTL, 2023,
    arXiv 2307.03374) cluster what tasks look like in training.

    Args:
        affinity: similarities ``(T, T)``, above 0 where two tasks help each other and below 0
            where they conflict, e.g. ``SaliencySummary.cosine``, or the summary itself. The
            diagonal is not used. Or products ``(B, T, T)``, as :func:`saliency_affinity` returns
            them: they become cosines, ``p[b, t, u] / sqrt(p[b, t, t] * p[b, u, u])``, and the
            mean over the samples where neither of the two norms is 0.
        groups: how many networks there are, from 1 to T. None of them is empty.
        names: of the T tasks, all different. Default: those of the summary, or "0", "1", ....

    Returns:
        A :class:`Grouping`. Tasks and groups are in the order of the tasks.

    Raises:
        ValueError, TypeError: an argument is not as described. An affinity is not symmetric, or
            NaN or infinite: the message names the two tasks.
        ModuleNotFoundError: there are more than 12 tasks, and scikit-learn is not installed. It
            comes with the extra ``grouping``.
    """
    if isinstance(affinity, SaliencySummary):
        check_observed(affinity)
        names = affinity.tasks if names is None else names
        affinity = affinity.cosine
    similarities = _similarities(affinity)
    tasks = len(similarities)
    names = names_of(tasks, names)
    symmetric = _checked(similarities, names)
    check_int("groups", groups, minimum=1)
    if groups > tasks:
        raise ValueError(f"groups: expected at most {tasks}, one for each task; got {groups}")
    first, *others = ranked(symmetric, groups)
    next_best = _named(symmetric, names, others[0], None) if others else None
    return _named(symmetric, names, first, next_best)


def _similarities(affinity: object) -> Tensor:
    """Return ``(T, T)``, float64 on the CPU."""
    if not isinstance(affinity, Tensor):
        raise TypeError(
            f"affinity: expected a Tensor or a SaliencySummary, got {type(affinity).__name__}"
        )
    check_plain("affinity", affinity)
    shape = tuple(affinity.shape)
    if affinity.ndim not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(f"affinity: expected (T, T) or (B, T, T), not empty; got {shape}")
    if affinity.is_complex() or affinity.dtype == torch.bool:
        raise TypeError(f"affinity: expected real numbers, got {affinity.dtype}")
    values = affinity.detach().to("cpu", torch.float64)
    return values if values.ndim == 2 else mean_cosines(values)


def mean_cosines(products: Tensor) -> Tensor:
    """Return the mean cosine ``(T, T)`` of products ``(B, T, T)``; NaN where no sample has one."""
    squares = products.diagonal(dim1=1, dim2=2)
    if (squares < 0).any():
        raise ValueError("affinity: expected squared norms on the diagonals, got some below 0")
    norms = squares.sqrt()
    # Not norms > 0, which would hide NaN.
    there = norms != 0
    pairs = there.unsqueeze(1) & there.unsqueeze(2)
    cosines = products / norms.unsqueeze(1) / norms.unsqueeze(2)
    return torch.where(pairs, cosines, 0.0).sum(0) / pairs.sum(0)


def _checked(similarities: Tensor, names: Sequence[str]) -> Matrix:
    """Return a symmetric copy with a diagonal of 0, or name a pair that is at fault."""
    a = similarities.numpy().copy()
    np.fill_diagonal(a, 0.0)
    for t, u in np.argwhere(~np.isfinite(a)):
        raise ValueError(
            f"affinity: expected finite numbers, got {a[t, u]} for {names[t]} and {names[u]}"
        )
    for t, u in np.argwhere(np.abs(a - a.T) > ROUNDING * np.abs(a).max()):
        raise ValueError(
            f"affinity: expected a symmetric matrix, got {a[t, u]:g} for {names[t]} and {names[u]} "
            f"and {a[u, t]:g} for {names[u]} and {names[t]}"
        )
    return (a + a.T) / 2


def _named(a: Matrix, names: Sequence[str], labels: Labels, next_best: Grouping | None) -> Grouping:
    (scores,) = task_scores(a, np.array([labels])).tolist()
    groups = tuple(
        tuple(name for name, label in zip(names, labels, strict=True) if label == group)
        for group in range(max(labels) + 1)
    )
    return Grouping(
        groups, math.fsum(scores) / len(scores), dict(zip(names, scores, strict=True)), next_best
    )
