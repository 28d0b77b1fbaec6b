"""The options of the criterion: their checks, the weight of each call, what ranks compare."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._distributed import Fact, Group, check_group
from repmtl_kernels._ground.checks import check_int, check_number
from repmtl_kernels._ground.saliency import accumulation_dtype, is_transformed
from repmtl_kernels._losses.options import CsaOptions, TsrOptions, facts
from repmtl_kernels._training.arguments import Weights

# Each rank has its own.
_OWN = {"compared": False}


class Turn(NamedTuple):
    """The regulariser's place in one training call, as the schedule has it."""

    number: int  # of the call; calls of one step have the same
    lambdas: tuple[float, float]  # of TSR and CSA; with `strength` their mix, which sums to 1
    weight: float  # what the schedule multiplies them with; 0: the call is without the regulariser
    applications: int  # how many calls before this one had the regulariser

    @property
    def weighted(self) -> tuple[float, float]:
        """The lambdas with their weight."""
        tsr, csa = self.lambdas
        return self.weight * tsr, self.weight * csa


def in_sums(loss: Tensor) -> Tensor:
    """Return the loss in the precision of sums: in 16 bits a sum or a logarithm would lose much."""
    return loss.to(accumulation_dtype(loss.dtype)) if loss.is_floating_point() else loss


def logarithm(loss: Tensor, offset: float) -> Tensor:
    """Return ``log(loss + offset)`` in the precision of sums."""
    loss = in_sums(loss)
    return (loss + offset if offset else loss).log()


@dataclass(frozen=True)
class CriterionOptions:
    """The options of ``RepMTL``, which documents them, as one call finds them."""

    lambda_tsr: float
    lambda_csa: float
    strength: float | None
    start: int
    ramp: int
    over: str
    normalizer: str
    tsr_temperature: float
    tsr_floor: float
    csa_temperature: float
    eps: float
    log_losses: bool
    log_offset: float
    clip: float | None
    task_weights: Weights | None = field(metadata=_OWN)
    scaler: torch.amp.GradScaler | None = field(metadata=_OWN)
    every: int
    monitor: Any = field(metadata=_OWN)  # a SaliencyMonitor or None; RepMTL checks it
    channel_dim: int = field(metadata=_OWN)
    group: Group | None = field(metadata=_OWN)
    memory: str = field(metadata=_OWN)
    backend: str = field(metadata=_OWN)

    def check(self) -> None:
        """Raise if an option is not as described.

        Each call checks them again, since a schedule may have set them.
        """
        check_number("lambda_tsr", self.lambda_tsr, minimum=0)
        check_number("lambda_csa", self.lambda_csa, minimum=0)
        if self.strength is not None:
            check_number("strength", self.strength, minimum=0)
        self.tsr.check(TsrOptions.prefix, torch.float32)
        self.csa.check(CsaOptions.prefix, torch.float32)
        check_group(self.group)
        if not isinstance(self.log_losses, bool):
            raise TypeError(f"log_losses: expected a bool, got {type(self.log_losses).__name__}")
        log_offset = check_number("log_offset", self.log_offset, minimum=0)
        if log_offset and not self.log_losses:
            raise ValueError(
                "log_offset: it is added to the losses before their logarithm; expected 0 without "
                f"log_losses=True, got {log_offset!r}"
            )
        if self.clip is not None:
            check_number("clip", self.clip, minimum=0, exclusive=True)
        if not (self.scaler is None or isinstance(self.scaler, torch.amp.GradScaler)):
            raise TypeError(
                f"scaler: expected a torch.amp.GradScaler or None, got {type(self.scaler).__name__}"
            )
        check_int("start", self.start, minimum=0)
        check_int("ramp", self.ramp, minimum=0)
        check_int("every", self.every, minimum=1)

    @property
    def tsr(self) -> TsrOptions:
        """The options of TSR."""
        return TsrOptions(
            self.over, self.normalizer, self.tsr_temperature, self.tsr_floor, self.eps
        )

    @property
    def csa(self) -> CsaOptions:
        """The options of CSA."""
        return CsaOptions(self.csa_temperature, self.eps, self.memory)

    def turn(self, number: int) -> Turn:
        """Return what the schedule gives the training call of this number."""
        lambdas = float(self.lambda_tsr), float(self.lambda_csa)
        if self.strength is not None:
            total = sum(lambdas)
            on = bool(self.strength and total)
            lambdas = (lambdas[0] / total, lambdas[1] / total) if on else (0.0, 0.0)
        since = number - self.start
        weight = 0.0
        if any(lambdas) and since >= 0 and since % self.every == 0:
            weight = self.every * (since + 1) / self.ramp if since + 1 < self.ramp else self.every
        return Turn(number, lambdas, weight, since // self.every)

    def objective(self, loss: Tensor) -> Tensor:
        """Return what is differentiated: the loss, or its logarithm."""
        return logarithm(loss, float(self.log_offset)) if self.log_losses else in_sums(loss)

    def scale(self, device: torch.device) -> Tensor | None:
        """Return what the scaler multiplies the saliencies with, a scalar; None: nothing."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), dtype=torch.float32, device=device))

    def check_observable(self, total: Tensor) -> None:
        """Raise if gradients that are taken in the call, or running means, would be lost."""
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export loses gradients that are taken inside the graph, and saliencies are "
                "such; expected RepMTL in eval() mode there. In training, export a module with "
                "RepMTLLoss that is given the saliencies"
            )
        if (self.strength is not None or self.clip is not None) and is_transformed(total):
            raise ValueError(
                "strength and clip keep running means, which torch.func and torch.compile would "
                "lose; expected both to be None there. Compile the encoder alone, or use lambdas"
            )

    def facts(self, calls: int) -> list[Fact]:
        """Return what all ranks of a group must share; ``calls``: the training calls so far."""
        count = Fact(
            calls,
            "the same number of training calls before this one",
            remedy=". Load the checkpoint on every rank, not on one, and skip a batch on all",
        )
        of_losses = facts(self.tsr, self.csa)
        own = [
            Fact(getattr(self, option.name), f"the same {option.name}")
            for option in fields(self)
            if option.name not in of_losses and option.metadata.get("compared", True)
        ]
        watched = None if self.monitor is None else self.monitor.every
        monitor = Fact(watched, "a monitor with the same every, or none,")
        return [count, *of_losses.values(), *own, monitor]
