"""All that a monitor has observed so far, on the device, and its form in checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repmtl_kernels._monitor.form import Form
from repmtl_kernels._monitor.history import History, Observation
from repmtl_kernels._monitor.means import RunningMeans
from repmtl_kernels._monitor.state import packed, unpacked
from repmtl_kernels._monitor.summary import SaliencyHistory, SaliencySummary
from repmtl_kernels._monitor.values import Values, split
from repmtl_kernels._training.calls import CallCount


class Record:
    """The running means and the history of one monitor."""

    def __init__(self) -> None:
        self.form: Form | None = None  # None: there was no observation
        self.observations = 0
        self.last_call = -1
        self.agreed = False  # whether the ranks of a group have compared their options
        self.means = RunningMeans()
        self.history = History()

    def add(self, call: int, values: Values, *, decay: float, keep: int) -> None:
        """Take the values of the training call of this number."""
        flat = values.flat()
        self.means.observe(flat, decay)
        kept = flat[: len(flat) - len(values.maps)].clone()
        self.history.add(Observation(self.observations, call, kept), keep)
        self.observations += 1
        self.last_call = call

    def packed(self, count: CallCount) -> Tensor:
        """Return this record and the count as one tensor. Waits for the device."""
        kept = self.history.kept
        header = {
            "calls": count.calls,
            "step": count.step,
            "observations": self.observations,
            "last_call": self.last_call,
            "form": self.form,
            "stride": self.history.stride,
            "kept": [(o.number, o.call) for o in kept],
        }
        means = [] if self.means.state is None else [self.means.state]
        return packed(header, [*means, *(o.values for o in kept)])

    @staticmethod
    def unpacked(state: Tensor, count: CallCount) -> Record:
        """Return the record of a checkpoint, and set the count."""
        header, numbers = unpacked(state)
        count.calls, count.step = header["calls"], header["step"]
        record = Record()
        if header["form"] is None:
            return record
        tasks, levels, grids = header["form"]
        record.form = Form(tuple(tasks), tuple(levels), tuple(map(tuple, grids)))
        record.observations, record.last_call = header["observations"], header["last_call"]
        record.history.stride = header["stride"]
        width = _width(len(tasks))
        size = 2 * (width + record.form.map_slices()[-1].stop)
        record.means.state = numbers[:size].view(2, -1)
        rows = numbers[size:].view(-1, width)
        record.history.kept = [
            Observation(number, call, row)
            for (number, call), row in zip(header["kept"], rows, strict=True)
        ]
        return record

    def summary(self, names: tuple[str, ...] | None) -> SaliencySummary:
        """Return what has been observed. Waits for the device.

        Args:
            names: of the tasks; None: the keys of the losses.
        """
        tasks = tuple(names or (() if self.form is None else self.form.tasks))
        width, kept = _width(len(tasks)), self.history.kept
        if self.form is None:
            means = torch.full((width,), math.nan, dtype=torch.float64, device="cpu")
            rows = means.new_empty(0, width)
        else:
            means = self.means.value().cpu()
            rows = torch.stack([o.values.cpu() for o in kept])  # a checkpoint's are there
        of_means, of_rows = split(means, len(tasks)), split(rows, len(tasks))
        maps = {}
        if self.form is not None:
            places = zip(self.form.levels, self.form.grids, self.form.map_slices(), strict=True)
            maps = {
                name: of_means.maps[where].view(len(tasks), *grid)
                for name, grid, where in places
                if grid
            }
        return SaliencySummary(
            tasks=tasks,
            observations=self.observations,
            step=self.last_call,
            cosine=of_means.cosine,
            conflicting_samples=of_means.conflicting_samples,
            conflicting_positions=of_means.conflicting_positions,
            norm_share=of_means.norm_share,
            tsr=of_means.tsr,
            csa=of_means.csa,
            ratio=of_means.ratio.item(),
            maps=maps,
            history=SaliencyHistory(
                torch.tensor([o.call for o in kept], dtype=torch.int64, device="cpu"),
                *of_rows[:-1],
            ),
        )


def _width(tasks: int) -> int:
    """Return how many values of an observation are no maps."""
    return 3 * tasks**2 + 3 * tasks + 1
