"""Rep-MTL as a weighting strategy of LibMTL's ``Trainer``; needs nothing of LibMTL to be imported.

::

    from repmtl_kernels.integrations.libmtl import register

    trainer = Trainer(
        weighting=register(),
        rep_grad=True,
        weight_args={"lambda_tsr": 0.01, "lambda_csa": 0.01},
        arch_args={},
        ...
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from repmtl_kernels._training.arguments import Copies
from repmtl_kernels._training.levels import levels_of
from repmtl_kernels.criterion import RepMTL


class RepMTLWeighting(nn.Module):
    """Weighting strategy of LibMTL with the objective of :class:`RepMTL`.

    Single and multi-input, with any architecture of LibMTL that supports ``rep_grad=True``, which
    it needs. The Trainer takes the name that :func:`register` gives; where it takes a class (LibMTL
    1.1.5), this one. An encoder that has several shared representations returns :class:`Levels` of
    them; LibMTL takes a plain list for one per task.

    ``weight_args`` are the options of :class:`RepMTL`; tasks go by their names in ``task_dict``,
    e.g. ``{"task_weights": {"segmentation": 1.0, "depth": 0.5}}``. They may change between steps.
    ``trainer.model.criterion.last`` has the values of the last step. CSA needs batches of two
    samples at least: ``DataLoader(drop_last=True)``. For the fast second-order pass, call
    ``convert_second_order(decoders)`` first.
    """

    # LibMTL's Trainer sets them.
    rep_grad: bool
    rep: Any
    rep_tasks: Mapping[str, Any]
    task_name: Sequence[str]
    task_num: int

    def init_param(self) -> None:
        """Make the criterion; LibMTL's Trainer calls it before it loads a checkpoint."""
        # LibMTL has no options here yet. The criterion exists all the same, so that its state is
        # part of the model's from the start, and `load_path` restores it.
        self.criterion = RepMTL()
        self._options: dict[str, Any] = {}
        self._state_of_monitor: Tensor | None = None

    def backward(self, losses: Tensor, **weight_args: Any) -> np.ndarray:
        """Add the gradients of the total to all parameters' ``.grad``.

        Args:
            losses: ``(T,)``, as the Trainer stacks them.
            weight_args: options of :class:`RepMTL`.

        Returns:
            The weights of the task losses, ``(T,)``.

        Raises:
            ValueError, TypeError: ``rep_grad`` is False, ``losses`` is not of shape ``(T,)``, or
                :class:`RepMTL` raises.
        """
        if not self.rep_grad:
            raise ValueError(
                "rep_grad: Rep-MTL needs the gradients of the representation; expected "
                "Trainer(rep_grad=True), got False"
            )
        if losses.shape != (self.task_num,):
            raise ValueError(
                f"losses: expected shape ({self.task_num},), one for each of {self.task_name}; "
                f"got {tuple(losses.shape)}"
            )
        criterion = self._criterion(weight_args)
        # The architecture has given every task a leaf of its own with a copy of the
        # representation, so what is differentiated with respect to it is this task's branch alone.
        # A stack costs nothing here, therefore, and clone() says so: RepMTL refuses the elements
        # of one, rightly so where tasks share a representation.
        separate = {task: losses[t].clone() for t, task in enumerate(self.task_name)}
        form = dict if isinstance(self.rep, dict) else Copies
        leaves = form((task, self.rep_tasks[task]) for task in self.task_name)
        criterion(separate, leaves).backward()
        representations: list[Tensor] = []
        grads: list[Tensor] = []
        for task, leaf in leaves.items():
            own = self.rep[task] if isinstance(self.rep, dict) else self.rep
            for z, copy in zip(levels_of(own), levels_of(leaf), strict=True):
                if copy.grad is not None:  # a task may leave out a level
                    representations.append(z)
                    grads.append(copy.grad)
        torch.autograd.backward(representations, grads)
        weights = cast("Mapping[str, float] | None", criterion.task_weights)  # as the losses are
        return np.array([1.0 if weights is None else weights[task] for task in self.task_name])

    def _criterion(self, options: dict[str, Any]) -> RepMTL:
        if options != self._options:
            progress = self.criterion._progress
            self.criterion = RepMTL(**options).train(self.training)
            self.criterion._progress = progress
            progress.agreed = False  # the ranks of a group compare the options again
            self._options = dict(options)
            if self.criterion.monitor is not None and self._state_of_monitor is not None:
                self.criterion.monitor.set_extra_state(self._state_of_monitor)
            self._state_of_monitor = None
        return self.criterion

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        # A checkpoint comes before the first step, and the monitor with that step.
        if self.criterion.monitor is None:
            self._state_of_monitor = state_dict.get(f"{prefix}criterion.monitor._extra_state")


def register(name: str = "RepMTL") -> str:
    """Make :class:`RepMTLWeighting` known to LibMTL under ``name``, and return the name.

    Raises:
        ValueError: LibMTL has another weighting of that name.
    """
    import LibMTL.weighting as weightings

    if getattr(weightings, name, RepMTLWeighting) is not RepMTLWeighting:
        raise ValueError(f"name: LibMTL has a weighting {name!r} already; choose another name")
    setattr(weightings, name, RepMTLWeighting)
    return name
