"""The monitor: a module that observes some of the training calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._distributed import Fact, Group, check_group
from repmtl_kernels._ground.checks import check_int, check_number, checked_step
from repmtl_kernels._ground.saliency import has_values, is_transformed
from repmtl_kernels._monitor.form import Form, check_form, form_of
from repmtl_kernels._monitor.names import checked_names
from repmtl_kernels._monitor.record import Record
from repmtl_kernels._monitor.report import TITLE, write_report
from repmtl_kernels._monitor.statistics import sums_of
from repmtl_kernels._monitor.summary import SaliencySummary
from repmtl_kernels._training.arguments import Positions, Representation, TaskLosses
from repmtl_kernels._training.calls import CallCount, FirstReplica
from repmtl_kernels._training.saliencies import check_graph, take_saliencies
from repmtl_kernels._training.tasks import Tasks
from repmtl_kernels.modules import LossModule


class SaliencyMonitor(LossModule):
    """Watches what the tasks do to each other: which pull ``Z`` the same way, and which conflict.

    It observes the saliencies ``S_t = dL_t/dZ`` of some training calls, and keeps running means and
    a history: cosines, conflicts, norms, the tasks' terms of TSR and CSA, and where each task's
    saliency is. See :class:`SaliencySummary`. A criterion has the saliencies already::

        monitor = SaliencyMonitor()
        criterion = RepMTL(monitor=monitor)
        ...
        print(monitor.summary().cosine)

    Around any other loop it is called with the losses, before ``backward()``::

        monitor(losses, z)
        sum(losses).backward()

    It takes saliencies on its turns alone, and keeps graph, gradients, random numbers and ``.grad``
    as they were. Other calls cost a counter. No call waits for the device, unless a ``group`` has
    no backend for the CPU; :meth:`summary` does.
    Nothing is observed in ``eval()`` mode, under ``torch.no_grad()``, on meta or fake tensors, and
    while a CUDA graph is captured: a replay repeats the kernels alone and is not counted, so set
    ``every=1`` and make a call without the graph now and then. The first of the replicas that
    ``nn.DataParallel`` makes observes.

    The count of calls, the running means and the history are part of ``state_dict()``; a checkpoint
    without them leaves them as they are.

    Args:
        every: observe every ``every``-th training call, the first included. A ``RepMTL`` that
            applies its regulariser on this call has the saliencies; on other calls they cost a
            backward pass of the heads.
        decay: from 0 to below 1; the share of a running mean that an observation leaves as it was.
            At 0.9 a mean follows about the last ten observations.
        names: of the tasks, in the order of the losses. None: the keys of the losses, or their
            indices.
        channel_dim: option of :func:`tsr_loss`. In a :class:`RepMTL` that of the criterion counts.
        group: option of :func:`csa_loss`: observe the samples of all ranks, which get the same
            summary. None: that of the criterion, or this process alone.
        keep: at least 2; the history has at most so many observations. If there are more, every
            second one is dropped, and from then on every second one is left out. The first one and
            the last one stay.
        backend: option of :func:`tsr_loss`. With ``"reference"`` the stages of ``"eager"`` run.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    every: int
    decay: float
    names: tuple[str, ...] | None
    group: Group | None
    keep: int

    def __init__(
        self,
        *,
        every: int = 50,
        decay: float = 0.9,
        names: Sequence[str] | None = None,
        channel_dim: int = 1,
        group: Group | None = None,
        keep: int = 512,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            every=every,
            decay=decay,
            names=None if names is None else checked_names(names),
            channel_dim=channel_dim,
            group=group,
            keep=keep,
            backend=backend,
        )
        self._check_options()
        self._count = CallCount()
        self._record = Record()
        self._replicas = FirstReplica()
        self._is_first = True  # among the replicas of a forward pass

    def forward(
        self,
        losses: TaskLosses,
        representation: Representation,
        present: Tensor | None = None,
        positions: Positions | None = None,
        step: int | None = None,
    ) -> None:
        """Observe one training call, if it is its turn.

        Args:
            losses: as for :class:`RepMTL`, each with its graph, which stays; None for an absent
                task. With a ``GradScaler`` and heads in float16, pass the scaled losses: no value
                depends on their scale.
            representation: as for :class:`RepMTL`: the tensor that the heads were given, or
                :class:`Levels`, or one for each task.
            present: bool ``(T, B)``, which task has a label for which sample. A sample without does
                not count for that task.
            positions: bool ``(B, *spatial)``, False where there is padding; with :class:`Levels`
                one for each.
            step: the number of the optimiser's step. Calls in a row with the same number are one,
                and the first of them is observed.

        Raises:
            ValueError, TypeError: an argument is not as described, in a call that is observed.
        """
        self._check_options()
        if step is not None:
            step = checked_step(step)
        if not all(map(has_values, _tensors(losses))):
            return
        if self.is_due(step, losses):
            group = self.group_name("")
            with _distributed.meeting(group, (losses, representation), self.facts()):
                tasks = Tasks(losses, representation, absent=True)
                self.check_observable(tasks[0].loss)
                tasks.place(representation)
                check_graph(tasks)
                tasks.check_batch(present, positions, self.channel_dim)
                take_saliencies(tasks, create_graph=False)
                form = self.form(tasks, self.channel_dim)
            self.observe(tasks, form, self.channel_dim, group, None)
        self.count(step)

    def summary(self) -> SaliencySummary:
        """Return all that has been observed so far. Waits for the device.

        Raises:
            ValueError: ``names`` are not as many as the tasks, or are the keys of the losses in
                another order.
        """
        if self._record.form is not None:
            self._check_names(self._record.form)
        return self._record.summary(self.names)

    def report(self, path: str | os.PathLike[str], *, title: str = TITLE) -> None:
        """Write what has been observed as one HTML page. Waits for the device.

        Args:
            path: the file, which is overwritten.
            title: heading of the page.

        Raises:
            ValueError, TypeError, OSError: as for :meth:`summary` and :func:`write_report`.
        """
        write_report(self.summary(), path, title=title)

    # For the criterion, which makes the call.

    def is_due(self, step: int | None, losses: TaskLosses) -> bool:
        """Return whether the call that is being made is observed.

        Ranks have to know it before the arguments are checked, so the losses may be anything.
        """
        count, there = self._count, _tensors(losses)
        if not self._watches() or count.number(step) < count.calls or count.calls % self.every:
            return False
        if not all(map(has_values, there)):
            return False
        capturing = any(x.is_cuda for x in there) and torch.cuda.is_current_stream_capturing()
        return not capturing

    def group_name(self, other: str) -> str:
        """Return the name of the group that observes; ``other`` where the monitor has none."""
        return other if self.group is None else _distributed.name_of(self.group)

    def facts(self) -> list[Fact]:
        """Return what all ranks of a group must share in an observed call."""
        return [
            Fact(
                self._count.calls,
                "the same number of monitored training calls before this one",
                remedy=". Load the checkpoint on every rank, not on one",
            ),
            Fact(self.every, "the same every of the monitor"),
        ]

    def count(self, step: int | None) -> None:
        """Remember that a call is done."""
        if self._watches():
            self._count.count(self._count.number(step), step)

    def check_observable(self, loss: Tensor) -> None:
        """Raise if the observation of this call would be lost."""
        if is_transformed(loss) or torch.compiler.is_exporting():
            raise ValueError(
                "monitor: it keeps running means, which torch.func, torch.compile and torch.export "
                "would lose; expected a call outside of them. Compile the encoder alone, or call "
                "monitor.eval() first"
            )

    def form(self, tasks: Tasks, channel_dim: int) -> Form:
        """Return the form of the observations. Raise if this call does not have it."""
        form = self._record.form
        if form is None:
            form = form_of(tasks, channel_dim)
        check_form(form, tasks, channel_dim)
        self._check_names(form)
        return form

    def observe(
        self, tasks: Tasks, form: Form, channel_dim: int, group: str, ratio: Tensor | None
    ) -> None:
        """Observe the call that is being made, from its saliencies.

        Args:
            tasks: with saliencies and masks.
            form: from :meth:`form`.
            channel_dim: dimension of the channels.
            group: from :meth:`group_name`. Its ranks have met in this call.
            ratio: that of the criterion; None: it is not known.
        """
        if group and not self._record.agreed:
            form = self._agree(form, tasks, group)
        sums = sums_of(tasks, form, channel_dim=channel_dim, backend=self.backend, ratio=ratio)
        if group:
            sums = sums.summed(group)
        self._record.form = form
        self._record.add(
            self._count.calls, sums.values(form), decay=float(self.decay), keep=self.keep
        )

    def forget_step(self) -> None:
        """Take the next call for one of another step than the last one's, whatever its number."""
        self._count.step = None

    def _agree(self, form: Form, tasks: Tasks, group: str) -> Form:
        """Return the form with maps that have room for all ranks'. Raise if other things differ."""
        grids = []
        for grid in form.grids:
            facts = [
                *self.facts(),
                Fact(len(form.tasks), "the same number of tasks in the monitor"),
                Fact(len(form.grids), "the same number of levels in the monitor"),
                Fact(len(grid), "the same dimensions of positions in the monitor"),
            ]
            # Ranks may have images of different sizes.
            own = [*grid, *[0] * (3 - len(grid))]
            rows = _distributed.agree(group, facts, tasks.saliencies(), own)
            grids.append(tuple(int(max(sides)) for sides in zip(*rows, strict=True))[: len(grid)])
        self._record.agreed = True
        return form._replace(grids=tuple(grids))

    def _watches(self) -> bool:
        return self.training and self._is_first and torch.is_grad_enabled()

    def _check_options(self) -> None:
        check_int("every", self.every, minimum=1)
        check_int("keep", self.keep, minimum=2)
        if check_number("decay", self.decay, minimum=0) >= 1:
            raise ValueError(f"decay: expected a number from 0 to below 1; got {self.decay!r}")
        check_group(self.group)

    def _check_names(self, form: Form) -> None:
        if self.names is not None and len(self.names) != len(form.tasks):
            raise ValueError(
                f"names: expected {len(form.tasks)}, one for each of the tasks "
                f"{list(form.tasks)}; got {len(self.names)}"
            )
        # New names for the keys are fine; the keys themselves in another order are a mix-up.
        if self.names not in (None, form.tasks) and set(self.names) == set(form.tasks):
            raise ValueError(
                f"names: expected the order of the losses, {list(form.tasks)}; got "
                f"{list(self.names)}. A dict of losses needs no names"
            )

    def get_extra_state(self) -> Tensor:
        """Return count, means and history, for ``state_dict()``. Waits for the device."""
        return self._record.packed(self._count)

    def set_extra_state(self, state: Tensor) -> None:
        """Take on the state of a checkpoint."""
        self._record = Record.unpacked(state, self._count)

    def _replicate_for_data_parallel(self) -> SaliencyMonitor:
        # Their calls are one. The others would only add the same call again.
        replica = super()._replicate_for_data_parallel()
        replica._is_first = self._replicas.is_first(replica, self._count.calls)
        return replica


def _tensors(losses: TaskLosses) -> list[Tensor]:
    values = losses.values() if isinstance(losses, Mapping) else losses
    if not isinstance(losses, list | tuple | Mapping):  # Tasks says what is wrong
        return []
    return [loss for loss in values if isinstance(loss, Tensor)]
