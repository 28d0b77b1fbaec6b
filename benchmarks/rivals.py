"""The rivals of the kernels: the equations as printed, and the factored form.

The factored form is as one would write it: plain PyTorch, autograd, the inputs' own dtype. It is an
honest rival: no ``C x C`` matrix unless that is the smaller one, matrix products by the library,
tasks taken one by one instead of stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from repmtl_kernels import reference
from repmtl_kernels.backends.contract import AllSamples
from repmtl_kernels.backends.peaks import peaks, share

LAMBDA = 0.01  # of both losses in rep_mtl_loss


def csa_loss(
    saliencies: Sequence[Tensor], *, temperature: float = 0.5, channel_dim: int = 1
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


def rep_mtl_loss(csa: Callable[..., Tensor], saliencies: Sequence[Tensor], **options) -> Tensor:
    """Return both losses as :func:`repmtl_kernels.rep_mtl_loss` weighs them, with this CSA."""
    tsr = reference.tsr_loss(saliencies, **options)
    return LAMBDA * tsr + LAMBDA * csa(saliencies, **options)


LITERAL: dict[str, Callable[..., Tensor]] = {
    "csa_loss": reference.csa_loss,
    "tsr_loss": reference.tsr_loss,
    "rep_mtl_loss": partial(rep_mtl_loss, reference.csa_loss),
}
# TSR has nothing to factor.
FACTORED: dict[str, Callable[..., Tensor]] = {
    "csa_loss": csa_loss,
    "rep_mtl_loss": partial(rep_mtl_loss, csa_loss),
}


def statistics(saliencies: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what the statistics stage gives, in three reductions for each task."""
    return [
        (
            s.mean(1, dtype=torch.float32),
            s.flatten(2).mean(2, dtype=torch.float32),
            torch.linalg.vector_norm(s, ord=float("inf"), dim=(1, 2, 3)),
        )
        for s in saliencies
    ]


def affinity(saliencies: Sequence[Tensor]) -> Tensor:
    """Return the inner products (B, T, T) of the tasks, pair by pair, in the inputs' own dtype."""
    flat = [s.flatten(1) for s in saliencies]
    products = flat[0].new_empty(len(flat[0]), len(flat), len(flat))
    for t, x in enumerate(flat):
        for u, y in enumerate(flat[: t + 1]):
            products[:, t, u] = products[:, u, t] = torch.einsum("bn,bn->b", x, y)
    return products


def gram(saliencies: Sequence[Tensor]) -> list[Tensor]:
    """Return the smaller Gram matrix of each task in full, by the library."""
    flat = [s.flatten(2) for s in saliencies]
    return [x.mT @ x if x.shape[2] <= x.shape[1] else x @ x.mT for x in flat]


def contrast(
    a: Tensor, all_samples: AllSamples | None, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Run the contrast stage on anchors (T, B, C), with all of its products at once.

    Return the log-sum-exp (B,) and the gradient of the mean over all samples (T, B, C).
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
