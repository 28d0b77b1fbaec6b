"""Groups of tasks: the score written out, and all groupings of a few tasks."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from repmtl_kernels import (
    Grouping,
    SaliencyMonitor,
    group_tasks,
    saliency_affinity,
    task_saliencies,
)
from repmtl_kernels._monitor.partitions import clustered, exact, ranked

sklearn_cluster = pytest.importorskip("sklearn.cluster")

Groups = tuple[tuple[str, ...], ...]


def symmetric(tasks: int, seed: int, blocks: int = 0) -> Tensor:
    """Return random similarities; higher ones in so many blocks of tasks."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.rand(tasks, tasks, generator=generator, dtype=torch.float64) - 1
    values = (values + values.T) / 2
    if blocks:
        block = torch.arange(tasks) % blocks
        values = 0.3 * values + 0.6 * (block == block.unsqueeze(1))
    return values


def partitions(tasks: int, groups: int) -> Iterator[Groups]:
    """Yield all partitions of the tasks "0", "1", ... into so many groups."""
    for labels in itertools.product(range(groups), repeat=tasks):
        first = list(dict.fromkeys(labels))
        if first == list(range(groups)):
            yield grouped(labels)


def grouped(labels) -> Groups:
    """Return the tasks by their labels, in the order of the tasks."""
    return tuple(
        tuple(str(t) for t, label in enumerate(labels) if label == group)
        for group in dict.fromkeys(labels)
    )


def scored(affinity: Tensor, groups: Groups) -> dict[str, float]:
    """Return the score of each task, written out."""
    scores = {}
    for group in groups:
        for task in group:
            others = [float(affinity[int(task), int(u)]) for u in group if u != task]
            scores[task] = sum(others)
    return scores


def total(affinity: Tensor, groups: Groups) -> float:
    scores = scored(affinity, groups)
    return sum(scores.values()) / len(scores)


def test_four_tasks_by_hand():
    """Depth and normals agree, and so do the two segmentations, less."""
    affinity = torch.tensor(
        [
            [1.0, 0.8, -0.1, 0.0],
            [0.8, 1.0, 0.1, -0.3],
            [-0.1, 0.1, 1.0, 0.4],
            [0.0, -0.3, 0.4, 1.0],
        ]
    )
    found = group_tasks(affinity, 2, names=["depth", "normals", "parts", "objects"])
    assert found.groups == (("depth", "normals"), ("parts", "objects"))
    assert found.score == pytest.approx((0.8 + 0.8 + 0.4 + 0.4) / 4)
    scores = {"depth": 0.8, "normals": 0.8, "parts": 0.4, "objects": 0.4}
    assert found.task_scores == pytest.approx(scores)
    # Depth has 0.7, normals 0.9, parts 0, and objects are alone.
    assert found.next_best.groups == (("depth", "normals", "parts"), ("objects",))
    assert found.next_best.score == pytest.approx((0.7 + 0.9 + 0.0 + 0.0) / 4)
    assert found.next_best.next_best is None
    assert str(found).splitlines() == [
        "+0.6000  depth, normals | parts, objects",
        "+0.4000  depth, normals, parts | objects",
    ]


@pytest.mark.parametrize("blocks", [0, 2, 3])
@pytest.mark.parametrize("tasks", [3, 5, 6])
def test_against_all_groupings(tasks, blocks):
    """The best of all groupings is the one that was found, and the next best is the second."""
    for seed, groups in itertools.product(range(6), range(1, tasks + 1)):
        affinity = symmetric(tasks, seed, blocks)
        every = sorted(partitions(tasks, groups), key=lambda g: -total(affinity, g))
        found = group_tasks(affinity, groups)
        assert found.groups == every[0]
        assert found.score == pytest.approx(total(affinity, every[0]), abs=1e-12)
        assert found.task_scores == pytest.approx(scored(affinity, every[0]), abs=1e-12)
        if len(every) == 1:
            assert found.next_best is None
        else:
            assert found.next_best.groups == every[1]
            assert found.next_best.score == pytest.approx(total(affinity, every[1]), abs=1e-12)


