"""Similarity of each task's affinity with its anchor (equation 7), from half a Gram matrix."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import Gram
from repmtl_kernels.backends.eager.norms import guarded_inverse, square_norm
from repmtl_kernels.backends.eager.operand import (
    is_n_side,
    masked_together,
    needs_prescale,
    operand,
    storage_factor,
)

# Rows of one block of the Gram matrix: small enough to skip most of the upper half, large enough
# for the matrix product to run at full speed.
GRAM_BLOCK = 128


def gram(
    saliencies: list[Tensor],
    scale: Tensor,
    anchors: Tensor,
    *,
    eps: float,
    with_grad: bool,
    mask: Tensor | None = None,
) -> Gram:
    """Return the similarities, and with a gradient the projections and Gram matrices."""
    first = saliencies[0]
    if mask is not None and len(parts := masked_together(first)) > 1:
        result = _empty_result(first, scale, with_grad)
        for samples in parts:
            part = gram(
                [s[samples] for s in saliencies],
                scale[:, samples],
                anchors[:, samples],
                eps=eps,
                with_grad=with_grad,
                mask=mask[samples],
            )
            for target, value in zip(result, part, strict=True):
                if target is not None and value is not None:
                    target[:, samples] = value
        return result
    n_side = is_n_side(first)
    stored = _empty_matrices(first, scale) if with_grad else None
    in_place = stored is not None and stored.dtype == scale.dtype
    scratch = None
    if not in_place and (with_grad or not n_side):
        side = _side(first)
        scratch = scale.new_empty(scale.shape[1], side, side)
    norms, positives, projections = [], [], []
    prescale = needs_prescale(first, scale)
    for t, s in enumerate(saliencies):
        x, rest = operand(s, scale[t], prescale, mask)  # (B, C, N)
        u = anchors.transpose(0, 1)  # (B, T, C)
        matrix = stored[t] if stored is not None and in_place else scratch
        norms.append(_half_gram(x.mT if n_side else x, rest.square(), matrix))
        if n_side:
            v = (u @ x) * rest[:, None, None]
            positives.append(v.square().sum((1, 2)))
        else:
            assert matrix is not None
            v = u @ matrix
            positives.append((u * v).sum((1, 2)))
        if stored is not None:
            projections.append(v)
            if scratch is not None:
                stored[t] = scratch.mul_(storage_factor(s))
    projection = torch.stack(projections) if with_grad else None
    return gram_of(torch.stack(norms), torch.stack(positives), scale, eps, projection, stored)


def gram_of(
    norm: Tensor,
    positive: Tensor,
    scale: Tensor,
    eps: float,
    projection: Tensor | None,
    matrix: Tensor | None,
) -> Gram:
    """Return the result from the norms ``m^`` and the sums ``p^`` (T, B) of scaled saliencies."""
    inverse, free = guarded_inverse(norm, scale, eps)
    similarity = positive * inverse
    return Gram(similarity, inverse, -similarity * inverse * free, projection, matrix)


def _empty_result(saliency: Tensor, scale: Tensor, with_grad: bool) -> Gram:
    similarity, inverse, slope = (torch.empty_like(scale) for _ in range(3))
    if not with_grad:
        return Gram(similarity, inverse, slope, None, None)
    projection = scale.new_empty(*scale.shape, len(scale), _side(saliency))
    return Gram(similarity, inverse, slope, projection, _empty_matrices(saliency, scale))


def _empty_matrices(saliency: Tensor, scale: Tensor) -> Tensor:
    """Return memory (T, B, R, R) for the stored Gram matrices."""
    side = _side(saliency)
    return saliency.new_empty(*scale.shape, side, side)


def _side(saliency: Tensor) -> int:
    return min(saliency.shape[1], saliency.shape[2:].numel())


def _half_gram(x: Tensor, factor: Tensor, out: Tensor | None) -> Tensor:
    """Return the Frobenius norms (B,) of ``factor * x x^T``, from the lower half of its blocks.

    Writes the matrices (B, R, R) into ``out`` if there is one.
    """
    rows = x.shape[1]
    factor = factor[:, None, None]
    squares = []
    for i in range(0, rows, GRAM_BLOCK):
        j = min(i + GRAM_BLOCK, rows)
        block = (x[:, i:j] @ x[:, :j].mT).mul_(factor)
        if out is not None:
            out[:, i:j, :j] = block
            out[:, :i, i:j] = block[:, :, :i].mT
        if i:
            squares.append(2 * square_norm(block[:, :, :i]))
        squares.append(square_norm(block[:, :, i:]))
    return functools.reduce(torch.add, squares).sqrt()
