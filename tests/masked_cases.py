"""Masks of positions, garbage elsewhere, and the equations on what a mask leaves of saliencies."""

import math

import torch
from cases import (
    BACKENDS,
    DEVICE,
    FLOOR_FORMS,
    FLOOR_IDS,
    LOSSES,
    TSR_FORMS,
    TSR_IDS,
    Case,
    Loss,
    supports,
)
from torch import Tensor

from repmtl_kernels import (
    reference,
    rep_mtl_loss,
)

EVERY_BACKEND = ["reference", *BACKENDS]
EXACT = [name for name in EVERY_BACKEND if name == "reference" or supports(name, torch.float64)]
FORMS, FORM_IDS = TSR_FORMS + FLOOR_FORMS, TSR_IDS + FLOOR_IDS
TSR, CSA, *_ = LOSSES


def _total(saliencies, **options) -> Tensor:
    return rep_mtl_loss(saliencies, lambda_tsr=0.7, lambda_csa=1.3, tsr_floor=0.1, **options).total


def _literal_total(saliencies, **options) -> Tensor:
    tsr = reference.tsr_loss(saliencies, floor=0.1, **options)
    return 0.7 * tsr + 1.3 * reference.csa_loss(saliencies, **options)


# With a floor: else a few positions with next to no saliency, and their rounding, are most of the
# gradient.
BOTH = Loss("rep_mtl_loss", _total, _literal_total)


def mask_of(case: Case, kind: str) -> Tensor:
    """Return a mask (B, *spatial).

    "prefix": each sample has its first positions, and another number of them. "random": random
    ones. "empty": random ones, and none of the last sample.
    """
    count = math.prod(case.spatial)
    if kind == "prefix":
        lengths = 1 + (torch.arange(case.batch) * 5 + count // 2) % count
        mask = torch.arange(count) < lengths[:, None]
    else:
        mask = torch.rand(case.batch, count, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[:, 0] = True
        if kind == "empty":
            mask[-1] = False
    return mask.view(case.batch, *case.spatial).to(DEVICE)


def over_channels(case: Case, mask: Tensor) -> Tensor:
    """The mask as it broadcasts to what ``case.make`` gives."""
    return mask.unsqueeze(1 if case.layout == "stacked" else case.channel_dim)


def with_garbage(case: Case, dtype: torch.dtype, mask: Tensor) -> list[Tensor]:
    """Saliencies that hold NaN, infinities and huge numbers where no position is."""
    tensors = [t.detach() for t in case.make(dtype)]
    others = ~over_channels(case, mask)
    for tensor in tensors:
        bad = torch.tensor([math.nan, 1e30, -math.inf, math.inf], dtype=torch.float64).to(dtype)
        garbage = bad.repeat(tensor.numel())[: tensor.numel()].view(tensor.shape).to(DEVICE)
        tensor.copy_(garbage.where(others, tensor))
    return [t.requires_grad_() for t in tensors]


# --- the paper's equations, sample by sample, on what is cut out of the saliencies ---


def cut(saliencies: list[Tensor], mask: Tensor) -> list[list[Tensor]]:
    """(C, n) of each sample and task."""
    return [[s[b].flatten(1)[:, mask[b].flatten()] for s in saliencies] for b in range(len(mask))]


def cut_tsr(
    saliencies, mask, *, over="tasks", normalizer="abs", temperature=1.0, floor=0.0, eps=0.0
) -> Tensor:
    x = [torch.stack([s.mean(0) for s in sample]) for sample in cut(saliencies, mask)]  # (T, n)
    least = floor * torch.cat([of.abs().flatten() for of in x]).mean() if floor else 0.0
    entropies = []
    for of in x:
        values = of if over == "space" else of.T
        if values.shape[1] == 0:
            entropies.append(values.sum(1))
            continue
        if normalizer == "softmax":
            p = torch.softmax(values / temperature, 1)
        else:
            magnitude = values.abs() + least
            p = magnitude / (magnitude.sum(1, keepdim=True) + eps)
        entropies.append(-(p * p.log()).sum(1))
    return torch.cat(entropies).mean()


def cut_csa(saliencies, mask, *, temperature=0.5, eps=0.0, present=None) -> Tensor:
    def normalized(matrix: Tensor) -> Tensor:
        norm = matrix.norm()
        return matrix / max(norm, eps) if norm > 0 else torch.zeros_like(matrix)

    samples = cut(saliencies, mask)
    anchors, positives = [], []
    for b, sample in enumerate(samples):
        means = [s.mean(1) if s.shape[1] else s.sum(1) for s in sample]
        anchors.append(normalized(sum(torch.outer(a, a) for a in means)))
        wanted = [t for t in range(len(sample)) if present is None or present[t, b]]
        similar = [(anchors[b] * normalized(sample[t] @ sample[t].T)).sum() for t in wanted]
        positives.append(torch.stack(similar).mean() if similar else anchors[b].sum() * 0)
    losses = []
    for b, positive in enumerate(positives):
        negative = [(anchors[b] * other).sum() for k, other in enumerate(anchors) if k != b]
        losses.append(torch.logsumexp(torch.stack(negative) / temperature, 0))
        losses[-1] = losses[-1] - positive / temperature
    return torch.stack(losses).mean()


def assert_same(actual: Tensor, exact: Tensor, tensors: list[Tensor], tolerance=1e-12) -> None:
    torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(actual, tensors, allow_unused=True)
    exact_grads = torch.autograd.grad(exact, tensors, allow_unused=True)
    for grad, wanted in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e3 * tolerance, atol=10 * tolerance)
