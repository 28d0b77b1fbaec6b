"""First use: the kernels of a call are compiled in parallel, before the first of them runs.

Triton compiles a kernel at its first launch, one after the other. Here all launches of a call are
made once on a sample whose numbers nobody reads, and compiled instead of run. One sample is enough,
since kernels are the same for all batches.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
import triton
from torch import Tensor

from repmtl_kernels.backends.contract import (
    Anchors,
    CSAGradient,
    Expected,
    LossGradient,
    TSRGradient,
)
from repmtl_kernels.backends.triton.anchors import anchors
from repmtl_kernels.backends.triton.common import INTERPRET, compiling, fp32_precision
from repmtl_kernels.backends.triton.contrast import batches_of_all_tiles, contrast
from repmtl_kernels.backends.triton.entropy import batches_of_all_programs, entropy
from repmtl_kernels.backends.triton.gradient import saliency_grad
from repmtl_kernels.backends.triton.gram import gram
from repmtl_kernels.backends.triton.statistics import statistics
from repmtl_kernels.backends.triton.values import values

# Threads, at most; the compiler needs about 200 MB of memory for each.
THREADS = 16
# Seconds after which the user is told what takes so long. Kernels on disk are there by then.
PATIENCE = 1.0

_log = logging.getLogger("repmtl_kernels")
made_ready: set[tuple] = set()
_one_thread = threading.Lock()


def prepare(saliencies: Sequence[Tensor], mask: Tensor | None, expected: Expected) -> None:
    """See ``backends/contract.py``: compile what a call launches, unless that was done before."""
    first = saliencies[0]
    key = (
        first.shape[1:], first.stride()[1:], first.dtype, first.device,
        len(saliencies), mask is None, expected, fp32_precision(),
    )  # fmt: skip
    if INTERPRET or key in made_ready or _captures(first.device):
        return
    samples = [s[:1] for s in saliencies]
    mask = None if mask is None else mask[:1]
    with _one_thread:
        if key not in made_ready:
            compile_together(lambda: launch_all(samples, mask, expected, all_batches=True))
            made_ready.add(key)


def _captures(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, which would take in these operations too."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def compile_together(launches: Callable[[], object]) -> None:
    """Compile what ``launches`` launches in parallel, and run none of it."""
    contextvars.Context().run(_compile_together, launches)


def _compile_together(launches: Callable[[], object]) -> None:
    compiling.set(True)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with (
        ThreadPoolExecutor(min(THREADS, cores)) as threads,
        triton.AsyncCompileMode(threads) as mode,
    ):
        launches()
        _, slow = wait(mode.raw_futures, PATIENCE)
        if slow:
            count = len(mode.raw_futures)
            _log.info("compiling %d Triton kernel(s), once: Triton keeps them on disk", count)


def launch_all(
    saliencies: list[Tensor], mask: Tensor | None, expected: Expected, *, all_batches: bool
) -> None:
    """Launch every kernel of the stages, on tensors with any numbers.

    Args:
        all_batches: whether also those that are for other batches than that of the saliencies.
    """
    tasks, (batch, channels) = len(saliencies), saliencies[0].shape[:2]
    positions = saliencies[0].shape[2:].numel()
    with_grad = expected.with_grad
    means = statistics(
        saliencies, positions=expected.entropy is not None, channels=expected.csa, mask=mask
    )
    empty = functools.partial(torch.empty, dtype=torch.float32, device=saliencies[0].device)
    one = LossGradient(empty(()), 1.0)
    if expected.entropy is not None:
        over, normalizer = expected.entropy
        numbers = {"temperature": 1.0, "eps": 0.0}
        for some in batches_of_all_programs(tasks, positions) if all_batches else [batch]:
            x = empty(tasks, some, positions)
            entropy(x, over=over, normalizer=normalizer, with_grad=with_grad, **numbers)
    if means.channels is None or means.scale is None:
        return
    unit = anchors(means.channels, eps=0.0, with_grad=with_grad)
    for kept in sorted({with_grad and not expected.recompute, with_grad}):  # the last is used
        made = gram(saliencies, means.scale, unit.unit, eps=0.0, with_grad=kept, mask=mask)
    for some in batches_of_all_tiles(tasks) if all_batches else [batch]:
        others = empty(tasks, some, channels)
        of_some = Anchors(others, others[0, :, 0].contiguous(), others if with_grad else None)
        for grad in sorted({False, with_grad}):  # too many anchors keep no products either
            contrast(of_some, temperature=1.0, with_grad=grad)
    present = empty(tasks, batch).bool() if expected.present else None
    tsr = None if expected.entropy is None else one.grad
    lambdas = (1.0, 1.0) if expected.total else None
    weight = values(
        made.similarity, unit.factor, present, temperature=1.0, tsr=tsr, lambdas=lambdas
    ).weight
    if not with_grad:
        return
    csa = CSAGradient(
        scale=means.scale,
        anchors=unit,
        contrast_grad=unit.unit,
        gram=made,
        weight=weight,
        of_loss=one,
    )
    of_tsr = None if means.positions is None else TSRGradient(means.positions, one)
    outputs = [torch.empty_like(s) for s in saliencies]
    saliency_grad(saliencies, [*outputs], csa, of_tsr, mask=mask)
