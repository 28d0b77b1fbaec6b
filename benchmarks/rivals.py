"""The factored form of CSA as one would write it: plain PyTorch, autograd, the inputs' own dtype.

An honest rival of the kernels: no ``C x C`` matrix unless that is the smaller one, matrix products
by the library, tasks taken one by one instead of stacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_kernels import reference
from repmtl_kernels.backends.contract import AllSamples
from repmtl_kernels.backends.peaks import peaks, share


def csa_loss(
    saliencies: Tensor | Sequence[Tensor], *, temperature: float = 0.5, channel_dim: int = 1
) -> Tensor:
    """As :func:`repmtl_kernels.csa_loss`, of saliencies with spatial dimensions; not scale-safe."""
    tasks = [s.movedim(channel_dim, 1).flatten(2) for s in saliencies]  # (B, C, N) each
    anchors = torch.stack([x.mean(2) for x in tasks], 1)  # (B, T, C)
    batch, count, channels = anchors.shape
    flat = anchors.view(-1, channels)
    overlap = (flat @ flat.T).view(batch, count, batch, count).square().sum((1, 3))  # (B, B)
    norm = overlap.diagonal().sqrt()
    positive = 0.0
    for x in tasks:
        gram = x.mT @ x if x.shape[2] <= channels else x @ x.mT
        inner = (anchors @ x).square().sum((1, 2))
        positive = positive + inner / (norm * torch.linalg.vector_norm(gram, dim=(1, 2)))
    similarity = overlap / (norm[:, None] * norm) / temperature
    own = torch.eye(batch, dtype=torch.bool, device=overlap.device)
    negative = similarity.masked_fill(own, float("-inf")).logsumexp(1)
    return (negative - positive / (count * temperature)).mean()


def rep_mtl_loss(
    saliencies: Tensor | Sequence[Tensor], *, weight: float, channel_dim: int = 1
) -> Tensor:
    """Both losses with one weight. TSR has nothing to factor: it is the reference's."""
    tsr = reference.tsr_loss(saliencies, channel_dim=channel_dim)
    return weight * tsr + weight * csa_loss(saliencies, channel_dim=channel_dim)


def statistics(saliencies: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the statistics stage gives, in three reductions for each task; the largest magnitudes
    instead of their powers of two."""
    return [
        (
            s.mean(1, dtype=torch.float32),
            s.flatten(2).mean(2, dtype=torch.float32),
            torch.linalg.vector_norm(s, ord=float("inf"), dim=(1, 2, 3)),
        )
        for s in saliencies
    ]


def gram(saliencies: Sequence[Tensor]) -> list[Tensor]:
    """All of the smaller Gram matrix of each task, in the saliencies' dtype, by the library."""
    found = []
    for s in saliencies:
        x = s.flatten(2)
        a, b = (x.mT, x) if x.shape[2] <= x.shape[1] else (x, x.mT)
        found.append(torch.bmm(a, b))
    return found


def contrast(
    a: Tensor, all_samples: AllSamples | None, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The contrast stage of anchors (T, B, C), with all of its products at once.

    Returns the log-sum-exp (B,) and the gradient of all samples' mean (T, B, C).
    """
    a = a.detach().requires_grad_()
    norm = torch.linalg.matrix_norm(torch.einsum("tbc,ubc->btu", a, a))
    unit = a / norm.sqrt()[:, None]
    others, first = (unit, 0) if all_samples is None else all_samples[:2]
    (tasks, batch, _), total = unit.shape, others.shape[1]
    rows, columns = (x.transpose(0, 1).flatten(0, 1) for x in (unit, others))
    products = (rows @ columns.T).view(batch, tasks, total, tasks)
    samples = torch.arange(total, device=a.device)
    same = samples == first + torch.arange(batch, device=a.device)[:, None]
    r = products.square().sum((1, 3)).masked_fill(same, float("-inf"))
    logsumexp = (r / temperature).logsumexp(1)
    value = logsumexp.sum()
    if all_samples is not None:  # own samples in the others' sums
        columns = all_samples.join(peaks(r.detach(), 0, temperature))
        value = value + share(r, columns, temperature).sum()
    (grad,) = torch.autograd.grad(value / total, a)
    return logsumexp.detach(), grad
