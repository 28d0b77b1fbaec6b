"""The gradient of each saliency: CSA's closed form, with TSR's as a broadcast term."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import Coefficients, CSAGradient, TSRGradient
from repmtl_kernels.backends.eager.operand import (
    is_n_side,
    masked_together,
    needs_prescale,
    number_of_positions,
    operand,
    storage_factor,
)


class GradientTerms(NamedTuple):
    """One task's gradient (B, C, N): ``a @ b + da 1^T + 1 dx^T + sum_k left_k right_k^T``."""

    output: Tensor  # (B, C, *spatial), where it goes
    a: Tensor  # (B, C, R)
    b: Tensor  # (B, R, N)
    da: Tensor  # (B, C)
    dx: Tensor | None  # (B, N): TSR's
    left: Tensor  # (K, B, C)
    right: Tensor  # (B, K, N)


def saliency_grad(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    tsr: TSRGradient | None,
    mask: Tensor | None = None,
) -> None:
    """Write the gradient of each task into its output."""
    for term in gradient_terms(saliencies, outputs, csa, tsr, mask):
        # All but the product with the Gram matrix is a sum of few outer products (C) x (N).
        ones = term.da.new_ones(len(term.da), 1, 1)
        left = [term.da[:, :, None], term.left.permute(1, 2, 0)]
        right = [ones.expand(-1, 1, term.b.shape[2]), term.right]
        if term.dx is not None:
            left.append(ones.expand(-1, term.a.shape[1], 1))
            right.append(term.dx[:, None])
        outer = torch.cat(left, 2), torch.cat(right, 1)
        _write_sum(term.output, outer, (term.a, term.b))


def gradient_terms(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    tsr: TSRGradient | None,
    mask: Tensor | None,
) -> Iterator[GradientTerms]:
    """Yield the terms of each task whose gradient is wanted; with a mask, a few samples at a time.

    The caller writes the output of one before it asks for the next.
    """
    if mask is not None and len(parts := masked_together(saliencies[0])) > 1:
        for samples in parts:
            yield from gradient_terms(
                [s[samples] for s in saliencies],
                [None if output is None else output[samples] for output in outputs],
                csa.of_samples(samples),
                None if tsr is None else tsr.of_samples(samples),
                mask[samples],
            )
        return
    projections, matrices = csa.gram.projection, csa.gram.matrix
    assert projections is not None and matrices is not None
    prescale = needs_prescale(saliencies[0], csa.scale)
    anchors = csa.anchors.unit  # (T, B, C)
    coefficients = csa.coefficients()
    anchor_grad = _anchor_grad(saliencies, csa, coefficients, prescale, mask)
    position_grad = None if tsr is None else tsr.of_channel(anchors.shape[2], mask)
    for t, (s, output) in enumerate(zip(saliencies, outputs, strict=True)):
        if output is None:
            continue
        x, rest = operand(s, csa.scale[t], prescale, mask)
        anchor_weight = coefficients.anchor_weight[t] * csa.scale[t]
        affinity_weight = coefficients.affinity_weight[t] * csa.scale[t] * rest / storage_factor(s)
        matrix = matrices[t] * affinity_weight[:, None, None]
        dx = None if position_grad is None else position_grad[t]
        if is_n_side(s):
            right = projections[t] * anchor_weight[:, None, None]
            yield GradientTerms(output, x, matrix, anchor_grad[t], dx, anchors, right)
        else:
            weighted = anchors.permute(1, 2, 0) * (anchor_weight * rest)[:, None, None]
            matrix.baddbmm_(weighted, anchors.transpose(0, 1))
            right = x.new_empty(len(x), 0, x.shape[2])
            yield GradientTerms(output, matrix, x, anchor_grad[t], dx, anchors[:0], right)
        if mask is not None:
            output.masked_fill_(~mask.view(len(mask), 1, *output.shape[2:]), 0)


def _anchor_grad(
    saliencies: list[Tensor],
    csa: CSAGradient,
    coefficients: Coefficients,
    prescale: bool,
    mask: Tensor | None,
) -> Tensor:
    """Return ``da / N`` (T, B, C); with a mask, the sample's number of positions replaces ``N``."""
    projections, radial = csa.gram.projection, csa.anchors.radial
    assert projections is not None and radial is not None
    positive = torch.zeros_like(csa.anchors.unit)  # sum_t anchor_weight_t S^_t S^_t^T u
    for t, s in enumerate(saliencies):
        v = projections[t] * coefficients.anchor_weight[t][:, None, None]  # (B, T, R)
        if is_n_side(s):
            x, rest = operand(s, csa.scale[t], prescale, mask)
            v = (v * rest[:, None, None]) @ x.mT
        positive += v.transpose(0, 1)
    removed = coefficients.radial_weight[:, None] * radial
    through = csa.anchors.factor[:, None] * (positive - removed)
    da = coefficients.negatives * csa.contrast_grad + through
    return da / number_of_positions(saliencies[0], mask)


def rows_of(output: Tensor) -> tuple[Tensor | None, bool]:
    """Return the memory of ``(B, C, *spatial)`` as dense rows, and whether these are positions.

    Rows are channels, ``(B, C, N)``, or positions, ``(B, N, C)``, where channels lie side by side.
    None where the memory is not dense.
    """
    batch, channels = output.shape[:2]
    transposed = channels > 1 and output.stride(1) == 1 and not output.is_contiguous()
    rows = output.movedim(1, -1) if transposed else output
    if not rows.is_contiguous():
        return None, transposed
    shape = (batch, -1, channels) if transposed else (batch, channels, -1)
    return rows.view(shape), transposed


def _write_sum(output: Tensor, *products: tuple[Tensor, Tensor]) -> None:
    """Write ``sum of a @ b`` (B, C, N) into the view ``output`` (B, C, *spatial)."""
    rows, transposed = rows_of(output)
    if transposed:  # matrix products write rows
        products = tuple((b.mT, a.mT) for a, b in products)
    (a, b), *others = products
    direct = rows is not None and rows.dtype == a.dtype
    total = torch.bmm(a, b, out=rows) if direct else torch.bmm(a, b)
    for a, b in others:
        total.baddbmm_(a, b)
    if not direct:
        output.copy_((total.mT if transposed else total).reshape(output.shape))
