"""Compiles candidates in worker processes, for a GPU that need not be there.

The processes leave the kernels in Triton's cache on disk, where the one that measures finds them:
they launch as that one does, on tensors of the same sizes, strides and alignment.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from triton.errors import TritonError

from benchmarks.static_report import compiled_instead_of_launched, inspect, products_of
from benchmarks.tune.cases import KERNELS, Case, stage_of
from repmtl_kernels.backends.triton import tiles as tile_table
from repmtl_kernels.backends.triton.tiles import Request, Sweep, Tile


@dataclass(frozen=True)
class Job:
    case: Case
    tile: Tile | Sweep | None  # None: the one of the tables


@dataclass(frozen=True)
class Compiled:
    """The compiler's result for a candidate; ``error``: why it can't be used."""

    case: Case
    tile: Tile | Sweep | None
    is_baseline: bool
    error: str | None = None
    request: Request | None = None
    hash: str | None = None  # of its kernels: equal ones are the same program


def compile_all(
    jobs: Sequence[Job], capability: int, workers: int, until: float = float("inf")
) -> list[Compiled | None]:
    """Return the results in the order of the jobs; None where ``until`` came before."""
    results: list[Compiled | None] = [None] * len(jobs)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    # Not forked: a process that has used CUDA can't be.
    context = multiprocessing.get_context("spawn")

    def serve() -> None:
        # A process for each thread: a crash of the compiler ends no other job.
        pool = ProcessPoolExecutor(1, context)
        try:
            while time.monotonic() < until:
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                job = jobs[number]
                try:
                    results[number] = pool.submit(compile_one, job, capability).result()
                except BrokenProcessPool:
                    results[number] = _failed(job, "the compiler's process ended")
                    pool.shutdown()
                    pool = ProcessPoolExecutor(1, context)
        finally:
            pool.shutdown()

    workers = max(1, min(workers, len(jobs)))
    with ThreadPoolExecutor(workers) as threads:
        for served in [threads.submit(serve) for _ in range(workers)]:
            served.result()
    return results


def compile_one(job: Job, capability: int) -> Compiled:
    """Compile a candidate's kernel; for the tile of the tables all kernels of the stage."""
    case, name = job.case, KERNELS[job.case.kernel]
    tiles = {} if job.tile is None else {case.kernel: job.tile}
    only = None if job.tile is None else name
    try:
        with (
            products_of(case.mode),
            compiled_instead_of_launched(capability, only) as kernels,
            tile_table.trying(tiles) as asked,
        ):
            stage_of(case, torch.empty)()
    except (TritonError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [""]
        return _failed(job, f"{type(error).__name__}: {lines[0]}")
    ((request, tile),) = ((r, t) for r, t in asked.items() if r.kernel == case.kernel)
    # Many tasks take several launches, a variant each.
    variants = [k for k in kernels.values() if k.metadata.name == name]
    spilled = max(inspect(k, capability, instructions=False)["spill_bytes"] for k in variants)
    error = f"spills {spilled} bytes of registers" if spilled else None
    hashes = " ".join(sorted(k.hash for k in variants))
    return Compiled(case, tile, job.tile is None, error, request, hashes)


def _failed(job: Job, error: str) -> Compiled:
    return Compiled(job.case, job.tile, job.tile is None, error)
