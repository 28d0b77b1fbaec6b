"""The stage contract: what every backend gives and what it may rely on.

A backend is a module with six functions, the stages of the losses. They run outside autograd, on
the T canonical views ``(B, C, *spatial)`` of the saliencies (any strides, one dtype and device),
and return tensors of the accumulation dtype (float32; float64 for float64) unless noted. ``N`` is
the number of positions, ``R = min(C, N)`` the smaller side of ``S_bt`` (``C x N``); the Gram matrix
is ``R x R``: ``S^T S`` where ``N <= C``, else ``S S^T``. ``^`` marks scaled operands:
``S^ = scale * S``. No stage writes its arguments.

``statistics(saliencies, *, positions, channels, mask=None) -> Statistics``
    One read of the saliencies.
``entropy(x, *, over, normalizer, temperature, eps, with_grad) -> Entropy``
    TSR of the position means (eq. 5 and 6) and its gradient. ``"softmax"`` takes -inf: a
    probability of 0 adds 0 to value and gradient, as in the reference. NaN and +inf give NaN, and
    so does a distribution that is -inf everywhere.
``anchors(a, *, eps, with_grad) -> Anchors``
    Unit anchors (eq. 8).
``gram(saliencies, scale, anchors, *, eps, with_grad, mask=None) -> Gram``
    Similarity of each task's affinity (eq. 7) with its anchor, without a ``C x C`` matrix unless
    that is the smaller one.
``contrast(anchors, *, temperature, with_grad, everyone=None) -> Contrast``
    The negatives' half of CSA (eq. 9): these samples against those of ``everyone``, with memory
    linear in their number. None: against each other.
``saliency_grad(saliencies, outputs, csa, position_grad, mask=None)``
    Writes the gradient of each task into ``outputs`` (views like the saliencies, or None where no
    gradient is wanted).

``mask`` (B, N), bool and contiguous, is True where a position is there; None: all are. What the
saliencies hold elsewhere is never used, NaN and inf included: it is replaced by 0, not multiplied
with 0. The stages do the following with it, without a copy of the saliencies; a sample may have no
position.

- ``statistics``: ``x`` is exactly 0 at the other positions, ``a`` is the sum over a sample's
  positions divided by their number (0 where there is none), ``scale`` is that of the largest
  magnitude at them (1 where there is none).
- ``gram``: the affinities are those of the positions that are there; on the N side, rows and
  columns of the matrix and columns of the projection are 0 at the others.
- ``saliency_grad``: the gradient is exactly 0 at the other positions, and ``da`` is divided by the
  sample's number of positions instead of ``N``. ``position_grad`` is 0 at the others already.

``entropy`` has no mask: its caller prepares ``x``.

A module may also have ``in_one_call(saliency)``: a namespace of operators ``losses`` and
``losses_backward`` that do all stages of such saliencies in one call each, or None. Their schemas
are in ``csrc/cuda/operators.cpp``: ``losses(saliencies, present, mask, ...)`` and
``losses_backward(grad_csa, position_grad, mask, ...)``. The first also does what
``_losses.forward._entropy`` does around the entropy stage.

With ``eps`` the norms are ``max(norm, eps)``; without, a zero norm gives similarity and gradient 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """Means and scales of the saliencies; None where not asked for."""

    positions: Tensor | None  # (T, B, N): x, mean over the channels
    channels: Tensor | None  # (T, B, C): a, mean over the positions
    scale: Tensor | None  # (T, B): power of two, max |scale * S_bt| in [0.5, 2); with `channels`


class Entropy(NamedTuple):
    value: Tensor  # (): mean entropy
    grad: Tensor | None  # (T, B, N): d value / d x


class Anchors(NamedTuple):
    """Unit anchors ``u_bt = factor_b a_bt``: ``sum_t u u^T`` has Frobenius norm 1."""

    unit: Tensor  # (T, B, C): u, contiguous
    factor: Tensor  # (B,): 0 where the anchor is exactly zero
    radial: Tensor | None  # (T, B, C): sum_v (u_t . u_v) u_v, what normalisation takes out of a
    #                      gradient; 0 where the norm is clamped by eps


class Everyone(NamedTuple):
    """The samples of all ranks: G of them, those of this one from ``first`` on."""

    unit: Tensor  # (T, G, C): unit anchors; memory as (T, G, C) or (G, T, C) lies
    first: int
    # Peaks (2, G), see peaks.py, of everyone's columns of r over each rank's samples to those over
    # all samples; each rank calls it once.
    join: Callable[[Tensor], Tensor]


class Contrast(NamedTuple):
    logsumexp: Tensor  # (B,): logsumexp over k != b of r_bk / temperature
    grad: Tensor | None  # (T, B, C): d mean logsumexp of everyone / d a, through the normalisation


class Gram(NamedTuple):
    similarity: Tensor  # (T, B): s = p / max(m, eps), p = sum_u |S^T u|^2, m = Frobenius norm
    inverse: Tensor  # (T, B): 1 / max(m^, eps scale^2), 0 where m is 0
    slope: Tensor  # (T, B): d s / d m^ = -s * inverse, 0 where m is clamped by eps
    projection: (
        Tensor | None
    )  # (T, B, T, R): S^^T u_u (N side) or S^ S^^T u_u (C side), u over tasks
    matrix: (
        Tensor | None
    )  # (T, B, R, R) in the saliencies' dtype: backend's multiple of S^^T S^ / S^ S^^T


class CSAGradient(NamedTuple):
    """What ``saliency_grad`` needs of CSA: with ``u`` the unit anchors and per (task, sample)

    ``dS^ = anchor_weight sum_u u_u (u_u^T S^) + affinity_weight S^ (S^^T S^)``, times ``scale``,
    plus ``da 1^T / N`` (with a mask, over the sample's number of positions),
    ``da_u = negatives contrast_grad_u
    + factor (sum_t anchor_weight_t S^_t S^_t^T u_u - radial_weight radial_u)``.
    """

    scale: Tensor  # (T, B)
    anchors: Anchors
    contrast_grad: Tensor  # (T, B, C): Contrast.grad
    gram: Gram
    anchor_weight: Tensor  # (T, B): 2 (dL/ds) inverse
    affinity_weight: Tensor  # (T, B): anchor_weight * slope
    radial_weight: Tensor  # (B,): sum_t 2 (dL/ds) s
    negatives: Tensor  # (): dL / d mean_b logsumexp

    def of_samples(self, some: slice) -> CSAGradient:
        """The part that the gradient of some samples needs, contiguous as the stages take it."""

        def cut(value: Tensor | None) -> Tensor | None:  # (T, B, ...)
            return None if value is None else value[:, some].contiguous()

        unit, factor, radial = self.anchors
        return CSAGradient(
            scale=cut(self.scale),
            anchors=Anchors(cut(unit), factor[some], cut(radial)),
            contrast_grad=cut(self.contrast_grad),
            gram=Gram(*map(cut, self.gram)),
            anchor_weight=cut(self.anchor_weight),
            affinity_weight=cut(self.affinity_weight),
            radial_weight=self.radial_weight[some],
            negatives=self.negatives,
        )
