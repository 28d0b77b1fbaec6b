"""Rep-MTL beside any aggregator of TorchJD."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchjd.autojac import backward, mtl_backward

from repmtl_kernels._task_losses import Representation, TaskLosses, named_losses, present_of
from repmtl_kernels.criterion import RepMTL


def rep_mtl_backward(
    losses: TaskLosses,
    /,
    features: Representation,
    criterion: RepMTL,
    present: Tensor | None = None,
    *,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """In place of ``torchjd.autojac.mtl_backward``, with the regulariser of ``criterion``::

        rep_mtl_backward(losses, features=z, criterion=criterion)
        jac_to_grad(encoder.parameters(), UPGrad())
        optimizer.step()

    The aggregator sees the tasks alone: the ``.jac`` of the shared parameters has one row for each
    task. The gradient of the regulariser is added to ``.grad`` once, of the heads' parameters as
    of the shared ones, whose aggregated part ``jac_to_grad`` then adds. Everything accumulates as
    in ``mtl_backward``. The rows are those of the objectives: weighted, and of the logarithm where
    the criterion takes it, so that ``Sum()`` gives ``criterion(losses, features).backward()``.

    On steps without the regulariser (``every``, ``eval()``, lambdas of 0) this is ``mtl_backward``.
    On the others the saliencies serve as the rows, and one backward of the total gives the heads
    their gradients and the encoder the regulariser's: a head is passed as often as in Rep-MTL, the
    encoder once more than in ``mtl_backward``.

    Run the heads alone under ``criterion.second_order()``, and convert them alone: a batch norm at
    the end of the encoder would be fused with a ReLU that begins a head, and TorchJD then finds
    parameters of the encoder in the head. Don't scale losses (``GradScaler``, and so no
    ``criterion.scaler``): the rows would be scaled, and the regulariser, which is invariant to the
    scale of the losses, would not.

    Args:
        losses: list or dict of T scalar losses, as for :class:`RepMTL`. A task whose loss is None
            has no row in this step.
        features: the shared representation that the heads were given; multi-input: one per task.
        criterion: any :class:`RepMTL`; ``criterion.last`` has the values for logging.
        present: bool ``(T, B)``, as for :class:`RepMTL`.
        retain_graph, parallel_chunk_size: as for ``mtl_backward``.

    Raises:
        ValueError, TypeError: as :class:`RepMTL` and ``mtl_backward``; or two tasks of multi-input
            learning have the same representation.
    """
    if criterion.scaler is not None and criterion.scaler.is_enabled():
        raise ValueError(
            "criterion: expected one without a scaler, since the saliencies serve as the "
            "aggregator's rows; got scaler=, which scales them"
        )
    saliencies: list[Tensor] = []
    hooks = [z.register_hook(saliencies.append) for z in _with_graph(features)]
    try:
        total = criterion(losses, features, present)
    finally:
        for hook in hooks:
            hook.remove()
    tasks = present_of(named_losses(losses, features, absent=True), losses)
    shared = isinstance(features, Tensor)
    representations = [features] if shared else [features[task] for task in tasks]
    if len({id(z) for z in representations}) < len(representations):
        raise ValueError(
            "features: expected another representation for each task, got the same twice. Pass a "
            "representation that all tasks share as a Tensor"
        )
    if not criterion.last.applied:
        separate = [losses[task] for task in tasks]
        # What a loss counts for in the total: its weight, or its share of a logarithm.
        grads = torch.autograd.grad(total, separate, retain_graph=True)
        mtl_backward(
            separate,
            features=representations,
            grad_tensors=grads,
            retain_graph=retain_graph,
            parallel_chunk_size=parallel_chunk_size,
        )
        return
    weights = criterion.task_weights
    rows = [
        saliency.detach() if weights is None else weights[task] * saliency.detach()
        for task, saliency in zip(tasks, saliencies, strict=True)
    ]
    saliencies.clear()  # with them and the total goes their graph, before the encoder is passed
    taken = [sum(rows)] if shared else rows
    hooks = [
        z.register_hook(lambda grad, row=row: grad - row)
        for z, row in zip(representations, taken, strict=True)
    ]
    try:
        total.backward(retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    del total, taken
    jacobians = [torch.stack(rows)] if shared else _one_row_each(rows)
    backward(
        representations,
        jac_tensors=jacobians,
        retain_graph=retain_graph,
        parallel_chunk_size=parallel_chunk_size,
    )


def _with_graph(features: Representation) -> list[Tensor]:
    """Every representation that can have saliencies; the criterion says what is wrong."""
    if isinstance(features, Mapping):
        features = list(features.values())
    listed = features if isinstance(features, list | tuple) else [features]
    return [z for z in listed if isinstance(z, Tensor) and z.requires_grad]


def _one_row_each(rows: list[Tensor]) -> list[Tensor]:
    """Multi-input: the Jacobian of all tasks' losses in each task's own representation."""
    jacobians = [row.new_zeros(len(rows), *row.shape) for row in rows]
    for t, row in enumerate(rows):
        jacobians[t][t] = row
    return jacobians
