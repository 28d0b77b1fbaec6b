"""A listener to what a launch does; :mod:`ptx.counters` counts with it."""

from __future__ import annotations

import numpy as np

from ptx.kernel import Instruction, Kernel


class Observer:
    """Hears of everything that the machine runs. Its methods do nothing."""

    def start(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        ctas: int,
    ) -> None:
        """A launch begins, of which ``ctas`` run; ``shared``: bytes of shared memory of each."""

    def issued(self, instruction: Instruction, warps: int) -> None:
        """An instruction was issued for that many warps."""

    def global_access(
        self,
        instruction: Instruction,
        kind: str,
        addresses: np.ndarray,
        active: np.ndarray,
        size: int,
    ) -> None:
        """Global memory was accessed.

        ``kind`` is load, store, atomic or copy (cp.async). ``addresses`` (warps, 32), int64, of
        ``size`` bytes each, by the lanes that are ``active``.
        """

    def shared_access(
        self,
        instruction: Instruction,
        kind: str,
        addresses: np.ndarray,
        active: np.ndarray,
        size: int,
    ) -> None:
        """Shared memory was accessed.

        As :meth:`global_access`; ``kind`` may also be matrix (ldmatrix, stmatrix): then
        ``addresses`` are (matrices, 8) rows of 16 bytes.
        """

    def product(
        self, instruction: Instruction, m: int, n: int, k: int, groups: int, operands: int
    ) -> None:
        """Warps, or warpgroups, multiplied m x k by k x n; ``groups`` is their number.

        ``operands``: bytes of shared memory that one of them reads for it.
        """

    def bulk_copy(
        self, instruction: Instruction, addresses: np.ndarray, size: int, count: int
    ) -> None:
        """TMA made ``count`` copies of the elements (``size`` bytes) at ``addresses``."""

    def finish(self) -> None:
        """The launch has ended."""
