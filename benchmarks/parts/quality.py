"""Training quality: a short training on MultiMNIST, and the tables of all studies."""

from __future__ import annotations

import os
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.output import captioned, groups, markdown, say
from benchmarks.part import Part, Run
from benchmarks.quality import config, recommendation, tables
from benchmarks.quality import grouping_table as grouping
from benchmarks.quality.studies import run_study


def measure(run: Run) -> None:
    missing = [name for name in ("mlxtend", "torchjd") if find_spec(name) is None]
    if missing or run.folder is None:
        say(f"  left out: {', '.join(missing)} not installed")
        return
    study = config.study(config.find("bench"), seeds=[0] if run.quick else None)
    with tempfile.TemporaryDirectory(prefix="repmtl-quality-") as work:
        where = {"folder": None, "work": Path(work), "device": run.device.type}
        run_study(study, run.head, run.folder, jobs=min(4, os.cpu_count() or 1), **where)


def accuracy_table(result: dict) -> str:
    """Return each task's test accuracy by method, mean and standard deviation over seeds."""
    tasks = list(result["rows"][0]["metrics"])
    lines = []
    for (method,), rows in groups(result["rows"], "method").items():
        cells = [method]
        for task in tasks:
            values = [row["metrics"][task]["accuracy"] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f} %{spread}")
        lines.append(cells)
    (settings,) = result["datasets"].values()
    text = (
        f"MultiMNIST, {settings['training']['steps']} steps of {settings['training']['batch']} "
        f"images, {len(result['seeds'])} seeds (mean and standard deviation), test accuracy."
    )
    return captioned(markdown(["method", *tasks], lines), result, text)


def study_table(result: dict) -> str:
    """Return `Delta_p` of every method and data set, to each base."""
    return _of_seeds(tables.by_base(result["rows"]), result)


def study_summary(result: dict) -> str:
    """Return `Delta_p` to equal weighting alone."""
    return _of_seeds(tables.to_equal(result["rows"]), result)


def _of_seeds(table: str, result: dict) -> str:
    text = (
        f"Per cent, mean over tasks; mean and 95 % interval over {len(result['seeds'])} seeds. A "
        "seed's run is compared with the base's run of that seed."
    )
    return captioned(table, result, text)


def grouping_table(result: dict) -> str:
    """Return what networks for groups of tasks gain over one network."""
    text = (
        "Δp is to one network for all tasks, mean over tasks; mean and 95 % interval over "
        f"{len(result['seeds'])} seeds. The last column is Spearman's correlation of score and Δp "
        "over the groups of one seed and one network for all tasks."
    )
    return captioned(grouping.table(result["rows"]), result, text)


def recommendation_table(result: dict) -> str:
    """Return the AUC of a ranker's tasks by criterion."""
    text = (
        "AUC on the last rows of each user, mean and standard deviation over "
        f"{len(result['seeds'])} seeds, which draw the artificial log, the films not seen, and the "
        "weights. Delta is the mean AUC of the tasks minus that of equal weighting with the same "
        "seed: mean and 95 % interval. The rates of the items, a score that knows no user, are "
        f"those of the training part. Batches of {result['training']['batch']:,} in bfloat16."
    )
    return captioned(recommendation.table(result["rows"]), result, text)


PART = Part(
    "quality",
    "QUALITY: MultiMNIST, every method from the same weights on the same batches",
    measure,
    share=0.2,
    on=("cpu", "cuda"),
)
BENCH = Part("quality_bench", tables={"accuracy": accuracy_table})
GROUPING = Part("quality_grouping", tables={"grouping": grouping_table})
RECOMMENDATION = Part("quality_recommendation", tables={"recommendation": recommendation_table})
