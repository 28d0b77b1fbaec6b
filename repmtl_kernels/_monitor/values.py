"""The values of one observation, and the sums that they are made of.

Both are float64, on the device of the saliencies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._monitor.form import Form


class Values(NamedTuple):
    """The values of one observation, or means of them. NaN: there was nothing to observe.

    The fields are those of :class:`SaliencySummary`. ``maps`` comes last, and has all levels' maps
    in one dimension.
    """

    cosine: Tensor  # (T, T)
    conflicting_samples: Tensor  # (T, T)
    conflicting_positions: Tensor  # (T, T)
    norm_share: Tensor  # (T,)
    tsr: Tensor  # (T,)
    csa: Tensor  # (T,)
    ratio: Tensor  # ()
    maps: Tensor

    def flat(self) -> Tensor:
        """Return all values in one dimension."""
        return torch.cat([value.flatten() for value in self])


def split(flat: Tensor, tasks: int) -> Values:
    """Return the values from :meth:`Values.flat` of T tasks; dimensions before the last stay."""
    sizes = [tasks**2] * 3 + [tasks] * 3 + [1]
    *fields, ratio, maps = flat.split([*sizes, flat.shape[-1] - sum(sizes)], -1)
    pairs = [field.unflatten(-1, (tasks, tasks)) for field in fields[:3]]
    return Values._make([*pairs, *fields[3:], ratio.squeeze(-1), maps])


class Sums(NamedTuple):
    """Numerators and denominators of the values. The sums of several ranks add up."""

    cosines: Tensor  # (T, T): over samples
    conflicts: Tensor  # (T, T): samples with a cosine below 0
    samples: Tensor  # (T, T): samples where both tasks have a saliency
    position_conflicts: Tensor  # (T, T): positions with a product below 0
    positions: Tensor  # (T, T): positions where both tasks have a saliency
    square_norms: Tensor  # (T,)
    present: Tensor  # (T,): the ranks where the task has a loss
    tsr: Tensor  # (L, T): over samples and positions of each level
    tsr_positions: Tensor  # (L,)
    csa: Tensor  # (T,): over samples and levels
    csa_samples: Tensor  # (T,)
    ratio: Tensor  # ()
    ratios: Tensor  # ()
    maps: Tensor  # norms over channels, flat as in Values
    map_samples: Tensor  # like maps: the samples that have the position

    @staticmethod
    def zeros(form: Form, like: Tensor) -> Sums:
        """Return sums of nothing, on the device of ``like``."""
        tasks, levels = len(form.tasks), len(form.grids)
        maps = form.map_slices()[-1].stop
        pairs, rows = [(tasks, tasks)] * 5, [(tasks,)] * 2
        shapes = [*pairs, *rows, (levels, tasks), (levels,), *rows, (), (), (maps,), (maps,)]
        return Sums(*(like.new_zeros(shape, dtype=torch.float64) for shape in shapes))

    def summed(self, group: str) -> Sums:
        """Return the sums over the ranks of the group with this name, from one collective."""
        flat = torch.cat([part.flatten() for part in self])
        pieces = _distributed.summed(flat, group).split([part.numel() for part in self])
        return Sums(*(piece.view_as(part) for piece, part in zip(pieces, self, strict=True)))

    def values(self, form: Form) -> Values:
        """Return the values; a quotient of two zeros is NaN."""
        nothing = self.present == 0
        norms = self.square_norms.sqrt()
        # A level that only absent tasks depend on has no TSR.
        has_tsr = self.tsr_positions > 0
        tsr = (self.tsr / self.tsr_positions[:, None]).where(has_tsr[:, None], 0)
        return Values(
            cosine=self.cosines / self.samples,
            conflicting_samples=self.conflicts / self.samples,
            conflicting_positions=self.position_conflicts / self.positions,
            norm_share=(norms / finite(norms.sum())).masked_fill(nothing, math.nan),
            tsr=(tsr.sum(0) / has_tsr.sum()).masked_fill(nothing, math.nan),
            csa=self.csa / self.csa_samples,
            ratio=self.ratio / self.ratios,
            maps=self._relative_maps(form),
        )

    def _relative_maps(self, form: Form) -> Tensor:
        """Return the maps, each over its own mean."""
        parts = [self.maps.new_empty(0)]
        for where in form.map_slices():
            sums, samples = (x[where].view(len(form.tasks), -1) for x in self[-2:])
            here = samples > 0
            means = (sums / samples).where(here, 0).sum(1) / here.sum(1)
            parts.append((sums / samples / finite(means)[:, None]).flatten())
        return torch.cat(parts)


def finite(total: Tensor) -> Tensor:
    """Return a denominator that is NaN where it is infinite: a share of it would be 0."""
    return total + 0 * total
