"""The best partitions of the tasks into groups: all of them for few tasks, else by clusterings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    Integers = NDArray[np.int64]
    # The number of each task's group; groups are numbered by their first tasks.
    Labels = tuple[int, ...]

# Up to so many tasks all partitions are compared, in a second.
EXACT = 12
LINKAGES = ("average", "complete", "single")
# Scores that agree so far are equal: their terms were added in another order.
DIGITS = 12


def ranked(a: Matrix, groups: int) -> list[Labels]:
    """Return the labels of the best partition and, if there are others, of the next best one.

    If two partitions have one score, the better one has the smaller labels. With more than `EXACT`
    tasks, these are the best ones that were found.

    Args:
        a: similarities, symmetric, with a diagonal of 0.
        groups: how many; none is empty.
    """
    tasks = len(a)
    if groups in (1, tasks):
        return [tuple(range(tasks)) if groups == tasks else (0,) * tasks]
    a = a / (np.abs(a).max() or 1.0)  # which makes DIGITS relative
    return exact(a, groups) if tasks <= EXACT else clustered(a, groups)


def task_scores(a: Matrix, labels: Integers) -> Matrix:
    """Return the sum of each task's similarities with the others of its group.

    Args:
        a: as for :func:`ranked`.
        labels: of M partitions, ``(M, T)``. The result has the same shape.
    """
    members = labels[:, :, None] == np.arange(labels.max() + 1)
    with_group = a @ members
    return np.take_along_axis(with_group, labels[:, :, None], axis=2)[:, :, 0]


# --- few tasks ---


class Best(NamedTuple):
    """The two best partitions of each set of tasks into a number of groups.

    A set is a number, whose bits are its tasks: the first task has the highest bit.
    """

    values: Matrix  # (sets, 2): sums of the tasks' scores, -inf where there is no partition
    firsts: Integers  # (sets, 2): the group that has the first task
    ranks: Integers  # (sets, 2): which of the two best partitions the other tasks have


def exact(a: Matrix, groups: int) -> list[Labels]:
    """Return the two best of all partitions, by dynamic programming over the sets of tasks.

    The group that has the first task leaves a set for the other groups. The best partitions of all
    sets into fewer groups are known by then.
    """
    tasks = len(a)
    everything = (1 << tasks) - 1
    # All but the first group lie among the other tasks.
    subsets = _subsets_with_first(everything)
    values = _values(a)
    best = [_into_one(values)]
    for count in range(2, groups + 1):
        last = count == groups
        sets = [everything] if last else range(1, 1 << (tasks - 1))
        best.append(_into_more(values, best[-1], subsets, sets))
    found = []
    for rank in (0, 1):
        if np.isfinite(best[-1].values[everything, rank]):
            found.append(_labels(best, tasks, rank))
    return found


def _subsets_with_first(everything: int) -> list[Integers]:
    """Return for each set its subsets that have its first task, largest number first."""
    inside = [np.zeros(1, dtype=np.int64)]  # all subsets of each set
    with_first = [np.zeros(0, dtype=np.int64)]
    for tasks in range(1, everything + 1):
        first = 1 << (tasks.bit_length() - 1)
        without = inside[tasks ^ first]
        with_first.append(without | first)
        inside.append(np.concatenate([with_first[-1], without]))
    return with_first


def _values(a: Matrix) -> Matrix:
    """Return the sum of the tasks' scores for each set of tasks as a group."""
    tasks = len(a)
    bits = np.arange(tasks)[::-1]
    members = (np.arange(1 << tasks)[:, None] >> bits & 1).astype(np.float64)
    return ((members @ a) * members).sum(1)


def _into_one(values: Matrix) -> Best:
    sets = np.arange(len(values))
    none = np.full(len(values), -np.inf)
    return Best(
        np.stack([values, none], 1), np.stack([sets, sets], 1), np.zeros((len(sets), 2), int)
    )


