"""Rep-MTL in Lightning.

A LightningModule of your own needs nothing from here: make :class:`repmtl_kernels.RepMTL` one of
its submodules and return ``self.criterion(losses, z)`` from ``training_step``. Lightning then
switches it between training and validation and puts its state into checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from repmtl_kernels._training.levels import Levels, levels_of
from repmtl_kernels.criterion import RepMTL

Targets = Mapping[str, Any]
Present = Mapping[str, Tensor | None]
Batch = tuple[Any, Targets] | tuple[Any, Targets, Present]


class RepMTLModule(LightningModule):
    """An encoder and the heads of its tasks, trained with :class:`RepMTL`.

    A subclass adds the optimiser::

        class Scenes(RepMTLModule):
            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=1e-4)

        Scenes(
            encoder,
            heads={"segmentation": ..., "depth": ...},
            losses={"segmentation": nn.CrossEntropyLoss(), "depth": nn.L1Loss()},
            criterion=RepMTL(lambda_tsr=0.01, lambda_csa=0.01),
        )

    ``Trainer.fit``, ``validate`` and ``test`` take batches ``(inputs, targets)``, ``targets`` a
    dict by task. A task that it lacks, or that is None, is absent from this batch. CSA needs
    batches of two samples at least: ``DataLoader(drop_last=True)``.

    Where some samples of a batch have no label of a task, a batch is ``(inputs, targets,
    present)``. ``present`` is a dict of bool masks ``(B,)`` by task; a task that it lacks, or that
    is None, is labelled throughout. Targets of unlabelled samples may be anything of the right
    shape. The loss of a task is given the labelled samples alone: all tensors of its prediction and
    its target, also those in dicts, lists and tuples, have the batch as their first dimension (a
    scalar has none and stays). A task without any labelled sample is absent. A dataset gives such
    batches with the items ``(x, {"depth": y, ...}, {"depth": True, ...})``. The masks stay on the
    host, so that no step waits for the device; masks that your own code moves there cost a wait.

    ``Trainer.predict`` takes these batches too, and gives a dict of the predictions of all tasks
    for each. A batch is one of these if it is a tuple or list of two or three items whose second is
    a dict; of any other form, also a pair of tensors or a dict, it is the inputs as a whole.

    Logged in training: ``train/loss`` (the total), ``train/loss/<task>``, and on steps with the
    regulariser ``train/tsr``, ``train/csa`` and ``train/ratio`` (see ``RepMTL.last``); in
    validation ``val/loss`` (the tasks alone) and ``val/loss/<task>``, in testing ``test/loss`` and
    ``test/loss/<task>``, means over all samples of all processes, for a task over those with its
    label. A batch without any label is an error in training, and left out in the other two.

    Every precision and ``accumulate_grad_batches`` of the Trainer work as usual. ``every``,
    ``start`` and ``ramp`` of the criterion count batches; an optimiser that calls its closure
    several times a batch, as LBFGS does, counts as one. CSA contrasts the samples of one batch.
    Training with DDP, absent tasks need ``find_unused_parameters=True`` and have to be the same on
    all ranks.

    Args:
        encoder: from the inputs of a batch to the shared representation ``(B, C, *spatial)``; or to
            a list, tuple, dict or :class:`Levels` of several, which the heads are given as it is.
        heads: one module per task, from the representation to the prediction.
        losses: one callable per task, ``loss(prediction, target)``, a scalar.
        criterion: None: ``RepMTL()``.
        second_order: run the heads under ``criterion.second_order()``. False where heads use
            ``torch.utils.checkpoint``, which runs them again outside of it, with PyTorch's own
            derivatives and a warning: these enter :func:`second_order` inside the checkpointed
            function, or are converted by :func:`convert_second_order`.

    Raises:
        ValueError: ``heads`` and ``losses`` are not of the same tasks.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: Mapping[str, nn.Module],
        losses: Mapping[str, Callable[[Any, Any], Tensor]],
        criterion: RepMTL | None = None,
        second_order: bool = True,
    ) -> None:
        super().__init__()
        if heads.keys() != losses.keys():
            raise ValueError(f"losses: expected the tasks of heads, {[*heads]}; got {[*losses]}")
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)
        self.criterion = RepMTL() if criterion is None else criterion
        self.second_order = second_order
        self.losses = dict(losses)
        # Losses that are modules, e.g. with class weights, move to the device and into checkpoints.
        self.loss_modules = nn.ModuleDict(
            {task: loss for task, loss in losses.items() if isinstance(loss, nn.Module)}
        )

    def forward(self, inputs: Any) -> dict[str, Any]:
        """Return the predictions of all tasks."""
        z = self.encoder(inputs)
        return {task: head(z) for task, head in self.heads.items()}

    def on_train_start(self) -> None:
        """Forget the number of the last batch: they begin again."""
        self.criterion._forget_step()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the total of the criterion, and log it."""
        total = self._total(batch, "train")
        last = self.criterion.last
        assert total is not None and last is not None
        if last.tsr is not None:
            self.log("train/tsr", last.tsr)
        if last.csa is not None:
            self.log("train/csa", last.csa)
        if last.ratio is not None:
            self.log("train/ratio", last.ratio)
        return total

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the losses of a batch."""
        self._total(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the losses of a batch."""
        self._total(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the predictions of all tasks."""
        return self(batch[0] if _has_targets(batch) else batch)

    # wraps: for Lightning it is then no hook of the user's, which it warns of beside a DataModule.
    @functools.wraps(LightningModule.transfer_batch_to_device)
    def transfer_batch_to_device(  # type: ignore[override]
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch to the device, but for its masks."""
        move = super().transfer_batch_to_device
        if not _has_masks(batch):  # perhaps of a form that a subclass has a step for
            return move(batch, device, dataloader_idx)
        inputs, targets, present = batch
        # A proxy, since DDP moves what is in a dict.
        return *move((inputs, targets), device, dataloader_idx), MappingProxyType(present)

    def _total(self, batch: Batch, stage: str) -> Tensor | None:
        """Return and log the criterion's total; None if a batch to evaluate has no label."""
        if not _has_targets(batch):
            raise TypeError(
                "batch: expected (inputs, targets) or (inputs, targets, present), with targets a "
                f"dict by task; got {_form(batch)}"
            )
        inputs, targets, present = batch if len(batch) == 3 else (*batch, None)
        z = self.encoder(inputs)
        representation = z if isinstance(z, Tensor) else Levels(z)
        size = _batch_size(representation)
        step = self._batch_number()
        masks = self._masks(targets, present, size)
        rows = {task: mask.nonzero().squeeze(1) for task, mask in masks.items()}
        with self.criterion.second_order(step) if self.second_order else nullcontext():
            losses = {
                task: self._loss(task, z, targets.get(task), rows.get(task), size)
                for task in self.heads
            }
        there = [loss for loss in losses.values() if loss is not None]
        total = None
        if there or stage == "train":  # without any, in training, the criterion says what to do
            mask = None
            if masks and there:
                all_samples = next(iter(masks.values())).new_ones(size)
                mask = torch.stack([masks.get(task, all_samples) for task in self.heads])
                mask = mask.to(there[0].device, non_blocking=True)
            total = self.criterion(losses, representation, mask, step=step)
        self._log_loss(stage, "loss", total, size, prog_bar=True)
        for task, loss in losses.items():
            self._log_loss(stage, f"loss/{task}", loss, len(rows.get(task, range(size))))
        return total

    def _batch_number(self) -> int | None:
        """Return the number of this training batch; None if no Trainer trains."""
        if self._trainer is None or not self.trainer.training:
            return None
        return self.trainer.fit_loop.total_batch_idx

    def _masks(self, targets: Targets, present: Any, size: int) -> dict[str, Tensor]:
        """Return the checked masks of ``present``, for the tasks that have one."""
        if present is None:
            return {}
        if not isinstance(present, Mapping):
            raise TypeError(
                "batch: present, its third item: expected a dict of bool masks by task; got "
                f"{_form(present)}"
            )
        if unknown := [t for t in present if t not in self.heads and t not in targets]:
            raise ValueError(f"batch: present: expected tasks of {[*self.heads]}; got {unknown}")
        masks = {t: present[t] for t in self.heads if present.get(t) is not None}
        for task, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (size,):
                raise ValueError(
                    f"batch: present[{task!r}]: expected a bool Tensor of shape (B,) = ({size},); "
                    f"got {_form(mask)}"
                )
        return masks

    def _loss(
        self, task: str, z: Any, target: Any, rows: Tensor | None, size: int
    ) -> Tensor | None:
        """Return a task's loss over the samples ``rows`` (None: all); None without any label."""
        if target is None or (rows is not None and len(rows) == 0):
            return None
        prediction = self.heads[task](z)
        if rows is not None and len(rows) < size:
            prediction = _select(prediction, rows, size, f"heads[{task!r}]: prediction")
            target = _select(target, rows, size, f"batch: targets[{task!r}]")
        return self.losses[task](prediction, target)

    def _log_loss(
        self, stage: str, name: str, value: Tensor | None, size: int, **options: Any
    ) -> None:
        """Log a mean over samples; in evaluation over the samples of all processes."""
        evaluating = stage != "train"
        if value is None:
            if not (evaluating and dist.is_available() and dist.is_initialized()):
                return
            # It has weight 0: processes that log different names would wait for each other forever.
            value, size = torch.zeros((), device=self.device), 0
        name = f"{stage}/{name}"
        self.log(name, value.detach(), batch_size=size, sync_dist=evaluating, **options)


def _has_targets(batch: Any) -> bool:
    """Return whether it is ``(inputs, targets)`` or ``(inputs, targets, present)``."""
    return (
        isinstance(batch, tuple | list) and len(batch) in (2, 3) and isinstance(batch[1], Mapping)
    )


def _has_masks(batch: Any) -> bool:
    if not _has_targets(batch) or len(batch) == 2 or not isinstance(batch[2], Mapping):
        return False
    masks = [mask for mask in batch[2].values() if mask is not None]
    return all(isinstance(m, Tensor) and m.dtype == torch.bool and m.ndim == 1 for m in masks)


def _batch_size(z: Tensor | Levels) -> int:
    return levels_of(z)[0].shape[0]


def _select(values: Any, rows: Tensor, size: int, name: str) -> Any:
    """Return ``values`` with the samples ``rows`` of all tensors that have a batch."""

    def of(value: Tensor) -> Tensor:
        if value.ndim == 0:
            return value
        if value.shape[0] != size:
            raise ValueError(
                f"{name}: expected the batch of {size} as the first dimension, to leave out the "
                f"samples without a label; got {_form(value)}"
            )
        return value.index_select(0, rows.to(value.device, non_blocking=True))

    return apply_to_collection(values, Tensor, of)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {[type(item).__name__ for item in value]}"
    return type(value).__name__
