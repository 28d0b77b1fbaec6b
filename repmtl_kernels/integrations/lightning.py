"""Rep-MTL in Lightning.

A LightningModule of your own needs nothing from here: make :class:`repmtl_kernels.RepMTL` one of
its submodules and return ``self.criterion(losses, z)`` from ``training_step``. Lightning then
switches it between training and validation and puts its state into checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from repmtl_kernels.criterion import RepMTL

Batch = tuple[Any, Mapping[str, Any]]


class RepMTLModule(LightningModule):
    """An encoder and the heads of its tasks, trained with :class:`RepMTL`; add the optimiser::

        class Scenes(RepMTLModule):
            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=1e-4)

        Scenes(
            encoder,
            heads={"segmentation": ..., "depth": ...},
            losses={"segmentation": nn.CrossEntropyLoss(), "depth": nn.L1Loss()},
            criterion=RepMTL(lambda_tsr=0.01, lambda_csa=0.01),
        )

    A batch is ``(inputs, targets)``, ``targets`` a dict by task. A task that it lacks, or that is
    None, is absent from this batch. CSA needs batches of two samples at least:
    ``DataLoader(drop_last=True)``.

    Logged in training: ``train/loss`` (the total), ``train/loss/<task>``, and on steps with the
    regulariser ``train/tsr``, ``train/csa`` and ``train/ratio`` (see ``RepMTL.last``); in
    validation ``val/loss`` (the tasks alone) and ``val/loss/<task>``.

    Every precision and ``accumulate_grad_batches`` of the Trainer work as usual; ``every`` of the
    criterion counts batches, and CSA contrasts the samples of one batch. With DDP, absent tasks
    need ``find_unused_parameters=True`` and have to be the same on all ranks.

    Args:
        encoder: from the inputs of a batch to the shared representation ``(B, C, *spatial)``.
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
        # Those that are modules move to the device and into checkpoints, e.g. with class weights.
        self.loss_modules = nn.ModuleDict(
            {task: loss for task, loss in losses.items() if isinstance(loss, nn.Module)}
        )

    def forward(self, inputs: Any) -> dict[str, Any]:
        """The predictions of all tasks."""
        z = self.encoder(inputs)
        return {task: head(z) for task, head in self.heads.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total = self._total(batch, "train")
        last = self.criterion.last
        if last.tsr is not None:
            self.log("train/tsr", last.tsr)
        if last.csa is not None:
            self.log("train/csa", last.csa)
        return total

    def on_after_backward(self) -> None:
        # The backward has filled it in, on steps with the regulariser.
        last = self.criterion.last  # None in a subclass whose step has not called it yet
        if last is not None and last.ratio is not None:
            self.log("train/ratio", last.ratio)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._total(batch, "val")

    def _total(self, batch: Batch, stage: str) -> Tensor:
        inputs, targets = batch
        z = self.encoder(inputs)
        with self.criterion.second_order() if self.second_order else nullcontext():
            losses = {
                task: self.losses[task](head(z), targets[task])
                if targets.get(task) is not None
                else None
                for task, head in self.heads.items()
            }
        total = self.criterion(losses, z)
        size = {"batch_size": z.shape[0]}
        self.log(f"{stage}/loss", total.detach(), prog_bar=True, **size)
        for task, loss in self.criterion.last.losses.items():
            if loss is not None:
                self.log(f"{stage}/loss/{task}", loss, **size)
        return total
