"""Which tile each kernel takes, as a table of rules: by kind of product, size and GPU.

There are two tables: the package's (:data:`RULES`), and one of the user's own, a JSON file that
REPMTL_TILES names. The user's comes first. The first rule that fits holds.

Tables name four kernels: ``statistics``, ``gram``, ``gradient`` and ``pull``. The last one is
``_gradient_pull_kernel`` in ``anchor_gradient.py``: how the tasks' affinities pull at the anchors
``u``, which is ``S (S^T u)``. It runs on the N side only; the C side has this from ``gram``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
import triton

from repmtl_kernels.backends.triton.common import INTERPRET, next_power_of_2

VARIABLE = "REPMTL_TILES"
# 16-bit numbers, and float32 by `input_precision` of its products.
KINDS = ("16-bit", "tf32", "tf32x3", "ieee")
ANY = 1 << 62


class Tile(NamedTuple):
    """The part of a matrix product that one program writes, and how.

    ``rows`` x ``columns`` are a tile of the Gram matrix (gram), of ``X``, ``R x K`` (gradient), or
    of channels x tasks, with all tasks (pull). For gram, ``columns`` is a multiple of ``rows``; it
    is not used on the C side, where tiles are square.
    """

    rows: int
    columns: int
    depth: int  # terms of the sum at a time
    warps: int
    stages: int  # of the software pipeline
    registers: int | None = None  # of a thread, at most; None: as the compiler likes
    tma: bool = False  # whether TMA copies what gram and gradient multiply, where it can

    def within(self, rows: int, columns: int, depth: int = ANY) -> Tile:
        """Return the tile cut to powers of two that hold these sizes, but not below 16."""
        return self._replace(
            rows=min(self.rows, _padded(rows)),
            columns=min(self.columns, _padded(columns)),
            depth=min(self.depth, _padded(depth)),
        )


class Sweep(NamedTuple):
    """How the statistics cut up their one read of the saliencies."""

    deep: int  # rows of a tile that a thread adds up in registers
    programs: int  # from that many on, longer chunks of rows make fewer partial sums,
    most_rows: int  # of up to that many rows
    warps: int
    registers: int | None = None
    # Elements of a sample that one program takes whole, with twice the warps: there are no partial
    # sums then, and no second kernel.
    whole: int = 1 << 15


ProductKernel = Literal["gram", "gradient", "pull"]
KERNELS: dict[str, type[Tile | Sweep]] = {
    "gram": Tile,
    "gradient": Tile,
    "pull": Tile,
    "statistics": Sweep,
}


def _check(name: str, good: bool, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}; got {got!r}")


@dataclass(frozen=True)
class Rule:
    """The tile of a kernel for operands of these kinds, sizes and GPUs; bounds are inclusive.

    ``rows`` and ``depth`` are those of the operand, not of the tile.
    """

    kernel: str
    kinds: tuple[str, ...]  # of KINDS; statistics of float32 are "ieee"
    tile: Tile | Sweep
    odd: bool | None = None  # whether rows of memory start at any address; None: either
    rows: tuple[int, int] = (1, ANY)  # min(C, N); statistics: of the matrix that is swept
    depth: tuple[int, int] = (1, ANY)  # max(C, N); statistics: its columns
    capability: tuple[int, int] = (0, ANY)  # 90 is compute capability 9.0

    def __post_init__(self) -> None:
        _check("kernel", self.kernel in KERNELS, f"one of {', '.join(KERNELS)}", self.kernel)
        known = len(self.kinds) > 0 and set(self.kinds) <= set(KINDS)
        _check("kinds", known, f"some of {', '.join(KINDS)}", self.kinds)
        _check("odd", self.odd in (None, True, False), "true, false or null", self.odd)
        for name in ("rows", "depth", "capability"):
            bounds = getattr(self, name)
            _check(name, len(bounds) == 2 and bounds[0] <= bounds[1], "[least, most]", bounds)
        for name, value in self.tile._asdict().items():
            name = f"tile.{name}"
            if name == "tile.registers":
                good = value is None or 16 <= value <= 255
                _check(name, good, "null or a number from 16 to 255", value)
            elif name == "tile.tma":
                _check(name, value in (True, False), "true or false", value)
            elif name in ("tile.stages", "tile.programs"):
                _check(name, value >= 1, "a positive number", value)
            else:
                least = 16 if name in ("tile.rows", "tile.columns", "tile.depth") else 1
                good = value >= least and value & (value - 1) == 0
                _check(name, good, f"a power of two of at least {least}", value)
        if self.kernel == "gram" and isinstance(self.tile, Tile):
            good = self.tile.columns % self.tile.rows == 0
            _check("tile.columns", good, f"a multiple of {self.tile.rows}", self.tile.columns)

    def fits(self, kind: str, odd: bool, rows: int, depth: int, capability: int) -> bool:
        """Return whether the rule holds for such operands of its kernel."""
        return (
            kind in self.kinds
            and self.odd in (None, odd)
            and self.rows[0] <= rows <= self.rows[1]
            and self.depth[0] <= depth <= self.depth[1]
            and self.capability[0] <= capability <= self.capability[1]
        )


# The L2 cache bounds large products, and the widest tiles read least from it. A multiprocessor has
# one such program at a time: they are for long sums, whose ends count little. They take up to 160
# KB of shared memory, and too many registers elsewhere.
WIDE = Tile(128, 256, 64, 8, 3, tma=True)
WIDE_TF32 = WIDE._replace(depth=32)
HOPPER, DATACENTER = (90, 99), (90, 119)  # also Blackwell's
# The others fit into registers (but for up to 16 bytes of channels_last saliencies) and into the
# shared memory of the smallest target: 99 KB for 8.6, 8.9 and 12.x.
RULES = (
    Rule("gram", ("16-bit",), WIDE, False, (321, ANY), (2048, ANY), HOPPER),
    # Tiles of 64 read each row twice as often from the L2 cache, more than it can give; up to about
    # 320 rows those of 128 have more padding than that.
    Rule("gram", ("16-bit",), Tile(128, 128, 64, 8, 3), odd=False, rows=(321, ANY)),
    Rule("gram", ("tf32",), Tile(128, 128, 32, 8, 3), False, (321, ANY), capability=DATACENTER),
    Rule("gram", ("16-bit",), Tile(64, 64, 64, 4, 3, 168), odd=False),
    Rule("gram", ("tf32", "tf32x3"), Tile(64, 64, 32, 4, 3, 255), odd=False),
    Rule("gram", ("ieee",), Tile(64, 64, 16, 4, 3, 255), odd=False),
    # Odd rows are loaded element by element, with a pointer each. Single 16-bit elements cannot be
    # copied ahead, so that every step waits for memory: few deep steps where registers allow it.
    Rule("gram", ("16-bit",), Tile(32, 32, 32, 4, 3), odd=True, rows=(1, 32)),
    Rule("gram", ("16-bit",), Tile(64, 64, 128, 8, 3), odd=True, capability=DATACENTER),
    Rule("gram", ("16-bit",), Tile(64, 64, 32, 8, 3), odd=True),
    Rule("gram", KINDS, Tile(32, 32, 16, 4, 3, 128), odd=True, rows=(1, 32)),
    Rule("gram", ("tf32",), Tile(64, 64, 64, 8, 3, 128), odd=True, capability=DATACENTER),
    Rule("gram", KINDS, Tile(64, 64, 16, 8, 3, 128), odd=True),
    Rule("gradient", ("16-bit",), WIDE, False, (321, ANY), (1024, ANY), HOPPER),
    Rule("gradient", ("tf32",), WIDE_TF32, False, (321, ANY), (1024, ANY), HOPPER),
    Rule("gradient", ("16-bit",), Tile(128, 128, 64, 8, 3), odd=False, rows=(65, ANY)),
    Rule("gradient", ("tf32",), Tile(128, 128, 32, 8, 3), odd=False, rows=(65, ANY)),
    Rule("gradient", ("16-bit",), Tile(16, 256, 16, 8, 3), rows=(1, 16)),
    Rule("gradient", ("16-bit",), Tile(32, 128, 32, 8, 3), rows=(17, 32)),
    Rule("gradient", ("16-bit",), Tile(64, 64, 64, 8, 3), odd=False),
    Rule("gradient", ("16-bit",), Tile(64, 64, 32, 8, 3), odd=True),
    Rule("gradient", ("ieee",), Tile(16, 256, 16, 8, 3, 128), rows=(1, 16)),
    Rule("gradient", ("ieee",), Tile(32, 128, 16, 8, 3, 128), rows=(17, 32)),
    Rule("gradient", ("ieee",), Tile(64, 64, 16, 8, 3, 128)),
    Rule("gradient", ("tf32", "tf32x3"), Tile(16, 256, 16, 4, 3), odd=False, rows=(1, 16)),
    Rule("gradient", ("tf32", "tf32x3"), Tile(32, 128, 32, 4, 3), odd=False, rows=(17, 32)),
    Rule("gradient", ("tf32", "tf32x3"), Tile(64, 64, 32, 4, 3), odd=False),
    Rule("gradient", ("tf32", "tf32x3"), Tile(16, 256, 16, 8, 3), odd=True, rows=(1, 16)),
    Rule("gradient", ("tf32", "tf32x3"), Tile(32, 128, 16, 8, 3), odd=True, rows=(17, 32)),
    Rule("gradient", ("tf32", "tf32x3"), Tile(64, 64, 16, 8, 3), odd=True),
    Rule("pull", KINDS, Tile(256, 16, 16, 4, 4), rows=(1, 16)),
    Rule("pull", ("16-bit", "tf32"), Tile(64, 16, 64, 4, 4)),
    Rule("pull", ("tf32x3",), Tile(64, 16, 32, 4, 4)),
    Rule("pull", ("ieee",), Tile(64, 16, 16, 4, 4)),
    # Eight programs for each multiprocessor of a large GPU; chunks of 512 rows cost 0.8 % of the
    # bytes of 16-bit saliencies. Left to itself, the compiler spills a few registers for more
    # occupancy on sm_100. Loads of single 16-bit elements need a pointer each: 32 of them fit.
    Rule("statistics", ("16-bit",), Sweep(4, 1056, 512, 4, 128), odd=True),
    Rule("statistics", KINDS, Sweep(8, 1056, 512, 4, 128)),
)


class Request(NamedTuple):
    """A question for a tile; sizes as in :class:`Rule`."""

    kernel: str
    kind: str
    odd: bool
    rows: int
    depth: int
    capability: int


class _Trial(NamedTuple):
    tiles: Mapping[str, Tile | Sweep]
    answers: dict[Request, Tile | Sweep]


_trial: _Trial | None = None


@overload
def tile_of(
    kernel: ProductKernel, kind: str, odd: bool, rows: int, depth: int, device: torch.device
) -> Tile: ...
@overload
def tile_of(
    kernel: Literal["statistics"], kind: str, odd: bool, rows: int, depth: int, device: torch.device
) -> Sweep: ...
def tile_of(
    kernel: str, kind: str, odd: bool, rows: int, depth: int, device: torch.device
) -> Tile | Sweep:
    """Return the tile of the first rule that fits."""
    request = Request(kernel, kind, odd, rows, depth, capability_of(device))
    if _trial is None:
        return _find(*request)
    tile = _trial.tiles.get(kernel) or _find(*request)
    _trial.answers[request] = tile
    return tile


@contextlib.contextmanager
def trying(tiles: Mapping[str, Tile | Sweep]) -> Iterator[dict[Request, Tile | Sweep]]:
    """Have these kernels take these tiles; yields which tile each request got so far.

    For measuring, in one thread: it holds for all of the process.
    """
    global _trial
    before, _trial = _trial, _Trial(tiles, {})
    try:
        yield _trial.answers
    finally:
        _trial = before


@functools.cache
def _find(
    kernel: str, kind: str, odd: bool, rows: int, depth: int, capability: int
) -> Tile | Sweep:
    for rule in (*own_rules(), *RULES):
        if rule.kernel == kernel and rule.fits(kind, odd, rows, depth, capability):
            return rule.tile
    raise AssertionError(f"no tile for {kernel}, {kind}")


@functools.cache
def own_rules() -> tuple[Rule, ...]:
    """Return the rules of the JSON file that REPMTL_TILES names, as :func:`as_json` writes it."""
    path = os.environ.get(VARIABLE)
    if not path:
        return ()
    try:
        return tuple(_rule(one) for one in json.loads(Path(path).read_text())["rules"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE}: expected a JSON file of tiles, as python -m benchmarks.tune writes it; "
            f"got {path!r}: {type(error).__name__}: {error}"
        ) from error


def _rule(entry: dict[str, Any]) -> Rule:
    """Return the rule that an entry of the file describes."""
    unknown = entry.keys() - {field.name for field in fields(Rule)}
    _check("rule", not unknown, "no keys but those of Rule", sorted(unknown))
    kernel = entry["kernel"]
    _check("kernel", kernel in KERNELS, f"one of {', '.join(KERNELS)}", kernel)
    bounds = {k: tuple(entry[k]) for k in ("rows", "depth", "capability") if k in entry}
    tile = KERNELS[kernel](**entry["tile"])
    return Rule(kernel, tuple(entry["kinds"]), tile, entry.get("odd"), **bounds)


def as_json(rules: Iterable[Rule]) -> str:
    """Return the JSON that :func:`own_rules` reads, a rule a line."""
    lines = [json.dumps({**asdict(rule), "tile": rule.tile._asdict()}) for rule in rules]
    return '{"rules": [\n' + ",\n".join(lines) + "\n]}\n"


def capability_of(device: torch.device) -> int:
    """Return 90 for compute capability 9.0, 0 under the interpreter."""
    if device.type == "cuda":
        return _capability_of_cuda(device)
    if INTERPRET:
        return 0
    # Compiled for a GPU that is not here: a stand-in for the driver knows which.
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache  # host time of every launch
def _capability_of_cuda(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))
