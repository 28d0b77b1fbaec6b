"""The table of the study of groups: what a network for each group gains over one for all tasks."""

from __future__ import annotations

from statistics import fmean

from benchmarks.output import groups as rows_by
from benchmarks.output import markdown
from benchmarks.quality.tables import delta_p, interval

# The kinds of groups that a row can have.
ALL, FOUND, MADE, RANDOM = "all together", "found", "made", "random"
HEADER = (
    "data", "networks", "found those made", "Δp of found groups, %", "of made groups",
    "of random groups", "of found to random groups", "rank correlation",
)  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return a line for each data set, with intervals over the seeds."""
    return markdown(HEADER, [_line(name, some) for name, some in _by(rows, "dataset").items()])


def _line(dataset: str, rows: list[dict]) -> list[str]:
    seeds = [_by(some, "grouping") for some in _by(rows, "seed").values()]
    cells = [dataset, str(rows[0]["networks"]), _times_found(seeds)]
    for what in (FOUND, MADE, RANDOM):
        gains = [_gain(here[what], here[ALL]) for here in seeds if what in here]
        cells.append(str(interval(gains)) if gains else "")
    to_random = [_gain(here[FOUND], here[RANDOM]) for here in seeds]
    correlations = [rank_correlation(here) for here in seeds]
    return [*cells, str(interval(to_random)), str(interval(correlations))]


def _by(rows: list[dict], key: str) -> dict[str, list[dict]]:
    return {value: some for (value,), some in rows_by(rows, key).items()}


def _gain(rows: list[dict], bases: list[dict]) -> float:
    """Return the mean `Delta_p` of the rows to each of the bases."""
    return fmean(delta_p(row["metrics"], base["metrics"])["mean"] for row in rows for base in bases)


def _times_found(seeds: list[dict[str, list[dict]]]) -> str:
    pairs = [(here[FOUND][0], here[MADE][0]) for here in seeds if MADE in here]
    same = sum(found["groups"] == made["groups"] for found, made in pairs)
    return f"{same} of {len(pairs)}" if pairs else ""


def rank_correlation(here: dict[str, list[dict]]) -> float:
    """Return Spearman's correlation of score and `Delta_p` over a seed's different groups.

    One network for all tasks is among them, with a `Delta_p` of 0.
    """
    from scipy.stats import spearmanr

    different = {str(row["groups"]): row for what in here for row in here[what]}.values()
    gains = [_gain([row], here[ALL]) for row in different]
    return float(spearmanr([row["score"] for row in different], gains).statistic)
