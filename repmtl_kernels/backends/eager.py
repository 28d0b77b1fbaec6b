"""The stages in plain PyTorch, for any device. Contract: ``backends/contract.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import accumulation_dtype, float16_gram_factor, in_factors
from repmtl_kernels.backends.contract import (
    Anchors,
    Contrast,
    CSAGradient,
    Entropy,
    Everyone,
    Gram,
    Statistics,
)
from repmtl_kernels.backends.peaks import joined, peaks, share

# Rows of one block of the Gram matrix: small enough to skip most of the upper half, large enough
# for the matrix product to run at full speed.
GRAM_BLOCK = 128
# Elements of one block of anchor products: bounds the memory of the contrast stage.
CONTRAST_BLOCK = 1 << 22
# Elements of one task's saliency that are copied at a time, with 0 where no position is, unless
# those of one sample are more.
MASKED_BLOCK = 1 << 18
# Products of operands with max in [2^-30, 2^30] neither overflow nor underflow in float32.
SAFE_EXPONENT = 30


def statistics(
    saliencies: list[Tensor], *, positions: bool, channels: bool, mask: Tensor | None = None
) -> Statistics:
    dtype = accumulation_dtype(saliencies[0].dtype)
    flat = [s.flatten(2) for s in saliencies]
    x = a = scale = None
    if positions:
        x = torch.stack([s.sum(1, dtype=dtype) for s in flat]).div_(flat[0].shape[1])
        if mask is not None:
            x.masked_fill_(~mask, 0)
    if channels:
        sums, largest = zip(*(_over_positions(s, mask, dtype) for s in flat), strict=True)
        a = torch.stack(sums).div_(_number_of_positions(flat[0], mask))
        scale = _power_of_two(torch.stack(largest).to(dtype))
    return Statistics(x, a, scale)


def _over_positions(
    saliency: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sums (B, C) and largest magnitudes (B,) of (B, C, N)."""
    if mask is None:
        largest = torch.maximum(saliency.amax((1, 2)), -saliency.amin((1, 2)))
        return saliency.sum(2, dtype=dtype), largest
    parts = (
        _over_positions(_masked(saliency[some], mask[some]), None, dtype)
        for some in _some_samples(saliency)
    )
    sums, largest = zip(*parts, strict=True)
    return torch.cat(sums), torch.cat(largest)


def _masked(saliency: Tensor, mask: Tensor) -> Tensor:
    """(B, C, N) with 0 where no position is, whatever is there."""
    return saliency.where(mask[:, None], 0)


