"""The regulariser of one call (eq. 10): TSR and CSA at all levels, clipped, at its strength."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import (
    accumulation_dtype,
    has_values,
    is_float16,
    is_transformed,
)
from repmtl_kernels._losses.options import Lambdas
from repmtl_kernels._training.clip import clipped
from repmtl_kernels._training.norms import share_below_float16
from repmtl_kernels._training.options import CriterionOptions, Turn
from repmtl_kernels._training.progress import Progress
from repmtl_kernels._training.step import RepMTLStep
from repmtl_kernels._training.strength import (
    LARGEST_RATIO,
    SMALLEST_RATIO,
    gradient_ratio,
    is_measured,
)
from repmtl_kernels._training.tasks import Level, Tasks
from repmtl_kernels.functional import evaluate_losses

Parts = tuple[Tensor | None, Tensor | None]


class Regularizer(NamedTuple):
    """One call's regulariser, and what it needs to know of the call.

    ``scale`` is what the saliencies have been multiplied with; None: nothing. ``group`` is the name
    of the process group whose ranks have one strength; empty: this process alone.
    """

    options: CriterionOptions
    turn: Turn
    tasks: Tasks
    scale: Tensor | None
    group: str
    progress: Progress

    def value(self, step: RepMTLStep) -> Tensor:
        """Return the term that is added to the task losses, and show its parts in ``step``."""
        saliencies = self.tasks.saliencies()
        if is_float16(saliencies[0]):
            step.underflow = {
                task.key: share_below_float16(task.own_saliencies) for task in self.tasks
            }
        if self.options.clip is None:
            value, parts = self._losses(saliencies)
        else:
            value, parts = clipped(
                self._losses,
                saliencies,
                limit=float(self.options.clip),
                mean=self.progress.size,
                factor=sum(self.turn.weighted),
                scale=self.scale,
            )
        step.tsr, step.csa = (None if part is None else part.detach() for part in parts)
        ratio = self._measured_ratio(value)
        if self.options.strength is not None:
            strength = self._strength(value, ratio is not None)
            value = strength * value
            ratio = None if ratio is None else ratio * strength
        if ratio is not None and has_values(ratio):
            self.progress.last_ratio = ratio
        step.ratio = self.progress.last_ratio if ratio is None else ratio
        step.regularizer, step.applied = value.detach(), True
        return value

    def _losses(self, saliencies: Sequence[Tensor]) -> tuple[Tensor, Parts]:
        """Return the weighted regulariser, and TSR and CSA; each is a mean over the levels.

        A loss that is off is None. ``saliencies``: those of the tasks, or tensors in their place.
        """
        options = self.options
        if self.scale is not None and (options.normalizer != "abs" or options.eps):
            saliencies = [s.to(accumulation_dtype(s.dtype)) / self.scale for s in saliencies]
        rows = [self._losses_of_level(level) for level in self.tasks.levels(saliencies)]
        value, tsr, csa = rows[0] if len(rows) == 1 else map(_mean, zip(*rows, strict=True))
        assert value is not None  # a loss is on
        return value, (tsr, csa)

    def _losses_of_level(self, level: Level) -> tuple[Tensor, Tensor | None, Tensor | None]:
        options, (lambda_tsr, lambda_csa) = self.options, self.turn.weighted
        total, tsr, csa = evaluate_losses(
            level.saliencies,
            tsr=options.tsr if lambda_tsr else None,
            csa=options.csa if lambda_csa else None,
            lambdas=Lambdas(lambda_tsr, lambda_csa) if lambda_tsr and lambda_csa else None,
            present=level.present if lambda_csa else None,
            positions=level.positions,
            channel_dim=options.channel_dim,
            group=options.group if lambda_csa else None,
            backend=options.backend,
        )
        if lambda_csa == 0:
            return lambda_tsr * tsr, tsr, None
        if lambda_tsr == 0:
            return lambda_csa * csa, None, csa
        return total, tsr, csa

    def _measured_ratio(self, value: Tensor) -> Tensor | None:
        """Return the ratio of the gradients without ``strength``, where it is this call's turn."""
        progress = self.progress
        if is_transformed(value) or self.turn.number < progress.calls:  # another call of its step
            return None
        if not is_measured(self.turn.applications):
            return None
        capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and not progress.ratio.is_empty:
            return None
        ratio = gradient_ratio(value, self.tasks, self.scale)
        if has_values(value):
            progress.ratio.observe(ratio / sum(self.turn.weighted))
        return ratio

    def _strength(self, value: Tensor, measured: bool) -> float | Tensor:
        """Return the factor on the lambdas; it is the same on all ranks of a group."""
        assert self.options.strength is not None
        wanted = float(self.options.strength)
        if not has_values(value):
            return wanted
        progress = self.progress
        ratio = progress.ratio.value(value.device, 1.0, self.group)
        if (
            measured
            and not progress.warned_of_weak
            and progress.weak.is_true(ratio > LARGEST_RATIO)
        ):
            progress.warned_of_weak = True
            warnings.warn(
                f"strength: the lambdas have fallen below a hundredth of {wanted:g}, since the "
                "tasks' gradient at the representation is less than a hundredth of the "
                "regulariser's at lambdas that sum to 1. Are the tasks learned? docs/tuning.md has "
                "more",
                stacklevel=7,  # past forward and the two frames of nn.Module's call
            )
        return wanted / ratio.clamp_min(SMALLEST_RATIO)


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).mean() if there else None