def test_twelve_tasks_have_the_best_groups_of_a_random_search():
    """The last number of tasks with an exact result: no exchange of any three improves it."""
    affinity = symmetric(12, 0, blocks=5)
    found = group_tasks(affinity, 4)
    labels = labels_of(found.groups)
    for chosen in itertools.combinations(range(12), 3):
        for new in itertools.product(range(4), repeat=3):
            changed = list(labels)
            for t, label in zip(chosen, new, strict=True):
                changed[t] = label
            groups = grouped(changed)
            if len(groups) == 4 and groups != found.groups:
                assert total(affinity, groups) <= found.next_best.score + 1e-12


@pytest.mark.parametrize("tasks, groups, blocks", [(13, 3, 0), (14, 5, 0), (15, 3, 3)])
def test_many_tasks(tasks, groups, blocks):
    """The result is no worse than a clustering, and the next best than a step from the result."""
    for seed in range(3):
        affinity = symmetric(tasks, seed, blocks)
        found = group_tasks(affinity, groups)
        assert found.score == pytest.approx(total(affinity, found.groups), abs=1e-12)
        if blocks:
            assert found.groups == grouped([t % blocks for t in range(tasks)])
        for linkage in ("average", "complete", "single"):
            method = sklearn_cluster.AgglomerativeClustering(
                groups, metric="precomputed", linkage=linkage
            )
            labels = method.fit(1 - affinity.numpy()).labels_.tolist()
            assert total(affinity, grouped(labels)) <= found.score + 1e-12
        labels = labels_of(found.groups)
        steps = [
            [*labels[:t], other, *labels[t + 1 :]] for t in range(tasks) for other in range(groups)
        ]
        for t, u in itertools.combinations(range(tasks), 2):
            steps.append(list(labels))
            steps[-1][t], steps[-1][u] = labels[u], labels[t]
        others = {grouped(step) for step in steps if len(set(step)) == groups} - {found.groups}
        best = max(total(affinity, groups) for groups in others)
        assert best <= found.next_best.score + 1e-12 <= found.score + 1e-12


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_equal_scores_give_the_groups_of_the_earlier_tasks(groups, seed):
    """Which of two equal tasks is in which group changes a score by its rounding alone."""
    affinity = symmetric(3, seed).repeat(2, 2)
    affinity.fill_diagonal_(0.0)
    scores = {g: total(affinity, g) for g in partitions(6, groups)}
    best = [g for g, score in scores.items() if score > max(scores.values()) - 1e-9]
    assert group_tasks(affinity, groups).groups == min(best, key=labels_of)


def labels_of(groups: Groups) -> list[int]:
    of_task = {task: k for k, group in enumerate(groups) for task in group}
    return [of_task[str(t)] for t in range(len(of_task))]


def test_the_order_of_the_tasks_does_not_matter_but_for_equal_scores():
    affinity = symmetric(7, 0)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    names = [str(int(t)) for t in order]
    found = group_tasks(affinity[order][:, order], 3, names=names)
    expected = group_tasks(affinity, 3)
    assert {frozenset(g) for g in found.groups} == {frozenset(g) for g in expected.groups}
    assert found.score == pytest.approx(expected.score)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e9])
def test_any_unit(scale):
    found, expected = group_tasks(scale * symmetric(6, 2), 3), group_tasks(symmetric(6, 2), 3)
    assert found.groups == expected.groups and found.next_best.groups == expected.next_best.groups
    assert found.score == pytest.approx(scale * expected.score)


def test_the_only_groupings():
    assert group_tasks(torch.eye(1), 1) == Grouping((("0",),), 0.0, {"0": 0.0}, None)
    affinity = symmetric(3, 0)
    alone = group_tasks(affinity, 3)
    assert alone == Grouping((("0",), ("1",), ("2",)), 0.0, dict.fromkeys("012", 0.0), None)
    together = group_tasks(affinity, 1)
    pairs = [float(affinity[t, u]) for t, u in ((0, 1), (0, 2), (1, 2))]
    assert together.score == pytest.approx(2 * sum(pairs) / 3)
    assert together.groups == (("0", "1", "2"),) and together.next_best is None


def test_tasks_that_all_help_each_other_stay_together():
    """Depth helps the others least, and one network has the higher score."""
    affinity = torch.full((4, 4), 0.5)
    affinity[1] = affinity[:, 1] = 0.1
    two, one = (group_tasks(affinity, groups) for groups in (2, 1))
    assert two.groups == (("0", "2", "3"), ("1",)) and two.score == pytest.approx(3 * 1.0 / 4)
    assert one.score == pytest.approx((3 * 1.1 + 0.3) / 4) and one.score > two.score


