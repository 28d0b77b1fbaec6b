"""The negatives' half of CSA with its gradient (equation 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import AllSamples, Anchors, Contrast
from repmtl_kernels.backends.peaks import joined, peaks, share

# Products of anchors that are held at a time, unless the anchors themselves are more.
CONTRAST_BLOCK = 1 << 22


def products_at_a_time(anchors: int) -> int:
    """Return how many products to hold, which bounds the memory of the contrast stage.

    Products that no longer fit are computed twice. Where many ranks gather their anchors, those of
    the own samples are fewer than the anchors, and are held.

    Args:
        anchors: The number of elements of all anchors.
    """
    return max(CONTRAST_BLOCK, anchors)


def contrast(
    anchors: Anchors,
    *,
    temperature: float,
    with_grad: bool,
    all_samples: AllSamples | None = None,
) -> Contrast:
    """Return the log-sum-exp of each sample's negatives, and the gradient of their mean."""
    u = anchors.unit
    tasks, batch, channels = u.shape
    rows = others = u.transpose(0, 1).reshape(batch * tasks, channels)
    first = 0
    if all_samples is not None:
        others = all_samples.unit.transpose(0, 1).reshape(-1, channels)
        first = all_samples.first
    total = len(others) // tasks
    step = max(1, products_at_a_time(others.numel()) // (tasks * len(others)))
    blocks = range(0, batch, step)

    def similarity(b: int) -> tuple[Tensor, Tensor]:
        """Return u_bt . u_kv of one block of samples, and r_bk with -inf for k = b."""
        dots = (rows[b * tasks : (b + step) * tasks] @ others.T).view(-1, tasks, total, tasks)
        r = dots.square().sum((1, 3))
        r.diagonal(first + b).fill_(float("-inf"))
        return dots, r

    own_peaks = []
    columns = u.new_zeros(2, total)
    for b in blocks:
        dots, r = similarity(b)
        own_peaks.append(peaks(r, 1, temperature))
        if with_grad:
            both = torch.stack((columns, peaks(r, 0, temperature)), 1)
            columns = joined(both, temperature, lambda x: x.amax(0), lambda x: x.sum(0))
    largest, sums = torch.cat(own_peaks, 1)
    lse = largest / temperature + sums.log()
    if not with_grad:
        return Contrast(lse, None)

    assert anchors.radial is not None
    if all_samples is not None:
        columns = all_samples.join(columns)
    du = torch.empty_like(rows)
    for b, own in zip(blocks, own_peaks, strict=True):
        if len(blocks) > 1:  # else those of the loop before are still there
            dots, r = similarity(b)
        # r_bk is a negative of sample b and of sample k. Both weights are taken from r_bk: r_kb is
        # another sum, and at low temperatures its rounding would be all that is seen.
        weight = share(r, own[..., None], temperature) + share(r, columns, temperature)
        dots *= (weight * (2 / (temperature * total)))[:, None, :, None]
        torch.mm(dots.view(-1, len(others)), others, out=du[b * tasks : (b + step) * tasks])
    du = du.view(batch, tasks, channels).transpose(0, 1)
    radial_weight = (du * u).sum((0, 2))
    return Contrast(lse, anchors.factor[:, None] * (du - radial_weight[:, None] * anchors.radial))
