"""Damaged PTX of ``csrc/cuda``: each damage has to be noticed. ``test_csrc.py`` runs this file."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from cases import LOSSES, Case, judge

from ptx import csrc

PADDED = Case(2, 2, 96, (7, 7))  # tiles of 64 that are not full
WIDE = Case(3, 2, 64, (8, 8))  # loads of 16 bytes
EACH = -1


class Damage(NamedTuple):
    """A replacement of the ``place``-th match of ``pattern`` in a kernel, or of each match.

    ``found`` is in the fault's message, or None where the result is wrong.
    """

    name: str
    kernel: str
    pattern: str
    place: int
    by: str
    found: str | None
    case: Case = PADDED

    def __str__(self) -> str:
        return f"{self.name}-{self.place}-{self.kernel.split('_kernel')[0]}"

    def apply(self, text: str) -> str:
        matches = list(re.finditer(self.pattern, text))
        for match in reversed(matches if self.place == EACH else [matches[self.place]]):
            text = text[: match.start()] + match.expand(self.by) + text[match.end() :]
        return text


GRAM = "small_gram_kernelI13__nv_bfloat16Li4ELb0"
GRADIENT = "small_gradient_kernelI13__nv_bfloat16Li4ELb0"
CONTRAST = "log_sum_exp_kernelIf"
STATISTICS = "statistics_kernelI13__nv_bfloat16Li1ELb0"
WIDE_STATISTICS = "statistics_kernelI13__nv_bfloat16Li8ELb0"
FINISH, ENTROPY = "finish_kernelIf", "over_tasks_kernelIf"
OUTSIDE = "outside"

# All that these kernels have, but for those after the last use of the memory that they guard.
BARRIERS = [(GRAM, (0, 1, 2, 4, 5, 6)), (GRADIENT, (0, 1, 2)), (CONTRAST, (0, 1, 2))]
DAMAGES = [
    *(
        Damage("no barrier", kernel, r"bar\.sync\s+0;", place, "", "race: ")
        for kernel, places in BARRIERS
        for place in places
    ),
    Damage("index", STATISTICS, r"(ld\.global\.u16.*\[%rd\d+)\]", 0, r"\1+2]", None),
    Damage("index", GRADIENT, r"(st\.global\.u16\s+\[%rd\d+)\]", 0, r"\1+2]", None),
    Damage("index", GRAM, r"(ld\.shared\.u16.*\[%r\d+)\]", 0, r"\1+2]", None),
    Damage("index", CONTRAST, r"(ld\.shared\.f32.*)\+28\]", 0, r"\1+32]", OUTSIDE),
    Damage("index", WIDE_STATISTICS, r"(v4\.u32.*\[%rd\d+)\]", 0, r"\1+4]", "misaligned", WIDE),
    Damage("mask", GRAM, r"setp\.le\.s64", EACH, "setp.lt.s64", OUTSIDE),
    Damage("mask", CONTRAST, r"setp\.ge\.s64", 0, "setp.gt.s64", OUTSIDE),
    Damage("mask", FINISH, r"setp\.lt\.s64", 0, "setp.le.s64", OUTSIDE),
    Damage("mask", ENTROPY, r"setp\.ge\.s64", 0, "setp.gt.s64", OUTSIDE),
    Damage("mask", STATISTICS, r"setp\.ge\.s64", 0, "setp.gt.s64", OUTSIDE),
    Damage("stride", GRAM, r"(mov\.\w32\s+%r\d+), 72;", 0, r"\1, 80;", None),
    Damage("stride of 8 bytes", GRAM, r"(mov\.\w32\s+%r\d+), 72;", 0, r"\1, 76;", "16 bytes"),
    Damage("tile", GRAM, r"(wmma\.load\.a.*\[%rd\d+)\]", 0, r"\1+16]", "32 bytes"),
    Damage("layout", GRAM, r"(wmma\.mma\.sync\.aligned)\.col", 0, r"\1.row", None),
    Damage("lanes", CONTRAST, r"(mov\.\w32\s+%r\d+), 16;", 0, r"\1, 8;", None),
    Damage("mask of lanes", CONTRAST, r"(mov\.\w32\s+%r\d+), -1;", 0, r"\1, 0x7fffffff;", "mask"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_is_noticed(damage: Damage, monkeypatch):
    kernels = csrc.install.launches.kernels
    (name,) = (name for name in kernels.texts if re.search(rf"\d{damage.kernel}", name))
    monkeypatch.setattr(kernels, "parsed", {**kernels.parsed})
    kernels.parsed.pop(name, None)
    monkeypatch.setitem(kernels.texts, name, damage.apply(kernels.texts[name]))
    error = AssertionError if damage.found is None else RuntimeError
    with pytest.raises(error, match=damage.found):
        judge(LOSSES[2], damage.case, torch.bfloat16, "native")
