"""Many independent runs, some at a time, one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from benchmarks.progress import say, track
from benchmarks.quality import training
from benchmarks.quality.config import Run


def run_all(
    runs: list[Run], folder: Path | None, work: Path, *, jobs: int, device: str = "cpu", **options
) -> dict[str, dict]:
    """The records of all runs by their keys; options: of :func:`training.execute`."""
    runs = list({run.key: run for run in runs}.values())
    # The encoders that several runs start from come first, once each.
    firsts = list({run.pretraining_key: run for run in runs if run.pretraining_key}.values())
    first = partial(training.start_of, folder=folder, work=work, device=device)
    for _ in _each(first, firsts, jobs, "encoders"):
        pass
    one = partial(training.execute, folder=folder, work=work, device=device, **options)
    records = {}
    for run, record in _each(one, runs, jobs, "runs"):
        records[run.key] = record
        say(f"{record['cpu_seconds']:6.1f} s  {run}")
    return records


def _each(call: Callable, runs: list[Run], jobs: int, what: str) -> Iterator[tuple[Run, dict]]:
    """Runs with their results, as they come."""
    with ExitStack() as stack:
        if jobs == 1:
            results = ((run, call(run)) for run in runs)
        else:
            # Not forked: a child of a process with threads may hang.
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
                )
            )
            futures = {pool.submit(call, run): run for run in runs}
            # Where one run fails, those that have not begun would only delay the message.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            results = ((futures[done], done.result()) for done in as_completed(futures))
        for _ in track(range(len(runs)), what):
            yield next(results)
