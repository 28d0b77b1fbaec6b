"""The values of one observation, written out in loops, and losses whose saliencies are given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from repmtl_kernels import Levels, SaliencyMonitor, SaliencySummary

FIELDS = (
    "cosine",
    "conflicting_samples",
    "conflicting_positions",
    "norm_share",
    "tsr",
    "csa",
)
# Each task has one at a level, (B, C, *spatial), or None if its loss does not depend on it.
AtLevel = Sequence[Tensor | None]


def losses_with(levels: Sequence[AtLevel], zs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return losses that have these saliencies; None for a task that depends on no level."""
    losses: list[Tensor | None] = []
    for of_task in zip(*levels, strict=True):
        terms = [(s * z).sum() for s, z in zip(of_task, zs, strict=True) if s is not None]
        losses.append(sum(terms[1:], terms[0]) if terms else None)
    return losses


def observe(
    monitor: SaliencyMonitor, levels: Sequence[AtLevel], channel_dim: int = 1, **options
) -> SaliencySummary:
    """Call the monitor with losses that have these saliencies, as the user's layout has them."""
    moved = [[None if s is None else s.movedim(1, channel_dim) for s in level] for level in levels]
    zs = [
        torch.zeros_like(next(s for s in level if s is not None)).requires_grad_()
        for level in moved
    ]
    representation = zs[0] if len(zs) == 1 else Levels(zs)
    assert monitor(losses_with(moved, zs), representation, **options) is None
    return monitor.summary()


def literal(
    levels: Sequence[AtLevel],
    present: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Return the values by field, and the maps of level ``i`` under ``maps/i``."""
    count = len(levels[0])
    batch = next(s for s in levels[0] if s is not None).shape[0]
    masks = [None] * len(levels) if masks is None else masks
    here = [any(level[t] is not None for level in levels) for t in range(count)]
    counts = [
        [here[t] and (present is None or bool(present[t, b])) for b in range(batch)]
        for t in range(count)
    ]
    # By level, task and sample: (C, N), zero where nothing is.
    flat, exists = [], []
    for level, mask in zip(levels, masks, strict=True):
        like = _flat(next(s for s in level if s is not None))
        positions = torch.ones(like.shape[0], like.shape[2], dtype=torch.bool)
        if mask is not None:
            positions = mask.flatten(1).cpu()
        flat.append([torch.zeros_like(like) if s is None else _flat(s) for s in level])
        flat[-1] = [s.where(positions[:, None], 0) for s in flat[-1]]
        exists.append(positions)
    pairs = (count, count)
    values = {name: torch.full(pairs, math.nan, dtype=torch.float64) for name in FIELDS[:3]}
    for t in range(count):
        for u in range(count):
            cosines, below, positions = [], 0, 0
            for b in range(batch):
                if not (counts[t][b] and counts[u][b]):
                    continue
                x = torch.cat([level[t][b].flatten() for level in flat])
                y = torch.cat([level[u][b].flatten() for level in flat])
                if x.norm() != 0 and y.norm() != 0:
                    cosines.append(x @ y / (x.norm() * y.norm()))
                for level in flat:
                    for n in range(level[t].shape[2]):
                        v, w = level[t][b, :, n], level[u][b, :, n]
                        if v.any() and w.any():
                            positions += 1
                            below += int(v @ w < 0)
            if cosines:
                values["cosine"][t, u] = sum(cosines) / len(cosines)
                share = sum(c < 0 for c in cosines) / len(cosines)
                values["conflicting_samples"][t, u] = share
            if positions:
                values["conflicting_positions"][t, u] = below / positions
    norms = torch.full((count,), math.nan, dtype=torch.float64)
    for t in range(count):
        if here[t]:
            squares = [level[t][b].square().sum() for level in flat for b in range(batch)]
            own = [counts[t][b] for _ in flat for b in range(batch)]
            norms[t] = sum(s for s, c in zip(squares, own, strict=True) if c) ** 0.5
    values["norm_share"] = norms / norms.nansum()
    values["tsr"] = _tsr(levels, flat, exists, here)
    values["csa"] = _csa(levels, flat, exists, counts)
    for i, (level, positions) in enumerate(zip(flat, exists, strict=True)):
        spatial = next(s for s in levels[i] if s is not None).shape[2:]
        if spatial:
            values[f"maps/{i}"] = _maps(levels[i], level, positions, counts, spatial)
    return values


def _tsr(levels, flat, exists, here) -> Tensor:
    """Return each task's term of TSR: the mean over the levels that a task depends on."""
    count = len(here)
    total, used = torch.zeros(count, dtype=torch.float64), 0
    for at_level, level, positions in zip(levels, flat, exists, strict=True):
        if all(s is None for s in at_level):
            continue
        used += 1
        terms = torch.zeros(count, dtype=torch.float64)
        for b, n in positions.nonzero().tolist():
            x = torch.stack([s[b, :, n].mean().abs() for s in level])
            for t in range(count):
                if x[t] > 0:
                    p = x[t] / x.sum()
                    terms[t] -= p * p.log()
        total += terms / positions.sum()
    total /= used
    total[~torch.tensor(here)] = math.nan
    return total


def _csa(levels, flat, exists, counts) -> Tensor:
    """Return the mean similarity of each task's affinity with its sample's anchor (eq. 7 and 8)."""
    similarities: list[list[Tensor]] = [[] for _ in counts]
    for at_level, level, positions in zip(levels, flat, exists, strict=True):
        for b in range(len(positions)):
            own = positions[b].sum().clamp_min(1)
            means = torch.stack([s[b].sum(1) / own for s in level], 1)  # (C, T)
            anchor = means @ means.T
            for t, s in enumerate(level):
                affinity = s[b] @ s[b].T
                if counts[t][b] and at_level[t] is not None:
                    norm = affinity.norm() * anchor.norm()
                    product = (affinity * anchor).sum()
                    similarities[t].append(product / norm if norm > 0 else product)
    means = [sum(of_task) / len(of_task) if of_task else math.nan for of_task in similarities]
    return torch.tensor(means, dtype=torch.float64)


def _maps(at_level, level, positions, counts, spatial) -> Tensor:
    grid = [min(size, 32) for size in spatial]
    maps = []
    for t, s in enumerate(level):
        total = torch.zeros(s.shape[2], dtype=torch.float64)
        samples = torch.zeros_like(total)
        for b in range(len(s)):
            if counts[t][b] and at_level[t] is not None:
                total += s[b].norm(dim=0)
                samples += positions[b]
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        pooled = pool[len(spatial) - 1]
        total, samples = (pooled(x.view(1, 1, *spatial), grid)[0, 0] for x in (total, samples))
        mean = total / samples
        maps.append(mean / mean.nanmean())
    return torch.stack(maps)


def assert_equal(
    summary: SaliencySummary, expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Assert that a summary has these values."""
    got = {name: getattr(summary, name) for name in FIELDS}
    got |= {f"maps/{i}": maps for i, maps in enumerate(summary.maps.values())}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.dtype == torch.float64 and value.device.type == "cpu"
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


def _flat(saliency: Tensor) -> Tensor:
    return saliency.reshape(*saliency.shape[:2], -1).double().cpu()
