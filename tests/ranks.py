"""Run functions on two processes of a gloo group, for the tests of several ranks."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
HAS_GLOO = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="needs gloo")
TIMEOUT = timedelta(seconds=60)


def run(
    checks: list[Callable[[int], None]],
    folder: Path,
    timeout: timedelta = TIMEOUT,
    wait: float = 300,
) -> list[dict[str, str]]:
    """Run each check on each rank, and return a dict for each rank: failed checks to their errors.

    An empty dict means that all passed. A rank that did not finish has the key ``"end"``.
    """
    context = mp.get_context("spawn")
    work = (checks, str(folder), timeout)
    processes = [context.Process(target=_rank, args=(rank, *work)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    until = time.monotonic() + wait
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    failed = []
    for rank, process in enumerate(processes):
        path = folder / f"{rank}.pt"
        if process.is_alive():
            process.kill()
        ended = {"end": f"exit code {process.exitcode}, no result"}
        failed.append(torch.load(path) if path.exists() else ended)
    return failed


def checks_in(namespace: dict[str, object]) -> list[Callable[[int], None]]:
    """Return the functions of a module that are called ``check_...``."""
    return [value for name, value in namespace.items() if name.startswith("check_")]


def assert_passed(name: str, outcomes: list[dict[str, str]]) -> None:
    """Assert that the check of this name passed on all ranks."""
    for rank, failed in enumerate(outcomes):
        assert "end" not in failed, f"rank {rank}: {failed['end']}"
        assert name not in failed, f"rank {rank}: {failed[name]}"


def _rank(rank: int, checks: list, folder: str, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, as in all tests
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timeout, rank=rank, world_size=RANKS)
    failed = {}
    for check in checks:
        try:
            check(rank)
        except BaseException:  # noqa: BLE001  (the test shows it)
            failed[check.__name__] = traceback.format_exc()
    torch.save(failed, f"{folder}/{rank}.tmp")
    os.rename(f"{folder}/{rank}.tmp", f"{folder}/{rank}.pt")  # the file is complete or absent
    os._exit(0)  # ends without waiting for the other rank, which may be gone