def _some_samples(saliency: Tensor) -> list[slice]:
    """The samples that are masked together."""
    step = max(1, MASKED_BLOCK // saliency[0].numel())
    return [slice(first, first + step) for first in range(0, len(saliency), step)]


def _number_of_positions(saliency: Tensor, mask: Tensor | None) -> int | Tensor:
    """The number of positions of each sample, (B, 1), at least 1; without a mask, ``N``."""
    if mask is None:
        return saliency.shape[2:].numel()
    return mask.sum(1, keepdim=True).clamp_min(1)


def _power_of_two(largest: Tensor) -> Tensor:
    """The power of two that brings ``largest`` into [0.5, 1), exactly; 1 for 0.

    From the bits: not every device has ``torch.frexp``.
    """
    bits, bias, mantissa = (
        (torch.int32, 127, 23) if largest.dtype == torch.float32 else (torch.int64, 1023, 52)
    )
    biased = (largest.view(bits) >> mantissa) & (2 * bias + 1)
    exponent = (2 * bias - 1 - biased).clamp(1, 2 * bias - 1).where(largest != 0, bias)
    return (exponent << mantissa).view(largest.dtype)


def entropy(
    x: Tensor, *, over: str, normalizer: str, temperature: float, eps: float, with_grad: bool
) -> Entropy:
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


def anchors(a: Tensor, *, eps: float, with_grad: bool) -> Anchors:
    scale = _power_of_two(a.abs().amax((0, 2)))  # (B,)
    scaled = a * scale[:, None]
    products = torch.einsum("tbc,ubc->btu", scaled, scaled)
    norm = _square_norm(products).sqrt()
    inverse, free = _guarded_inverse(norm, scale, eps)
    factor = scale * inverse.sqrt()
    u = scaled * inverse.sqrt()[:, None]
    if not with_grad:
        return Anchors(u, factor, None)
    radial = torch.einsum("btu,ubc->tbc", products * (inverse * free)[:, None, None], u)
    return Anchors(u, factor, radial)


def contrast(
    anchors: Anchors, *, temperature: float, with_grad: bool, everyone: Everyone | None = None
) -> Contrast:
    u = anchors.unit
    tasks, batch, channels = u.shape
    rows = others = u.transpose(0, 1).reshape(batch * tasks, channels)
    first = 0
    if everyone is not None:
        others, first = everyone.unit.transpose(0, 1).reshape(-1, channels), everyone.first
    total = len(others) // tasks
    step = max(1, CONTRAST_BLOCK // (tasks * len(others)))
    blocks = range(0, batch, step)

    def similarity(b: int) -> tuple[Tensor, Tensor]:
        """u_bt . u_ku of one block of samples, and r_bk with -inf for k = b."""
        dots = (rows[b * tasks : (b + step) * tasks] @ others.T).view(-1, tasks, total, tasks)
        r = dots.square().sum((1, 3))
        r.diagonal(first + b).fill_(float("-inf"))
        return dots, r

    found = []
    columns = u.new_zeros(2, total)
    for b in blocks:
        dots, r = similarity(b)
        found.append(peaks(r, 1, temperature))
        if with_grad:
            both = torch.stack((columns, peaks(r, 0, temperature)), 1)
            columns = joined(both, temperature, lambda x: x.amax(0), lambda x: x.sum(0))
    largest, sums = torch.cat(found, 1)
    lse = largest / temperature + sums.log()
    if not with_grad:
        return Contrast(lse, None)

    if everyone is not None:
        columns = everyone.join(columns)
    du = torch.empty_like(rows)
    for b, own in zip(blocks, found, strict=True):
        if len(blocks) > 1:  # else those of above are still there
            dots, r = similarity(b)
        # r_bk is a negative of sample b and of sample k. Both weights are taken from r_bk: r_kb is
        # another sum, and at low temperatures its rounding would be all that is seen.
        weight = share(r, own[..., None], temperature) + share(r, columns, temperature)
        dots *= (weight * (2 / (temperature * total)))[:, None, :, None]
        torch.mm(dots.view(-1, len(others)), others, out=du[b * tasks : (b + step) * tasks])
    du = du.view(batch, tasks, channels).transpose(0, 1)
    radial_weight = (du * u).sum((0, 2))
    return Contrast(lse, anchors.factor[:, None] * (du - radial_weight[:, None] * anchors.radial))


def _guarded_inverse(norm: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``1 / max(norm, eps scale^2)``, 0 for a norm of 0; and 1 where not clamped, else 0.

    ``norm`` is that of products of operands times ``scale``.
    """
    mantissa, root = in_factors(eps) if norm.dtype == torch.float32 else (eps, 1.0)
    least = mantissa * (root * scale) * (root * scale)  # in this order: scale^2 may overflow
    inverse = torch.maximum(norm, least).reciprocal().where(norm != 0, 0)
    return inverse, (norm >= least).to(norm.dtype)


def gram(
    saliencies: list[Tensor],
    scale: Tensor,
    anchors: Tensor,
    *,
    eps: float,
    with_grad: bool,
    mask: Tensor | None = None,
) -> Gram:
    first = saliencies[0]
    if mask is not None and len(parts := _some_samples(first)) > 1:
        whole: Gram | None = None
        for some in parts:
            given = [s[some] for s in saliencies], scale[:, some], anchors[:, some]
            part = gram(*given, eps=eps, with_grad=with_grad, mask=mask[some])
            if whole is None:
                whole = Gram(
                    *(v if v is None else v.new_empty(*scale.shape, *v.shape[2:]) for v in part)
                )
            for of_all, value in zip(whole, part, strict=True):
                if value is not None:
                    of_all[:, some] = value
        return whole
    n_side = _is_n_side(first)
    side = min(first.shape[1], first.shape[2:].numel())
    stored = first.new_empty(*scale.shape, side, side) if with_grad else None
    in_place = with_grad and stored.dtype == scale.dtype
    scratch = None
    if not in_place and (with_grad or not n_side):
        scratch = scale.new_empty(scale.shape[1], side, side)
    norms, positives, projections = [], [], []
    prescale = _needs_prescale(first, scale)
    for t, s in enumerate(saliencies):
        x, rest = _operand(s, scale[t], prescale, mask)  # (B, C, N)
        u = anchors.transpose(0, 1)  # (B, T, C)
        matrix = stored[t] if in_place else scratch
        norms.append(_half_gram(x.mT if n_side else x, rest.square(), matrix))
        if n_side:
            v = (u @ x) * rest[:, None, None]
            positives.append(v.square().sum((1, 2)))
        else:
            v = u @ matrix
            positives.append((u * v).sum((1, 2)))
        if with_grad:
            projections.append(v)
            if not in_place:
                stored[t] = matrix.mul_(_storage_factor(s))
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
    """From the norm ``m^`` and ``p^`` (T, B) of scaled saliencies."""
    inverse, free = _guarded_inverse(norm, scale, eps)
    similarity = positive * inverse
    return Gram(similarity, inverse, -similarity * inverse * free, projection, matrix)


def _storage_factor(saliency: Tensor) -> float:
    """The power of two on the stored Gram matrix."""
    if saliency.dtype != torch.float16:
        return 1.0
    return float16_gram_factor(max(saliency.shape[1], saliency.shape[2:].numel()))


def _is_n_side(saliency: Tensor) -> bool:
    """Whether positions, not channels, are the smaller side of ``S_bt``."""
    return saliency.shape[2:].numel() <= saliency.shape[1]


def _needs_prescale(saliency: Tensor, scale: Tensor) -> bool:
    """Whether products of unscaled saliencies may leave the range of their dtype.

    Read on the CPU only, where it costs no synchronisation; elsewhere operands are always scaled.
    """
    if not saliency.is_cpu:
        return True
    bound = 2.0**SAFE_EXPONENT
    return not bool(((scale <= bound) & (scale >= 1 / bound)).all())


def _operand(
    saliency: Tensor, scale: Tensor, prescale: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x`` (B, C, N) and ``rest`` (B,), ``x * rest = S^``, in the dtype of ``scale``.

    PyTorch's 16-bit matrix products round their results.
    """
    x = saliency.flatten(2)
    if mask is not None:
        x = _masked(x, mask)
    x = x.to(scale.dtype)
    if not prescale:
        return x, scale
    return x * scale[:, None, None], torch.ones_like(scale)


def _half_gram(x: Tensor, factor: Tensor, out: Tensor | None) -> Tensor:
    """Frobenius norms (B,) of ``factor * x x^T`` (B, R, R), from the lower half of its blocks.

    The matrix is written into ``out`` if that is given.
    """
    rows = x.shape[1]
    factor = factor[:, None, None]
    square = 0.0
    for i in range(0, rows, GRAM_BLOCK):
        j = min(i + GRAM_BLOCK, rows)
        block = (x[:, i:j] @ x[:, :j].mT).mul_(factor)
        if out is not None:
            out[:, i:j, :j] = block
            out[:, :i, i:j] = block[:, :, :i].mT
        if i:
            square = square + 2 * _square_norm(block[:, :, :i])
        square = square + _square_norm(block[:, :, i:])
    return square.sqrt()


def _square_norm(x: Tensor) -> Tensor:
    """(B,), row by row: one long float32 sum is less accurate by one or two orders of magnitude."""
    return torch.linalg.vector_norm(x, dim=2).square().sum(1)


class GradientTerms(NamedTuple):
    """One task's gradient (B, C, N): ``a @ b + da 1^T + 1 dx^T + sum_k left_k right_k^T``."""

    output: Tensor  # (B, C, *spatial), where it goes
    a: Tensor  # (B, C, R)
    b: Tensor  # (B, R, N)
    da: Tensor  # (B, C)
    dx: Tensor | None  # (B, N): TSR's
    left: Tensor  # (K, B, C)
    right: Tensor  # (B, K, N)


def gradient_terms(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    position_grad: Tensor | None,
    mask: Tensor | None,
) -> Iterator[GradientTerms]:
    """The terms of each task whose gradient is wanted; with a mask, a few samples at a time.

    The caller has written the output of one before it asks for the next.
    """
    if mask is not None and len(parts := _some_samples(saliencies[0])) > 1:
        for some in parts:
            yield from gradient_terms(
                [s[some] for s in saliencies],
                [None if output is None else output[some] for output in outputs],
                csa.of_samples(some),
                None if position_grad is None else position_grad[:, some],
                mask[some],
            )
        return
    prescale = _needs_prescale(saliencies[0], csa.scale)
    anchors = csa.anchors.unit  # (T, B, C)
    anchor_grad = _anchor_grad(saliencies, csa, prescale, mask)
    for t, (s, output) in enumerate(zip(saliencies, outputs, strict=True)):
        if output is None:
            continue
        x, rest = _operand(s, csa.scale[t], prescale, mask)
        anchor_weight = csa.anchor_weight[t] * csa.scale[t]
        affinity_weight = csa.affinity_weight[t] * csa.scale[t] * rest / _storage_factor(s)
        matrix = csa.gram.matrix[t] * affinity_weight[:, None, None]
        dx = None if position_grad is None else position_grad[t]
        if _is_n_side(s):
            right = csa.gram.projection[t] * anchor_weight[:, None, None]
            yield GradientTerms(output, x, matrix, anchor_grad[t], dx, anchors, right)
        else:
            weighted = anchors.permute(1, 2, 0) * (anchor_weight * rest)[:, None, None]
            matrix.baddbmm_(weighted, anchors.transpose(0, 1))
            right = x.new_empty(len(x), 0, x.shape[2])
            yield GradientTerms(output, matrix, x, anchor_grad[t], dx, anchors[:0], right)
        if mask is not None:
            output.masked_fill_(~mask.view(len(mask), 1, *output.shape[2:]), 0)


def saliency_grad(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    position_grad: Tensor | None,
    mask: Tensor | None = None,
) -> None:
    for term in gradient_terms(saliencies, outputs, csa, position_grad, mask):
        # All but the product with the Gram matrix is a sum of few outer products (C) x (N).
        ones = term.da.new_ones(len(term.da), 1, 1)
        left = [term.da[:, :, None], term.left.permute(1, 2, 0)]
        right = [ones.expand(-1, 1, term.b.shape[2]), term.right]
        if term.dx is not None:
            left.append(ones.expand(-1, term.a.shape[1], 1))
            right.append(term.dx[:, None])
        outer = torch.cat(left, 2), torch.cat(right, 1)
        _write_sum(term.output, outer, (term.a, term.b))


def _anchor_grad(
    saliencies: list[Tensor], csa: CSAGradient, prescale: bool, mask: Tensor | None
) -> Tensor:
    """``da / N`` (T, B, C)."""
    positive = torch.zeros_like(csa.anchors.unit)  # sum_t anchor_weight_t S^_t S^_t^T u
    for t, s in enumerate(saliencies):
        v = csa.gram.projection[t] * csa.anchor_weight[t][:, None, None]  # (B, T, R)
        if _is_n_side(s):
            x, rest = _operand(s, csa.scale[t], prescale, mask)
            v = (v * rest[:, None, None]) @ x.mT
        positive += v.transpose(0, 1)
    radial = csa.radial_weight[:, None] * csa.anchors.radial
    through = csa.anchors.factor[:, None] * (positive - radial)
    da = csa.negatives * csa.contrast_grad + through
    return da / _number_of_positions(saliencies[0], mask)


def rows_of(output: Tensor) -> tuple[Tensor | None, bool]:
    """The memory of ``(B, C, *spatial)`` as dense ``(B, C, N)``, or, and then True, where channels
    lie side by side as dense ``(B, N, C)``; None where it is not dense."""
    batch, channels = output.shape[:2]
    transposed = channels > 1 and output.stride(1) == 1 and not output.is_contiguous()
    rows = output.movedim(1, -1) if transposed else output
    if not rows.is_contiguous():
        return None, transposed
    shape = (batch, -1, channels) if transposed else (batch, channels, -1)
    return rows.view(shape), transposed


def _write_sum(output: Tensor, *products: tuple[Tensor, Tensor]) -> None:
    """Writes ``sum of a @ b`` (B, C, N) into the view ``output`` (B, C, *spatial)."""
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
