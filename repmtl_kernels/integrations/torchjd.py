"""Rep-MTL beside any aggregator of TorchJD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchjd.autojac import backward, mtl_backward

from repmtl_kernels._heads.preflight import made_from_another
from repmtl_kernels._training.arguments import Positions, Representation, TaskLosses
from repmtl_kernels._training.levels import Levels
from repmtl_kernels._training.tasks import Tasks, distinct
from repmtl_kernels.criterion import RepMTL


def rep_mtl_backward(
    losses: TaskLosses,
    /,
    features: Tensor | Levels | Iterable[Tensor] | Mapping,
    criterion: RepMTL,
    present: Tensor | None = None,
    *,
    positions: Positions | None = None,
    step: int | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """Backpropagate as ``torchjd.autojac.mtl_backward`` does, with ``criterion``'s regulariser.

    A step calls it in place of ``mtl_backward``::

        rep_mtl_backward(losses, features=z, criterion=criterion)
        jac_to_grad(encoder.parameters(), UPGrad())
        optimizer.step()

    The aggregator sees the tasks alone: the ``.jac`` of the shared parameters has one row for each
    task. The gradient of the regulariser is added once to the ``.grad`` of the heads' and of the
    shared parameters; ``jac_to_grad`` then adds the aggregated gradient to the latter. Everything
    accumulates as in ``mtl_backward``. The rows are the gradients of the objectives (with their
    weights, and of the logarithm if the criterion takes it), so that ``Sum()`` gives the gradient
    of ``criterion(losses, features).backward()``.

    On steps without the regulariser (``every``, ``eval()``, lambdas of 0) this is ``mtl_backward``.
    On other steps the saliencies serve as the rows, and one backward pass of the total gives the
    heads their gradients and the encoder the regulariser's. A head has as many passes as in
    Rep-MTL, and the encoder one more than in ``mtl_backward``.

    For multi-input learning, where each task has features of its own, there is
    :func:`rep_mtl_backward_multi_input`.

    Run only the heads under ``criterion.second_order()``, and convert only them. Otherwise a batch
    norm at the end of the encoder is fused with a ReLU that begins a head, and TorchJD then finds
    parameters of the encoder in the head. Don't scale the losses with a ``GradScaler``, and use no
    ``criterion.scaler``: the rows would be scaled, and the regulariser, which is invariant to the
    scale of the losses, would not.

    Args:
        losses: list or dict of T scalar losses, as for :class:`RepMTL`. A task whose loss is None
            has no row in this step.
        features: the shared representation that went into the heads; or several that all tasks
            share, as ``mtl_backward`` takes them: a list, tuple or :class:`Levels`. None of them
            may be made from another one. (A dict has one for each task, as for :class:`RepMTL`.)
        criterion: any :class:`RepMTL`; ``criterion.last`` has the values for logging.
        present, positions, step: as for :class:`RepMTL`.
        retain_graph, parallel_chunk_size: as for ``mtl_backward``.

    Raises:
        ValueError, TypeError: as :class:`RepMTL` and ``mtl_backward``.
    """
    if not isinstance(features, Tensor | Levels | Mapping):
        try:
            features = Levels(features)
        except (TypeError, ValueError) as error:
            raise type(error)(f"features: expected a Tensor or several; {error}") from None
    _backward(
        losses, features, criterion, present, positions, step, retain_graph, parallel_chunk_size
    )


def rep_mtl_backward_multi_input(
    losses: TaskLosses,
    /,
    features: Sequence[Tensor | Levels] | Mapping,
    criterion: RepMTL,
    present: Tensor | None = None,
    *,
    positions: Positions | None = None,
    step: int | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """Do what :func:`rep_mtl_backward` does, with features of its own for each task.

    Args:
        losses, criterion, present, positions, step, retain_graph, parallel_chunk_size: as there.
        features: a list, tuple or dict like ``losses`` with the representation of each task.

    Raises:
        ValueError, TypeError: as there; or two tasks have the same representation.
    """
    if isinstance(features, Tensor | Levels):
        raise TypeError(
            "features: expected a list, tuple or dict with one per task, got "
            f"{type(features).__name__}. rep_mtl_backward is for features that all tasks share"
        )
    _backward(
        losses, features, criterion, present, positions, step, retain_graph, parallel_chunk_size
    )


def _backward(
    losses: TaskLosses,
    features: Representation,
    criterion: RepMTL,
    present: Tensor | None,
    positions: Positions | None,
    step: int | None,
    retain_graph: bool,
    chunk: int | None,
) -> None:
    if criterion.scaler is not None and criterion.scaler.is_enabled():
        raise ValueError(
            "criterion: expected one without a scaler, since the saliencies serve as the "
            "aggregator's rows; got scaler=, which scales them"
        )
    total, tasks = criterion._evaluate(losses, features, present, positions, step)
    if not tasks[0].places:  # in eval() mode the criterion does not look at them
        tasks.place(features)
    zs = distinct(tasks)
    shared = isinstance(features, Levels | Tensor)
    if not shared and len(zs) < sum(len(task.places) for task in tasks):
        raise ValueError(
            "features: expected another representation for each task, got the same twice. Pass "
            "one that all tasks share to rep_mtl_backward"
        )
    if (made := made_from_another(zs)) is not None:
        raise ValueError(
            f"features: expected features of which none is made from another, got number {made} of "
            f"{len(zs)} made from another: what reaches both would count twice. Leave out those "
            "that others are made from"
        )
    if not tasks[0].saliencies:  # a step without the regulariser
        separate = [task.loss for task in tasks]
        # The factor of each loss in the total: its weight, or the derivative of its logarithm.
        grads = torch.autograd.grad(total, separate, retain_graph=True)
        mtl_backward(
            separate,
            features=zs,
            grad_tensors=grads,
            retain_graph=retain_graph,
            parallel_chunk_size=chunk,
        )
        return
    rows = _rows(tasks, zs)
    tasks.drop_saliencies()  # with them and the total goes their graph, before the encoder's turn
    taken = [sum(row for row in of_z if row is not None) for of_z in rows]
    hooks = [
        z.register_hook(lambda grad, row=row: grad - row) for z, row in zip(zs, taken, strict=True)
    ]
    try:
        total.backward(retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    del total, tasks, taken
    jacobians = [
        torch.stack([z.new_zeros(z.shape) if row is None else row for row in of_z])
        for z, of_z in zip(zs, rows, strict=True)
    ]
    backward(zs, jac_tensors=jacobians, retain_graph=retain_graph, parallel_chunk_size=chunk)


def _rows(tasks: Tasks, zs: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Return, for each representation, the gradient of each task's part of the total, if any."""
    rows: list[list[Tensor | None]] = [[None] * len(tasks) for _ in zs]
    index = {id(z): i for i, z in enumerate(zs)}
    for t, task in enumerate(tasks):
        for z, saliency in zip(task.representations, task.saliencies, strict=True):
            if saliency is not None:
                row = saliency.detach()
                rows[index[id(z)]][t] = row if task.weight == 1 else task.weight * row
    return rows
