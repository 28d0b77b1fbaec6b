"""The options of each loss: their defaults, their checks and how they are listed.

A new option is one field here, its check and its use. The operators' schema and the comparison of
the ranks of a process group follow from the fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from repmtl_kernels._distributed import Fact
from repmtl_kernels._ground.checks import check_choice, check_number
from repmtl_kernels._ground.saliency import NORMALIZERS, OVER

MEMORY = ("auto", "save", "recompute")

T = TypeVar("T")


def _option(
    default: T, *, choices: tuple[str, ...] = (), prefixed: bool = False, compared: bool = True
) -> T:
    """Return a dataclass's field for an option.

    Args:
        default: the default of the option.
        choices: the values that it may have, if it is text.
        prefixed: the keyword starts with the loss's prefix where two losses share a call.
        compared: all ranks of a process group must have the same value.
    """
    metadata = {"choices": choices, "prefixed": prefixed, "compared": compared}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class TsrOptions:
    """The options of TSR; :func:`repmtl_kernels.tsr_loss` documents them."""

    prefix: ClassVar[str] = "tsr_"

    over: str = _option("tasks", choices=OVER)
    normalizer: str = _option("abs", choices=NORMALIZERS)
    temperature: float = _option(1.0, prefixed=True)
    floor: float = _option(0.0, prefixed=True)
    eps: float = _option(0.0)

    def check(self, prefix: str = "", dtype: torch.dtype = torch.float64) -> TsrOptions:
        """Return these options with their numbers as floats. Raise if one is not as documented.

        Args:
            prefix: what messages put before the keywords that have a prefix.
            dtype: the one that the loss is computed in; the widest if that is not known.
        """
        check_choice("over", self.over, OVER)
        check_choice("normalizer", self.normalizer, NORMALIZERS)
        temperature = check_number(
            f"{prefix}temperature",
            self.temperature,
            minimum=0,
            exclusive=True,
            dtype=dtype,
            normal=True,
        )
        floor = check_number(f"{prefix}floor", self.floor, minimum=0, dtype=dtype, normal=True)
        if floor != 0 and self.normalizer != "abs":
            raise ValueError(
                f"{prefix}floor: it is a share of the mean of |x|, for normalizer='abs'; expected "
                f"0 with normalizer={self.normalizer!r}, got {self.floor!r}"
            )
        eps = check_number("eps", self.eps, minimum=0, dtype=dtype)
        return TsrOptions(self.over, self.normalizer, temperature, floor, eps)


@dataclass(frozen=True, slots=True)
class CsaOptions:
    """The options of CSA; :func:`repmtl_kernels.csa_loss` documents them."""

    prefix: ClassVar[str] = "csa_"

    temperature: float = _option(0.5, prefixed=True)
    eps: float = _option(0.0)
    memory: str = _option("auto", choices=MEMORY, compared=False)

    @property
    def recompute(self) -> bool:
        """Whether the backward makes the Gram matrices again, instead of saving them."""
        return self.memory == "recompute"

    def check(self, prefix: str = "", dtype: torch.dtype = torch.float64) -> CsaOptions:
        """Return these options with their numbers as floats. Raise if one is not as documented.

        Args:
            prefix: what messages put before the keywords that have a prefix.
            dtype: the one that the loss is computed in; the widest if that is not known.
        """
        temperature = check_number(
            f"{prefix}temperature",
            self.temperature,
            minimum=0,
            exclusive=True,
            dtype=dtype,
            normal=True,
        )
        eps = check_number("eps", self.eps, minimum=0, dtype=dtype)
        check_choice("memory", self.memory, MEMORY)
        return CsaOptions(temperature, eps, self.memory)


@dataclass(frozen=True, slots=True)
class Lambdas:
    """The weights of both losses in :func:`repmtl_kernels.rep_mtl_loss`."""

    prefix: ClassVar[str] = "lambda_"

    tsr: float = _option(0.01, prefixed=True)
    csa: float = _option(0.01, prefixed=True)

    def check(self, dtype: torch.dtype = torch.float64) -> Lambdas:
        """Return them as floats. Raise if one is not a number of at least 0 in ``dtype``."""
        return Lambdas(
            check_number("lambda_tsr", self.tsr, minimum=0, dtype=dtype),
            check_number("lambda_csa", self.csa, minimum=0, dtype=dtype),
        )

    def total(self, tsr: Tensor, csa: Tensor) -> Tensor:
        """Return the regulariser of eq. 10."""
        return self.tsr * tsr + self.csa * csa


def facts(*options: TsrOptions | CsaOptions | Lambdas, prefixed: bool = True) -> dict[str, Fact]:
    """Return the options that all ranks of a group must share, by keyword.

    ``prefixed``: the keywords are those of a call that two losses share.
    """
    by_keyword = {}
    for part in options:
        for option in fields(part):
            if option.metadata["compared"]:
                prefix = part.prefix if prefixed and option.metadata["prefixed"] else ""
                keyword = prefix + option.name
                value, choices = getattr(part, option.name), option.metadata["choices"]
                by_keyword[keyword] = Fact(value, f"the same {keyword}", choices)
    return by_keyword
