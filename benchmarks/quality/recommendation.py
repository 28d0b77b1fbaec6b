"""AUC of a ranker by task: ``python -m benchmarks.quality.recommendation``. See ``--help``.

Network, logs and training are those of ``examples/recommendation.py``, with more criteria.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks import ceilings, results
from benchmarks.machine import ROOT, describe, slug
from benchmarks.output import groups, markdown, say
from benchmarks.quality.tables import interval
from repmtl_kernels import RepMTL

SEEDS = (10, 11, 12, 13, 14)
ROWS, BATCH, RATE = 150_000, 4096, 2e-2
# Chosen for equal weighting: epochs and weight decay.
TRAINING = {"artificial": (8, 1e-4), "MovieLens": (6, 3e-4)}
ITEMS, EQUAL = "rates of the items", "equal weighting"
CRITERIA: dict[str, Callable[[], RepMTL]] = {
    EQUAL: lambda: RepMTL(0.0, 0.0),
    "CSA alone, 0.01": lambda: RepMTL(lambda_tsr=0.0, strength=0.01, every=4),
    "CSA alone, 0.03": lambda: RepMTL(lambda_tsr=0.0, strength=0.03, every=4),
    "TSR alone, 0.03": lambda: RepMTL(lambda_csa=0.0, strength=0.03, every=4),
}


def rows_of(log: str, folder: Path | None, seed: int, *, rows: int = ROWS) -> list[dict]:
    """Train with every criterion; return the AUC of each task on the held-out rows."""
    if (examples := str(ROOT / "examples")) not in sys.path:
        sys.path.append(examples)
    from interactions import read
    from recommendation import rates_of_items, train

    epochs, decay = TRAINING[log]
    options = argparse.Namespace(batch=BATCH, lr=RATE, epochs=epochs, decay=decay)
    data = read(folder, rows, seed)
    found = {ITEMS: rates_of_items(data)}
    for name, criterion in CRITERIA.items():
        found[name] = train(data, criterion(), name, seed, options)
    return [
        {
            "log": log,
            "seed": seed,
            "criterion": name,
            "auc": dict(zip(data.tasks, auc, strict=True)),
        }
        for name, auc in found.items()
    ]


def table(rows: list[dict]) -> str:
    """Return a line for each log and criterion: AUC by task, and the gain on equal weighting."""
    lines = []
    for (log, criterion), some in groups(rows, "log", "criterion").items():
        cells = [log, criterion]
        for task in some[0]["auc"]:
            values = [row["auc"][task] for row in some]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{task} {fmean(values):.4f}{spread}")
        gains = "" if criterion in (ITEMS, EQUAL) else str(interval(_gains(rows, some)))
        lines.append([*cells, gains])
    more = [""] * (len(lines[0]) - 4)  # a column for each task
    return markdown(("log", "criterion", "AUC", *more, "Delta, points"), lines)


def _gains(rows: list[dict], some: list[dict]) -> list[float]:
    """Return by how many points the mean AUC is above equal weighting's of the same seed."""
    base = {(row["log"], row["seed"]): row for row in rows if row["criterion"] == EQUAL}
    return [
        100 * (fmean(row["auc"].values()) - fmean(base[row["log"], row["seed"]]["auc"].values()))
        for row in some
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.recommendation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--movielens", type=Path, help="a folder with ratings.csv and movies.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rows", type=int, default=ROWS, help="of the artificial log")
    parser.add_argument("--out", type=Path, help="the folder of the result file")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    head = describe(device, ceilings.of(device))
    logs = {"artificial": None, "MovieLens": options.movielens}
    rows = [
        row
        for log, folder in logs.items()
        if log == "artificial" or folder is not None
        for seed in options.seeds
        for row in rows_of(log, folder, seed, rows=options.rows)
    ]
    folder = options.out or results.RESULTS / slug(device)
    training = {"batch": BATCH, "lr": RATE, "epochs and decay": TRAINING}
    path = results.save(
        folder, "quality_recommendation", head, rows,
        training=training, seeds=options.seeds, notes=[],
    )  # fmt: skip
    say(f"\n{table(rows)}\n{path}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
