"""``python -m benchmarks.prewarm``: compiles the Triton kernels of the decisive cases in parallel.

They go to Triton's cache on disk, where the runs that measure find them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch

from benchmarks import cases
from benchmarks.output import say
from benchmarks.part import described
from benchmarks.parts import kernels, stages
from benchmarks.static_report import compiled_instead_of_launched
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import Expected
from repmtl_kernels.backends.triton import first_use
from repmtl_kernels.backends.triton.tiles import capability_of

# Nobody times them by themselves; a loss without a gradient launches them.
VALUES = tuple(
    stages.Variant(stage, "value alone", (("with_grad", False), *options))
    for stage, options in (
        ("entropy", (("over", "tasks"), ("normalizer", "abs"))),
        ("anchors", ()),
        ("contrast", ()),
    )
)
# The three losses ask for these, with a gradient and without.
EXPECTED = tuple(
    Expected(entropy, csa, with_grad, recompute=False, present=False, total=csa and bool(entropy))
    for entropy, csa in ((("tasks", "abs"), False), (None, True), (("tasks", "abs"), True))
    for with_grad in (True, False)
)


def planned() -> list[cases.Case]:
    """Return one case for each shape and precision: all losses are made ready together."""
    alike = [replace(c, function="rep_mtl_loss", compiled=False) for c in kernels.decisive()]
    return list(dict.fromkeys(alike))


def compile_case(case: cases.Case, capability: int) -> set[str]:
    """Compile all stages in all variants; return the hashes of the kernels."""
    s = case.shape
    size = (s.batch, s.channels, s.height, s.width)
    # Memory that nobody writes takes no place.
    saliencies = [torch.empty(size, dtype=case.precision.dtype) for _ in range(s.tasks)]
    with (
        cases.products_in(case.precision),
        compiled_instead_of_launched(capability) as compiled,
        torch.no_grad(),
    ):
        work = stages.work_of("triton", saliencies)
        for variant in (*stages.MAIN, *stages.OTHER, *VALUES):
            stages.call(choice.load("triton"), variant, work)
        for expected in EXPECTED:
            first_use.launch_all(saliencies, None, expected, all_batches=True)
    return set(compiled)


def main() -> None:
    began, failed = time.monotonic(), []
    capability = capability_of(torch.device("cuda"))
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA can't be forked
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        jobs = {pool.submit(compile_case, case, capability): case for case in planned()}
        for job in as_completed(jobs):
            error = job.exception()
            failed += [error] if error else []
            outcome = described(error) if error else f"{len(job.result())} kernels"
            say(f"{jobs[job]}: {outcome}; {time.monotonic() - began:.0f} s")
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} cases were not compiled")


if __name__ == "__main__":
    main()
