"""One observed call: its sums over samples and positions. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from repmtl_kernels._ground.saliency import canonical_mask, canonical_tasks, without_autocast
from repmtl_kernels._monitor.form import Form, spatial_sizes
from repmtl_kernels._monitor.values import Sums, finite
from repmtl_kernels._training.tasks import Level, Tasks
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import Stages

# Elements of all tasks' saliencies whose products are made at a time; more if one sample has more.
PRODUCTS_BLOCK = 1 << 22

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@torch.no_grad()
def sums_of(
    tasks: Tasks, form: Form, *, channel_dim: int, backend: str, ratio: Tensor | None
) -> Sums:
    """Return the sums of one call.

    Args:
        tasks: with their saliencies and masks.
        form: of the monitor.
        channel_dim: dimension of the channels.
        backend: whose stages are used. The reference has none; the eager ones are plain PyTorch
            too.
        ratio: of the gradients of regulariser and tasks, a scalar; None: not known.
    """
    saliencies = [s.detach() for s in tasks.saliencies()]
    first = saliencies[0]
    name = choice.resolve(backend, first)
    stages = choice.load("eager" if name == "reference" else name)
    sums = Sums.zeros(form, first)
    # The mask says whether a sample counts for a task.
    counted = first.new_zeros(len(form.tasks), len(first), dtype=torch.bool)
    for task in tasks:
        row = form.row(task.key)
        counted[row] = True if tasks.present is None else tasks.present[task.row]
        sums.present[row] = 1
    products: list[Tensor] = []
    with without_autocast(first.device):
        for level in tasks.levels(saliencies):
            products.append(_add_level(sums, level, form, counted, channel_dim, stages))
        _add_products(sums, sum(products[1:], products[0]), counted)
    if ratio is not None:
        sums.ratio.copy_(ratio)
        sums.ratios.fill_(1)
    return sums


def _add_level(
    sums: Sums, level: Level, form: Form, counted: Tensor, channel_dim: int, stages: Stages
) -> Tensor:
    """Add one level's positions, TSR and CSA to ``sums``. Return the inner products (B, T, T)."""
    count = len(form.tasks)
    rows = [form.row(task.key) for task in level.tasks]
    counted = torch.stack([counted[row] for row in rows])
    saliencies = canonical_tasks(level.saliencies, False, channel_dim)
    mask = canonical_mask(level.positions)
    statistics = stages.statistics(saliencies, positions=True, channels=True, mask=mask)
    x, means, scale = statistics
    assert x is not None and means is not None and scale is not None
    anchors = stages.anchors(means, eps=0.0, with_grad=False)
    gram = stages.gram(saliencies, scale, anchors.unit, eps=0.0, with_grad=False, mask=mask)
    similarity = gram.similarity.double().where(counted, 0).sum(1)
    sums.csa.add_(_spread(similarity, rows, count))
    sums.csa_samples.add_(_spread(counted.sum(1), rows, count))

    magnitude = x.double().abs()
    total = finite(magnitude.sum(0))
    terms = torch.special.entr(magnitude / total.where(total != 0, 1)).sum((1, 2))
    sums.tsr[level.number].add_(_spread(terms, rows, count))
    sums.tsr_positions[level.number].add_(x[0].numel() if mask is None else mask.sum())

    conflicts, positions, norms, samples = _of_positions(saliencies, scale, counted, mask)
    sums.position_conflicts.add_(_spread(conflicts, rows, count, pair=True))
    sums.positions.add_(_spread(positions, rows, count, pair=True))
    if grid := form.grids[level.number]:
        spatial = spatial_sizes(level.saliencies[0], channel_dim)
        where = form.map_slices()[level.number]
        for into, values in ((sums.maps, norms), (sums.map_samples, samples)):
            pooled = _pooled(values, spatial, grid)
            into[where].add_(_spread(pooled, rows, count).flatten())
    return _spread(stages.affinity(saliencies, mask=mask).movedim(0, 2), rows, count, pair=True)


def _add_products(sums: Sums, products: Tensor, counted: Tensor) -> None:
    """Add the values that are made of inner products (T, T, B) over all levels."""
    squares = products.diagonal().T  # (T, B)
    sums.square_norms.add_(squares.where(counted, 0).sum(1))
    # A saliency of zero has no direction.
    here = counted & (squares != 0)
    both = here[:, None] & here
    norms = squares.sqrt()
    cosines = (products / (norms[:, None] * norms)).where(both, 0)
    sums.cosines.add_(cosines.sum(2))
    sums.conflicts.add_(_below_zero(cosines).sum(2))
    sums.samples.add_(both.sum(2))


def _of_positions(
    saliencies: Sequence[Tensor], scale: Tensor, counted: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is seen at single positions of T tasks, each sum over the samples that count.

    Args:
        saliencies: canonical.
        scale: ``(T, B)``, that of ``statistics``, so that no product overflows or underflows.
        counted: bool ``(T, B)``.
        mask: bool ``(B, N)``.

    Returns:
        The positions ``(T, T)`` where the product over the channels is below 0, those where both
        tasks have a saliency, the sum ``(T, N)`` of the norms over the channels, and how many
        samples ``(T, N)`` that is of.
    """
    tasks, batch = scale.shape
    step = max(1, PRODUCTS_BLOCK // (tasks * saliencies[0][0].numel()))
    conflicts, positions = scale.new_zeros(2, tasks, tasks, dtype=torch.float64)
    norms, samples = [], []
    for first in range(0, batch, step):
        part = slice(first, first + step)
        of_part = scale[:, part, None, None]
        x = torch.stack([s[part].flatten(2) for s in saliencies]).to(scale.dtype) * of_part
        exists = counted[:, part, None]
        if mask is not None:
            x = x.where(mask[part, None], 0)
            exists = exists & mask[part]
        products = [(x[t:] * x[t]).sum(2) for t in range(tasks)]  # with the tasks from t on
        squares = torch.stack([product[0] for product in products])
        here = exists & (squares != 0)
        for t, product in enumerate(products):
            both = here[t:] & here[t]
            below = _below_zero(product.where(both, 0))
            conflicts[t, t:] += below.sum((1, 2), dtype=torch.float64)
            positions[t, t:] += both.sum((1, 2))
        of_norms = squares.double().sqrt() / of_part[..., 0]
        norms.append(of_norms.where(exists, 0).sum(1))
        samples.append(exists.expand_as(squares).sum(1, dtype=torch.float64))
    return (
        conflicts + conflicts.triu(1).T,
        positions + positions.triu(1).T,
        torch.stack(norms).sum(0),
        torch.stack(samples).sum(0),
    )


def _below_zero(values: Tensor) -> Tensor:
    """Return 1 where a value is below 0, else 0; NaN where it is not finite."""
    return (values < 0) + 0 * values


def _spread(values: Tensor, rows: list[int], count: int, *, pair: bool = False) -> Tensor:
    """Return values of the tasks in ``rows`` in their places among all, with 0 for the others.

    ``pair``: the second dimension is one of tasks too.
    """
    if rows == list(range(count)):
        return values
    spread = values.new_zeros(count, *values.shape[1:])
    for row, value in zip(rows, values, strict=True):
        spread[row] = value
    return _spread(spread.transpose(0, 1), rows, count).transpose(0, 1) if pair else spread


def _pooled(values: Tensor, spatial: Sequence[int], grid: tuple[int, ...]) -> Tensor:
    """Return the means (T, cells) over the cells of a grid, of values (T, N)."""
    return _POOLS[len(grid)](values.view(len(values), 1, *spatial), grid).flatten(1)
