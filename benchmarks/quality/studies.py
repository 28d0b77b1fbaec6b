"""A study from its file to results, table and pictures."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import results
from benchmarks.progress import say
from benchmarks.quality import config, loaders, pictures, tables, training
from benchmarks.quality.jobs import run_all


def run_study(
    study: config.Study,
    head: dict,
    *,
    folder: Path | None,
    out: Path,
    work: Path,
    jobs: int,
    saliency: bool = False,
    **options,
) -> None:
    """Trains what is not in ``work`` yet; writes ``quality_<study>``, .json and .svg.

    head: the head of the result file; out: the folder of results; saliency: also pictures of
    saliencies, into ``work``; options: of :func:`benchmarks.quality.training.execute`.
    """
    began = time.monotonic()
    # Loading now tells of a missing file before hours of training.
    tasks = {
        label: loaders.load(folder=folder, seed=study.seeds[0], **settings["data"]).names
        for label, settings in study.datasets.items()
    }
    runs = study.runs(tasks)
    say(f"{study.name}: {len(runs)} runs, {jobs} at a time")
    records = run_all(
        runs, folder, work, jobs=jobs, spectra=study.spectra, keep_network=saliency, **options
    )
    rows = tables.rows(study, runs, records)
    what = f"quality_{study.name}"
    settings = {"datasets": study.datasets, "seeds": study.seeds}
    results.save(out, what, head, rows, notes=[], **settings)
    text = tables.markdown(tables.picked(tables.lines(rows), study), len(study.seeds))
    pictures.draw(out, what)
    if saliency:
        picture_saliencies(study, runs, folder, work)
    used = sum(record["cpu_seconds"] for record in records.values())
    spent = time.monotonic() - began
    say(f"\n{text}\n{out / what}.json; {used:.0f} s of training, {spent:.0f} s")


def picture_saliencies(
    study: config.Study, runs: list[config.Run], folder: Path | None, work: Path
) -> None:
    for dataset in study.datasets:
        here = [r for r in runs if r.dataset == dataset and r.seed == study.seeds[0] and not r.task]
        data = training.prepare(here[0], folder) if here else None
        if data is None or data.multi_input:
            continue
        networks = {run.label: training.trained(run, data, work) for run in here}
        path = work / "saliency" / f"{study.name}_{dataset}.png"
        say(f"saliencies: {pictures.plot_saliency(networks, data, path)}")
