"""Counters of a launch, as a GPU's would be, from the instructions that it executed."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ptx.instruction_classes import FREE, class_of
from ptx.observer import Observer

SECTOR = 32  # bytes that the L2 cache moves at a time
BANKS, WORD = 32, 4
PAGE = 1 << 20  # bytes of the pieces in which touched sectors are marked
_ALL_SECTORS = 1 << 43  # more than an address space has
_PAST_L1 = {"cg", "cv", "volatile", "relaxed", "acquire"}


class Touched:
    """A set of sectors of global memory, as bits of pages."""

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray] = {}

    def add(self, sectors: np.ndarray) -> None:
        """Add sectors by their numbers, in any order and number."""
        of_page, within = np.divmod(sectors, PAGE // SECTOR)
        for page in np.unique(of_page):
            bits = self._pages.setdefault(int(page), np.zeros(PAGE // SECTOR, bool))
            bits[within[of_page == page]] = True

    def bytes_of_sectors(self) -> int:
        return SECTOR * sum(int(bits.sum()) for bits in self._pages.values())


def distinct(values: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Return how many different values each row has where it is active."""
    ordered = np.sort(np.where(active, values, -1), axis=1)
    steps = (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    return steps + (ordered[:, 0] >= 0)


def wavefronts(addresses: np.ndarray, active: np.ndarray, size: int) -> tuple[int, int]:
    """Return the wavefronts of accesses to shared memory, and those without a bank conflict.

    A warp's 8 and 16 bytes a lane go in 2 and 4 phases. Lanes that meet in one word share it; two
    words of a bank take two wavefronts. A matrix of ldmatrix is 8 lanes with 16 bytes each.
    """
    words = max(1, size // WORD)
    lanes = min(addresses.shape[1], BANKS // words)
    word = addresses[:, :, None] // WORD + np.arange(words)
    word = np.where(active[:, :, None], word, -1).reshape(-1, lanes * words)
    word = word[(word >= 0).any(1)]
    if not len(word):
        return 0, 0
    word.sort(axis=1)
    first = word >= 0
    first[:, 1:] &= word[:, 1:] != word[:, :-1]
    row, column = np.nonzero(first)
    at = row * BANKS + word[row, column] % BANKS
    of_bank = np.bincount(at, minlength=len(word) * BANKS).reshape(-1, BANKS)
    return int(of_bank.max(1).sum()), len(word)


class Counters(Observer):
    """Counts of one launch, of the CTAs that ran.

    accesses: requests, sectors and least sectors by form of instruction, such as ``ld.global.v4``;
    shared: requests, wavefronts and least wavefronts, likewise; flop: of the matrix units by
    instruction and type; issued: instructions of a warp by class; read, written: global memory.

    requested: sectors that the L2 cache is asked for. Plain loads are taken to hit in the L1 cache
    where their CTA has loaded the sector before; copies to shared memory, stores and atomics go to
    the L2 cache each time.
    """

    def __init__(self) -> None:
        self.ctas = 0
        self.accesses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.shared: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.flop: Counter[str] = Counter()
        self.issued_by_class: Counter[str] = Counter()
        self.operand_bytes = 0
        self.bulk_bytes = 0
        self.read, self.written = Touched(), Touched()
        self._requested = 0
        self._loaded = Touched()  # of each CTA

    @property
    def requested(self) -> int:
        return self._requested + self._loaded.bytes_of_sectors() // SECTOR

    def start(self, kernel: Any, grid: Any, block: Any, shared: int, ctas: int) -> None:
        self.ctas = ctas

    def issued(self, instruction: Any, warps: int) -> None:
        kind = class_of(instruction.op, instruction.modifiers)
        if kind != FREE:
            self.issued_by_class[kind] += warps

    def global_access(
        self, instruction: Any, kind: str, addresses: np.ndarray, active: np.ndarray, size: int
    ) -> None:
        wanted = active.any(1)
        cta = np.nonzero(wanted)[0] // (len(wanted) // self.ctas)
        addresses, active = addresses[wanted], active[wanted]
        sector = addresses // SECTOR
        count = self.accesses[_form(instruction)]
        count["requests"] += len(addresses)
        sectors = int(distinct(sector, active).sum())
        count["sectors"] += sectors
        if kind == "load" and not _PAST_L1 & set(instruction.modifiers):
            self._loaded.add((cta[:, None] * _ALL_SECTORS + sector)[active])
        else:
            self._requested += sectors
        least = -(-distinct(addresses, active) * size // SECTOR)
        count["least_sectors"] += int(least.sum())
        (self.written if kind == "store" else self.read).add(sector[active])

    def shared_access(
        self, instruction: Any, kind: str, addresses: np.ndarray, active: np.ndarray, size: int
    ) -> None:
        times = self.ctas if self._are_alike(addresses, active) else 1
        addresses, active = addresses[: len(active) // times], active[: len(active) // times]
        count = self.shared[_form(instruction)]
        taken, least = wavefronts(addresses, active, 16 if kind == "matrix" else size)
        count["requests"] += times * int(active.any(1).sum())
        count["wavefronts"] += times * taken
        count["least_wavefronts"] += times * least

    def _are_alike(self, addresses: np.ndarray, active: np.ndarray) -> bool:
        """Return whether all CTAs do the same, which is then counted once."""
        if len(addresses) % self.ctas:
            return False
        of_cta = addresses.reshape(self.ctas, -1), active.reshape(self.ctas, -1)
        return all(bool((one == one[0]).all()) for one in of_cta)

    def product(self, instruction: Any, m: int, n: int, k: int, groups: int, operands: int) -> None:
        kind = "tf32" if "tf32" in instruction.modifiers else "16-bit"
        self.flop[f"{instruction.op} {kind}"] += 2 * m * n * k * groups
        self.operand_bytes += operands * groups

    def bulk_copy(self, instruction: Any, addresses: np.ndarray, size: int, count: int) -> None:
        sector = addresses // SECTOR
        self.read.add(sector)
        self.bulk_bytes += len(addresses) * size
        self._requested += -(-len(addresses) * size // SECTOR)


def _form(instruction: Any) -> str:
    """Return the name of an instruction without what changes nothing for memory."""
    kept = [m for m in instruction.modifiers if m not in ("sync", "aligned", "relaxed", "gpu")]
    return ".".join([instruction.op, *kept])
