"""The process where Triton compiles: ``python -m ptx.worker`` answers the calls of process.py."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings

import torch

from ptx import driver
from ptx.process import Answer
from repmtl_kernels.backends.triton import stages as triton_stages


def main() -> None:
    """Answer calls until there are no more."""
    calls = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, as in all tests
    warnings.filterwarnings("error", module="repmtl_kernels")
    triton_stages.prepare = None  # it would compile for other batches than that of a test too
    while True:
        try:
            function, arguments = pickle.load(calls)
        except EOFError:
            return
        torch.manual_seed(0)
        error = None
        with driver.recorded() as launches:
            try:
                function(**arguments)
            except BaseException:  # noqa: BLE001  (the test shows it)
                error = traceback.format_exc()
        counts = [(of.capability, dict(of.by_kernel())) for of in launches]
        pickle.dump(Answer(error, counts), answers)
        answers.flush()


if __name__ == "__main__":
    main()
