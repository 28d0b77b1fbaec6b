"""Entropy of the saliency distributions with its gradient (equations 5 and 6): TSR."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import Entropy


def entropy(
    x: Tensor, *, over: str, normalizer: str, temperature: float, eps: float, with_grad: bool
) -> Entropy:
    """Return the mean entropy of the position means ``x`` and its gradient."""
    dim = 0 if over == "tasks" else 2
    count = x.numel() // x.shape[dim]
    if normalizer == "abs":
        magnitude = x.abs()
        total = magnitude.sum(dim, keepdim=True) + eps
        total = total.where(total != 0, 1)
        p = magnitude / total
        # From p unless that underflows: the logarithms of tiny saliencies nearly cancel.
        log_p = magnitude.where(magnitude != 0, total).log() - total.log()
        log_p = p.log().where(p >= torch.finfo(p.dtype).tiny, log_p)
    else:
        p = torch.softmax(x / temperature, dim)
        # A probability of 0 adds 0, though its logarithm may be -inf.
        log_p = torch.log_softmax(x / temperature, dim).where(p != 0, 0)
    h = -(p * log_p).sum(dim, keepdim=True)
    grad = None
    if with_grad:
        if normalizer == "abs":
            # d h / d |x| with sum p = 1 - eps / total
            grad = (p.sum(dim, keepdim=True) - 1 - h - log_p) * x.sign() / total
        else:
            grad = p * (-h - log_p) / temperature
        grad = grad / count
    return Entropy(h.mean(), grad)