def _into_more(values: Matrix, fewer: Best, subsets: list[Integers], sets: Iterable[int]) -> Best:
    """Return the best partitions of these sets into one group more."""
    best = Best(np.full_like(fewer.values, -np.inf), fewer.firsts.copy(), fewer.ranks.copy())
    for tasks in sets:
        firsts = subsets[tasks][1:]  # not all of them in the first group
        if len(firsts) == 0:
            continue
        sums = (values[firsts, None] + fewer.values[tasks ^ firsts]).ravel()
        compared = sums.round(DIGITS)
        for rank in (0, 1):
            place = compared.argmax()
            best.values[tasks, rank] = compared[place]
            best.firsts[tasks, rank], best.ranks[tasks, rank] = firsts[place // 2], place % 2
            compared[place] = -np.inf
    return best


def _labels(best: list[Best], tasks: int, rank: int) -> Labels:
    labels, left = np.zeros(tasks, dtype=np.int64), (1 << tasks) - 1
    for group, level in enumerate(reversed(best)):
        first = int(level.firsts[left, rank])
        for t in range(tasks):
            if first >> (tasks - 1 - t) & 1:
                labels[t] = group
        left, rank = left ^ first, int(level.ranks[left, rank])
    return numbered(labels)


# --- many tasks ---


def clustered(a: Matrix, groups: int) -> list[Labels]:
    """Return the two best partitions that several clusterings and steps from them come by.

    A step moves one task to another group, or exchanges two. The best partition is better than all
    that are one step away, and the next best one at least as good as the rest of these.
    """
    found = {_climbed(a, labels) for labels in _clusterings(a, groups)}
    (best,) = _sorted(a, found)[:1]
    found |= {numbered(labels) for labels in _steps(best)}
    return _sorted(a, found)[:2]


def _clusterings(a: Matrix, groups: int) -> Iterator[Labels]:
    try:
        from sklearn.cluster import AgglomerativeClustering, SpectralClustering
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"group_tasks: more than {EXACT} tasks need scikit-learn, which is not installed. It "
            'comes with the extra: pip install "repmtl-kernels[grouping]"'
        ) from missing
    for linkage in LINKAGES:
        # A linkage compares distances alone, whatever their zero.
        method = AgglomerativeClustering(groups, metric="precomputed", linkage=linkage)
        yield numbered(method.fit(1 - a).labels_)
    method = SpectralClustering(
        groups, affinity="precomputed", assign_labels="cluster_qr", random_state=0
    )
    labels = numbered(method.fit((1 + a) / 2).labels_)
    if max(labels) == groups - 1:  # it may leave a group empty
        yield labels


def _sorted(a: Matrix, found: set[Labels]) -> list[Labels]:
    candidates = sorted(found)
    scores = task_scores(a, np.array(candidates)).mean(1).round(DIGITS)
    return [candidates[k] for k in np.argsort(-scores, kind="stable")]


def _climbed(a: Matrix, labels: Labels) -> Labels:
    """Take the best step for as long as one raises the score."""
    while True:
        steps = _steps(labels)
        scores = task_scores(a, np.concatenate([[labels], steps])).mean(1).round(DIGITS)
        if (best := int(scores.argmax())) == 0:
            return labels
        labels = numbered(steps[best - 1])


def _steps(labels: Labels) -> Integers:
    """Return the labels ``(M, T)`` after each possible step."""
    start = np.array(labels)
    sizes = np.bincount(start)
    steps = []
    for t, group in enumerate(labels):
        if sizes[group] > 1:
            for other in set(labels) - {group}:
                steps.append(start.copy())
                steps[-1][t] = other
        for u in range(t + 1, len(labels)):
            if labels[u] != group:
                steps.append(start.copy())
                steps[-1][[t, u]] = labels[u], group
    return np.array(steps)


def numbered(labels: Iterable[int]) -> Labels:
    """Return labels that number the groups by their first tasks."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(int(label), len(numbers)) for label in labels)
