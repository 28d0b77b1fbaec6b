"""A process where Triton compiles, for tests of a process where Triton interprets.

Triton reads TRITON_INTERPRET when it is imported, so that one process can't do both.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# The suite's own fixtures take these from the environment too.
VARIABLES = ("TRITON_INTERPRET", "REPMTL_BACKEND", "REPMTL_FP32_PRECISION", "REPMTL_TILES")


class Answer(NamedTuple):
    """How a call ended: the text of its exception if it raised, and the launches meanwhile."""

    error: str | None
    launches: list[tuple[int, dict[str, int]]]  # compute capability, number of each kernel


class Process:
    """The other process, as the tests see it. It starts with the first call."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None

    def call(self, function: Callable[..., None], arguments: dict[str, Any]) -> Answer:
        """Call an importable function there; a process that did not survive it is an error."""
        if self._child is None:
            self._child = _start()
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            pickle.dump((function, arguments), self._child.stdin)
            self._child.stdin.flush()
            return pickle.load(self._child.stdout)
        except (EOFError, BrokenPipeError):
            code = self._child.wait(10)
            self._child = None
            return Answer(f"the process of compiled kernels ended: exit status {code}", [])
        except BaseException:  # a timeout: the next answer would be that to this call
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _start() -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", "ptx.worker"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
