"""Negative controls: damage done to the PTX of a kernel is noticed, wherever it is done.

Noticed means a fault of the machine, or a result that the reference does not accept.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from cases import LOSSES, Case, judge

from ptx import program
from ptx.faults import Fault
from ptx.kernel import Instruction
from ptx.observer import Observer
from ptx.tier import MARKS, MODES, compiled
from repmtl_kernels.backends.triton.tiles import Tile, trying

pytestmark = MARKS

CSA = LOSSES[1]
NOTHING = "mov.pred _, 0"
PRODUCTS = ("_gram_kernel", "_gradient_kernel")


class Damage(NamedTuple):
    """Instructions whose text matches become other ones."""

    name: str
    pattern: str
    damaged: str | Callable[[re.Match], str]
    kernels: tuple[str, ...] = PRODUCTS
    capabilities: tuple[int, ...] = (90, 80)
    case: Case = Case(2, 2, 136, (8, 11))
    mode: str = "bfloat16"
    # Instructions with this group in common change together, else each by itself.
    together: int | None = None
    tile: Tile | None = None  # of both product kernels, in place of the rules
    # At most so many places of a kernel are needless, as a barrier between two others is.
    needless: int = 0


BY_TMA = Tile(64, 64, 32, 4, 2, tma=True)
ODD = Case(2, 2, 133, (7, 11))
DAMAGES = (
    Damage("no barrier", r"bar\.sync\s+0", NOTHING, ("_gram_kernel",), needless=3),
    Damage("no barrier", r"bar\.sync\s+0", NOTHING, ("_gradient_kernel",), needless=1),
    Damage("no barrier", r"bar\.sync\s+0", NOTHING, ("_statistics_kernel",)),
    Damage(
        "a group of copies too few",
        r"cp\.async\.wait_group\s+(\d)",
        lambda match: f"cp.async.wait_group {int(match[1]) + 2}",
        needless=3,
    ),
    Damage(
        "no wait for products",
        r"wgmma\.wait_group\.sync\.aligned \d+",
        NOTHING,
        PRODUCTS,
        (90,),
        needless=1,
    ),
    Damage(
        "no fence of the proxy",
        r"fence\.proxy\.async\.shared::cta",
        NOTHING,
        PRODUCTS,
        (90,),
        needless=1,
    ),
    Damage(
        "no fence of products", r"wgmma\.fence\.sync\.aligned", NOTHING, PRODUCTS, (90,), needless=1
    ),
    Damage(
        "descriptor 16 bytes further",
        r"\b46116\d{14}\b",
        lambda match: str(int(match[0]) + 1),
        PRODUCTS,
        (90,),
    ),
    Damage(
        "copy to another place",
        r"(add\.s32\s+%r\d+, %r\d+, )2048\b",
        r"\g<1>2064",
        ("_gram_kernel",),
    ),
    Damage(
        "mask of one more",
        r"setp\.lt\.([su]32\s+%p\d+, %r\d+, (%r\d+))",
        r"setp.le.\1",
        case=ODD,
        together=2,
        needless=8,
    ),
    Damage(
        "wait for another phase",
        r"(try_wait\.parity\S*\s+complete, \[%r\d+\]), %r\d+",
        r"\g<1>, 1",
        PRODUCTS,
        (90,),
        tile=BY_TMA,
    ),
    Damage(
        "wait for more bytes",
        r"(expect_tx\S*\s+_, \[%r\d+\]), (\d+)",
        lambda match: f"{match[1]}, {int(match[2]) + 16}",
        PRODUCTS,
        (90,),
        tile=BY_TMA,
    ),
    # Triton has a barrier before each step of setting up a copy: the last of them would do.
    Damage(
        "no barrier around TMA",
        r"bar\.sync\s+0",
        NOTHING,
        ("_gram_kernel",),
        (90,),
        tile=BY_TMA,
        needless=16,
    ),
    Damage(
        "no barrier around TMA",
        r"bar\.sync\s+0",
        NOTHING,
        ("_gradient_kernel",),
        (90,),
        tile=BY_TMA,
        needless=7,
    ),
    Damage("another row", r"(mad\.wide\.[su]32\s+%rd\d+, %r\d+), 2\b", r"\g<1>, 4"),
    Damage(
        "sum of other lanes",
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16\b",
        r"\g<1>, 8",
        ("_statistics_kernel",),
    ),
)


class Reached(Observer):
    """Which instructions of each kernel ran."""

    def __init__(self) -> None:
        self.places: dict[str, set[int]] = {}
        self._kernel = ""

    def start(self, kernel, grid, block, shared, ctas) -> None:
        self._kernel = kernel.name
        self.places.setdefault(kernel.name, set())

    def issued(self, instruction: Instruction, warps: int) -> None:
        self.places[self._kernel].add(instruction.index)


def run(damage: Damage, capability: int, **options) -> None:
    """Judge the case; ``options`` are those of the stand-in driver."""
    tiles = {} if damage.tile is None else {"gram": damage.tile, "gradient": damage.tile}
    with compiled(capability, damage.mode, **options), trying(tiles):
        judge(CSA, damage.case, MODES[damage.mode].dtype, "triton")


def damaged_texts(damage: Damage, kernel: str, capability: int) -> Iterator[tuple[str, str]]:
    """Yield the PTX of a kernel and the same with damage, for each place that the case reaches."""
    texts: list[str] = []

    def keep(name: str, text: str) -> str:
        if name == kernel and text not in texts:
            texts.append(text)
        return text

    reached = Reached()
    run(damage, capability, edit=keep, observer=reached)
    for text in texts:
        plain = re.sub(r"//[^\n]*", "", text)
        known = re.compile(damage.pattern)
        instructions = program.parse(text)[kernel].instructions
        ran = [known.search(i.text) and i.index in reached.places[kernel] for i in instructions]
        matching = [bool(r) for i, r in zip(instructions, ran, strict=True) if known.search(i.text)]
        matches = list(known.finditer(plain))
        assert len(matches) == len(matching), "each statement has one instruction"
        groups: dict[object, list[re.Match]] = {}
        for number, (match, runs) in enumerate(zip(matches, matching, strict=True)):
            if runs:
                key = number if damage.together is None else match[damage.together]
                groups.setdefault(key, []).append(match)
        for group in groups.values():
            changed = plain
            for match in reversed(group):
                new = (
                    match.expand(damage.damaged)
                    if isinstance(damage.damaged, str)
                    else (damage.damaged(match))
                )
                changed = changed[: match.start()] + new + changed[match.end() :]
            yield text, changed


def noticed(damage: Damage, capability: int, text: str, changed: str) -> bool:
    """Return whether a run with the damaged kernel in place of the sound one fails."""

    def replace(name: str, given: str) -> str:
        return changed if given == text else given

    try:
        run(damage, capability, edit=replace)
    except (Fault, AssertionError):
        return True
    return False


# By number: parameters go to another process, and functions don't.
CASES = [
    pytest.param(number, kernel, capability, id=f"{damage.name}-{kernel}-{capability}")
    for number, damage in enumerate(DAMAGES)
    for kernel in damage.kernels
    for capability in damage.capabilities
]


@pytest.mark.whole
@pytest.mark.parametrize(("number", "kernel", "capability"), CASES)
def test_every_place(number: int, kernel: str, capability: int):
    damage = DAMAGES[number]
    missed = total = 0
    for text, changed in damaged_texts(damage, kernel, capability):
        total += 1
        missed += not noticed(damage, capability, text, changed)
    print(f"{damage.name}, {kernel}, sm_{capability}: {total - missed} of {total}")
    assert missed < total
    assert missed <= damage.needless


@pytest.mark.parametrize(("number", "kernel", "capability"), CASES[:: len(CASES) // 8])
def test_one_place(number: int, kernel: str, capability: int):
    damage = DAMAGES[number]
    places = itertools.islice(damaged_texts(damage, kernel, capability), damage.needless + 1)
    assert any(noticed(damage, capability, *place) for place in places)
