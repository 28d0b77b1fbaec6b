"""Which tasks to train together: ``python -m benchmarks.quality.grouping``. See ``--help``.

For each data set and seed, one network trains on all tasks, and the cosines of the tasks'
saliencies are taken in its first steps. :func:`repmtl_kernels.group_tasks` makes groups of them. A
network for each group is compared with the one network, with random groups of the same sizes, and
with the groups that the tasks were made in, where there are such.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from benchmarks import ceilings, results
from benchmarks.machine import describe, slug
from benchmarks.output import say
from benchmarks.quality import config, loaders
from benchmarks.quality.__main__ import add_places
from benchmarks.quality.config import EQUAL, Run
from benchmarks.quality.data import stream
from benchmarks.quality.grouping_table import ALL, FOUND, MADE, RANDOM, table
from benchmarks.quality.studies import run_all
from repmtl_kernels import group_tasks

SEEDS = (0, 1, 2, 3, 4)
# Cosines are taken on every fourth of the first half of the steps.
WATCHED = {"every": 4, "until_share": 0.5}
DRAWS = 5  # of random groups, for each seed

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Case:
    """A data set of the study.

    networks: how many networks there are.
    made: the groups that the tasks were made in; empty where nobody knows any.
    scored: the tasks that count; empty: all.
    """

    dataset: str
    networks: int
    made: Groups = ()
    scored: tuple[str, ...] = ()


DENSE = ("segmentation", "depth", "normals")
OF_DIGITS = tuple(
    tuple(f"{side}_{question}" for question in ("digit", "parity", "large"))
    for side in ("left", "right")
)
CASES = (
    Case("digits", 3, (*OF_DIGITS, ("permuted_digit", "permuted_parity")), sum(OF_DIGITS, ())),
    Case("doom_copies", 3, tuple((task, f"noisy_{task}") for task in DENSE), DENSE),
    Case("tox21", 3),
)


def together(case: Case, seed: int) -> Run:
    settings = config.of_dataset(config.find(case.dataset, "data"))
    return Run(case.dataset, ALL, ALL, "watched", WATCHED, seed, None, settings)


def alone(case: Case, seed: int, group: tuple[str, ...]) -> Run:
    """Return the run of one group's network: from the same weights, on the same batches."""
    task = group if len(group) > 1 else group[0]
    settings = config.of_dataset(config.find(case.dataset, "data"))
    return Run(case.dataset, " + ".join(group), "", EQUAL, {}, seed, task, settings)


def random_groups(names: Sequence[str], like: Groups, seed: int, count: int) -> list[Groups]:
    """Return different random groups with the sizes of ``like``, none of them equal to it."""
    generator = torch.Generator().manual_seed(stream(seed, "groups"))
    drawn: list[Groups] = []
    while len(drawn) < count:
        order = iter([names[k] for k in torch.randperm(len(names), generator=generator).tolist()])
        groups = ordered(names, [[next(order) for _ in group] for group in like])
        if groups not in (like, *drawn):
            drawn.append(groups)
    return drawn


def ordered(names: Sequence[str], groups: Iterable[Iterable[str]]) -> Groups:
    """Return groups and their tasks in the order of the names."""
    inside = [tuple(sorted(group, key=names.index)) for group in groups]
    return tuple(sorted(inside, key=lambda group: names.index(group[0])))


def score(cosine: Sequence[Sequence[float]], names: Sequence[str], groups: Groups) -> float:
    """Return the score that :func:`group_tasks` would give to these groups, written out."""
    of_tasks = []
    for group in groups:
        for task in group:
            others = [cosine[names.index(task)][names.index(u)] for u in group if u != task]
            of_tasks.append(sum(others))
    return fmean(of_tasks)


def candidates(case: Case, names: list[str], seed: int, cosine: list) -> list[tuple[str, Groups]]:
    """Return the groups to compare, each with what it is."""
    found = group_tasks(torch.tensor(cosine), case.networks, names=names).groups
    drawn = random_groups(names, found, seed, DRAWS)
    made = [(MADE, case.made)] if case.made else []
    return [(FOUND, found), *made, *((RANDOM, groups) for groups in drawn)]


def run_cases(
    cases: Sequence[Case], seeds: Sequence[int], *, folder: Path | None, jobs: int, **where: object
) -> list[dict]:
    """Train what is not in ``work`` yet; return a row for each data set, seed and grouping."""
    places = [(case, seed) for case in cases for seed in seeds]
    names = {
        case.dataset: loaders.load(folder=folder, seed=seeds[0], **run.settings["data"]).names
        for case in cases
        for run in [together(case, seeds[0])]
    }
    say(f"{len(places)} runs of all tasks together, {jobs} at a time")
    of_all = run_all([together(*place) for place in places], jobs, folder=folder, **where)
    compared = {}
    for case, seed in places:
        cosine = of_all[together(case, seed).key]["cosine"]
        compared[case, seed] = candidates(case, names[case.dataset], seed, cosine)
    runs = [
        alone(case, seed, group)
        for (case, seed), of_place in compared.items()
        for _, groups in of_place
        for group in groups
    ]
    say(f"{len({run.key for run in runs})} runs of groups, {jobs} at a time")
    of_groups = run_all(runs, jobs, folder=folder, **where)
    return [
        row
        for (case, seed), of_place in compared.items()
        for row in rows_of(case, seed, names[case.dataset], of_place, of_all, of_groups)
    ]


def rows_of(
    case: Case,
    seed: int,
    names: list[str],
    compared: list[tuple[str, Groups]],
    of_all: dict[str, dict],
    of_groups: dict[str, dict],
) -> list[dict]:
    """Return the rows of one data set and seed: first that of all tasks together."""
    base = of_all[together(case, seed).key]
    rows = []
    for what, groups in [(ALL, (tuple(names),)), *compared]:
        metrics = base["metrics"]
        if what != ALL:
            records = [of_groups[alone(case, seed, group).key] for group in groups]
            metrics = {task: m for record in records for task, m in record["metrics"].items()}
        rows.append({
            "dataset": case.dataset, "seed": seed, "networks": case.networks,
            "grouping": what, "groups": groups,
            "score": round(score(base["cosine"], names, groups), 5),
            "metrics": {task: metrics[task] for task in case.scored or names},
        })  # fmt: skip
    rows[0]["cosine"] = base["cosine"]
    return rows


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    names = [case.dataset for case in CASES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.grouping",
        description="Groups tasks by the cosines of their saliencies, and trains by these groups.",
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, help="data sets; default: all")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 to 4")
    add_places(parser)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    began = time.monotonic()
    head = describe(device, ceilings.of(device))
    out = options.out or results.RESULTS / slug(device)
    cases = [case for case in CASES if case.dataset in options.only]
    where = {"folder": loaders.data_folder(options.data), "work": options.work}
    rows = run_cases(cases, options.seeds, jobs=options.jobs, device=options.device, **where)
    settings = {case.dataset: together(case, 0).settings for case in cases}
    path = results.save(
        out, "quality_grouping", head, rows, datasets=settings, seeds=options.seeds, notes=[]
    )
    say(f"\n{table(rows)}\n{path}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
