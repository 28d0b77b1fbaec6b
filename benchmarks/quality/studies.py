"""A study from its file to results and table; many independent runs, one thread each."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.output import say
from benchmarks.quality import config, loaders, tables, training
from benchmarks.quality.config import Run


def run_study(
    study: config.Study, head: dict, out: Path, *, folder: Path | None, jobs: int, **where: object
) -> None:
    """Train what is not in ``work`` yet and write ``quality_<study>.json`` into ``out``."""
    began = time.monotonic()
    # Loading now reports a missing file before hours of training.
    tasks = {
        label: loaders.load(folder=folder, seed=study.seeds[0], **settings["data"]).names
        for label, settings in study.datasets.items()
    }
    runs = study.runs(tasks)
    say(f"{study.name}: {len(runs)} runs, {jobs} at a time")
    records = run_all(runs, jobs, study.spectra, folder=folder, **where)
    rows = tables.rows(study, runs, records)
    what = f"quality_{study.name}"
    settings = {"datasets": study.datasets, "seeds": study.seeds}
    results.save(out, what, head, rows, notes=[], **settings)
    say(f"\n{tables.by_base(rows)}\n{out / what}.json; {time.monotonic() - began:.0f} s")


def run_all(runs: list[Run], jobs: int, spectra: bool = False, **where: object) -> dict[str, dict]:
    """Return the records of all runs by their keys; ``where``: folder, work and device."""
    # The encoders that several runs start from come first, once each.
    firsts = {run.pretraining_key: run for run in runs if run.pretraining_key}
    for _ in _each(partial(training.start_of, **where), list(firsts.values()), jobs):
        pass
    one = partial(training.execute, **where, spectra=spectra)
    records = {}
    for run, record in _each(one, list({run.key: run for run in runs}.values()), jobs):
        records[run.key] = record
        say(f"{record['cpu_seconds']:6.1f} s  {run}")
    return records


def _each(call: Callable, runs: list[Run], jobs: int) -> Iterator[tuple[Run, dict]]:
    if jobs == 1:
        yield from ((run, call(run)) for run in runs)
        return
    # Not forked: a child of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(call, run): run for run in runs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:  # where one run fails, those that have not begun would only delay the message
            pool.shutdown(wait=False, cancel_futures=True)