def test_a_task_in_conflict_with_all_others_is_alone():
    affinity = torch.full((4, 4), 0.5)
    affinity[2] = affinity[:, 2] = -0.5
    assert group_tasks(affinity, 2).groups == (("0", "1", "3"), ("2",))


def test_products_become_cosines():
    """The mean is over samples where both saliencies have a norm, for each pair by itself."""
    torch.manual_seed(0)
    saliencies = [torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    with torch.no_grad():
        saliencies[1] += saliencies[0]
        saliencies[3][:] = -saliencies[2] + 0.1 * saliencies[3]
        saliencies[0][1] = saliencies[2][1] = saliencies[2][3] = 0
    cosine = torch.ones(4, 4, dtype=torch.float64)
    for t, u in itertools.permutations(range(4), 2):
        values = [
            torch.dot(x.flatten(), y.flatten()) / x.norm() / y.norm()
            for x, y in zip(saliencies[t], saliencies[u], strict=True)
            if x.norm() > 0 and y.norm() > 0
        ]
        cosine[t, u] = torch.stack(values).mean()
    products = saliency_affinity(saliencies)
    kept = products.detach().clone()
    found, expected = group_tasks(products, 2), group_tasks(cosine.detach(), 2)
    assert found.groups == expected.groups
    assert found.task_scores == pytest.approx(expected.task_scores, rel=1e-12)
    assert torch.equal(products.detach(), kept)
    # The product of two squared norms of 1e-200 would be 0.
    tiny = group_tasks(1e-200 * products, 2)
    assert tiny.task_scores == pytest.approx(expected.task_scores, rel=1e-12)


def test_what_a_monitor_has_seen():
    """One observation is the mean over its samples, and the tasks have the monitor's names."""
    torch.manual_seed(0)
    z = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(z)
    losses = [(z * ((-1) ** k * direction + torch.randn_like(z))).sum() for k in range(4)]
    tasks = ("depth", "edges", "normals", "parts")
    monitor = SaliencyMonitor(names=tasks)
    with pytest.raises(ValueError, match="summary: expected at least one observation, got none"):
        group_tasks(monitor.summary(), 2)
    with pytest.raises(ValueError, match="got nan for depth and edges"):
        monitor(losses, z, present=torch.zeros(4, 4, dtype=torch.bool))
        group_tasks(monitor.summary(), 2)
    monitor = SaliencyMonitor(names=tasks)
    monitor(losses, z)
    found = group_tasks(monitor.summary(), 2)
    assert found.groups == (("depth", "normals"), ("edges", "parts"))
    products = saliency_affinity(task_saliencies(losses, z))
    expected = group_tasks(products, 2, names=tasks)
    assert found.groups == expected.groups
    assert found.task_scores == pytest.approx(expected.task_scores)
    renamed = group_tasks(monitor.summary(), 2, names=["a", "b", "c", "d"])
    assert renamed.groups == (("a", "c"), ("b", "d"))


def test_float32_of_a_symmetric_matrix_is_symmetric_enough():
    affinity = symmetric(5, 0).float()
    affinity[0, 1] *= 1 + 1e-6
    assert group_tasks(affinity, 2).groups == group_tasks(symmetric(5, 0), 2).groups


def broken(value: float, *where: tuple[int, int]) -> Tensor:
    affinity = symmetric(3, 0)
    for place in where:
        affinity[place] = value
    return affinity


NAN_PRODUCTS = torch.eye(3).repeat(2, 1, 1)
NAN_PRODUCTS[1, 0, 2] = NAN_PRODUCTS[1, 2, 0] = math.nan
NAN_SAMPLE = torch.eye(3).repeat(2, 1, 1)
NAN_SAMPLE[1, 2] = NAN_SAMPLE[1, :, 2] = math.nan
NEVER = torch.zeros(2, 2, 2)
NEVER[0, 0, 0] = NEVER[1, 1, 1] = 1.0


@pytest.mark.parametrize(
    ("affinity", "names", "message"),
    [
        (broken(math.nan, (0, 2), (2, 0)), "abc", "finite numbers, got nan for a and c"),
        (broken(-math.inf, (1, 2), (2, 1)), None, "finite numbers, got -inf for 1 and 2"),
        (broken(5.0, (0, 1)), "abc", r"symmetric matrix, got 5 for a and b and .* for b and a"),
        (NAN_PRODUCTS, "abc", "finite numbers, got nan for a and c"),
        (NAN_SAMPLE, "abc", "finite numbers, got nan for a and c"),
        (NEVER, "ab", "finite numbers, got nan for a and b"),
        (-torch.eye(2).repeat(2, 1, 1), "ab", "squared norms on the diagonals, got some below 0"),
        (torch.zeros(2, 3), None, r"\(T, T\) or \(B, T, T\), not empty; got \(2, 3\)"),
        (torch.zeros(3), None, r"got \(3,\)"),
        (torch.zeros(0, 3, 3), None, r"got \(0, 3, 3\)"),
    ],
)
def test_affinities_that_cannot_be(affinity, names, message):
    with pytest.raises(ValueError, match=f"^affinity: expected {'.*' if 'got' in message else ''}"):
        group_tasks(affinity, 1, names=names and list(names))
    with pytest.raises(ValueError, match=message):
        group_tasks(affinity, 1, names=names and list(names))


def test_the_diagonal_is_not_used():
    affinity = symmetric(4, 3)
    expected = group_tasks(affinity, 2)
    affinity.fill_diagonal_(math.nan)
    assert group_tasks(affinity, 2) == expected


@pytest.mark.parametrize(
    ("error", "message", "groups", "names"),
    [
        (ValueError, "groups: expected an int of at least 1; got 0", 0, None),
        (ValueError, "groups: expected at most 3, one for each task; got 4", 4, None),
        (TypeError, "groups: expected an int, got float", 2.0, None),
        (TypeError, "names: expected a sequence of str or None, got str", 2, "abc"),
        (TypeError, "names: expected a sequence of str or None, got int", 2, 3),
        (TypeError, r"names\[0\]: expected a str, got int", 2, [1, 2, 3]),
        (ValueError, "names: expected 3, one for each task; got ", 2, ["a", "b"]),
        (ValueError, "names: expected different names, got 'a' twice", 2, ["a", "b", "a"]),
    ],
)
def test_other_arguments_that_cannot_be(error, message, groups, names):
    with pytest.raises(error, match=message):
        group_tasks(symmetric(3, 0), groups, names=names)


@pytest.mark.parametrize(
    ("affinity", "message"),
    [
        ([[1.0]], "expected a Tensor or a SaliencySummary, got list"),
        (torch.eye(2, dtype=torch.complex64), "expected real numbers, got torch.complex64"),
        (torch.eye(2, dtype=torch.bool), "expected real numbers, got torch.bool"),
    ],
)
def test_no_affinities(affinity, message):
    with pytest.raises(TypeError, match=f"affinity: {message}"):
        group_tasks(affinity, 1)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert group_tasks(symmetric(12, 0), 12).next_best is None
    assert len(group_tasks(symmetric(5, 0), 2).groups) == 2
    with pytest.raises(ModuleNotFoundError, match=r"than 12 tasks .*repmtl-kernels\[grouping\]"):
        group_tasks(symmetric(13, 0), 2)


def test_how_often_a_clustering_is_the_best_grouping():
    """The reason for the search: of 24 matrices of 12 tasks, average linkage solves 10."""
    clusterings = steps = 0
    for seed, blocks in itertools.product(range(8), (0, 2, 3)):
        affinity = symmetric(12, seed, blocks).fill_diagonal_(0.0)
        method = sklearn_cluster.AgglomerativeClustering(3, metric="precomputed", linkage="average")
        labels = method.fit(1 - affinity.numpy()).labels_.tolist()
        best = total(affinity, grouped(ranked(affinity.numpy(), 3)[0]))
        near = total(affinity, grouped(clustered(affinity.numpy(), 3)[0]))
        clusterings += total(affinity, grouped(labels)) > best - 1e-9
        steps += near > best - 1e-9
    assert clusterings <= 12 and steps >= 22


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_clusterings_are_below_the_optimum_and_reach_it_where_there_are_blocks(groups):
    for seed in range(5):
        for blocks in (0, groups):
            affinity = symmetric(7, seed, blocks).fill_diagonal_(0.0)
            best, *_ = (total(affinity, grouped(x)) for x in exact(affinity.numpy(), groups))
            near, next_one = (
                total(affinity, grouped(x)) for x in clustered(affinity.numpy(), groups)
            )
            assert next_one <= near <= best + 1e-12
            assert not blocks or near == pytest.approx(best)
