"""A study from its file to results and table; many independent runs, one thread each."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.output import say, track
from benchmarks.quality import config, loaders, tables, training
from benchmarks.quality.config import Run


def run_study(
    study: config.Study,
    head: dict,
    *,
    folder: Path | None,
    out: Path,
    work: Path,
    jobs: int,
    device: str,
) -> None:
    """Train what is not in ``work`` yet and write ``quality_<study>.json``.

    head: of the result file; folder: of the data sets; out: of the results.
    """
    began = time.monotonic()
    # Loading now reports a missing file before hours of training.
    tasks = {
        label: loaders.load(folder=folder, seed=study.seeds[0], **settings["data"]).names
        for label, settings in study.datasets.items()
    }
    runs = study.runs(tasks)
    say(f"{study.name}: {len(runs)} runs, {jobs} at a time")
    records = run_all(runs, folder, work, jobs=jobs, spectra=study.spectra, device=device)
    rows = tables.rows(study, runs, records)
    what = f"quality_{study.name}"
    settings = {"datasets": study.datasets, "seeds": study.seeds}
    results.save(out, what, head, rows, notes=[], **settings)
    used = sum(record["cpu_seconds"] for record in records.values())
    spent = time.monotonic() - began
    say(f"\n{tables.by_base(rows)}\n{out / what}.json; {used:.0f} s of training, {spent:.0f} s")


def run_all(
    runs: list[Run],
    folder: Path | None,
    work: Path,
    *,
    jobs: int,
    device: str = "cpu",
    spectra: bool = False,
) -> dict[str, dict]:
    """Return the records of all runs by their keys."""
    runs = list({run.key: run for run in runs}.values())
    # The encoders that several runs start from come first, once each.
    firsts = list({run.pretraining_key: run for run in runs if run.pretraining_key}.values())
    first = partial(training.start_of, folder=folder, work=work, device=device)
    for _ in _each(first, firsts, jobs, "encoders"):
        pass
    one = partial(training.execute, folder=folder, work=work, device=device, spectra=spectra)
    records = {}
    for run, record in _each(one, runs, jobs, "runs"):
        records[run.key] = record
        say(f"{record['cpu_seconds']:6.1f} s  {run}")
    return records


def _each(call: Callable, runs: list[Run], jobs: int, what: str) -> Iterator[tuple[Run, dict]]:
    """Yield runs with their results, as they come."""
    with ExitStack() as stack:
        if jobs == 1:
            done = ((run, call(run)) for run in runs)
        else:
            # Not forked: a child of a process with threads may hang.
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,))
            stack.enter_context(pool)
            futures = {pool.submit(call, run): run for run in runs}
            # Where one run fails, those that have not begun would only delay the message.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            done = ((futures[future], future.result()) for future in as_completed(futures))
        for _ in track(range(len(runs)), what):
            yield next(done)
