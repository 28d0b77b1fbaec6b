"""The contract of the backends: eight stages, with their shapes, dtypes, formulas and masks.

A backend is a module with the functions of :class:`Stages`. They are called in this order:
``statistics``, ``entropy`` (TSR), ``anchors``, ``gram``, ``contrast`` and ``values`` (CSA) in the
forward pass, ``saliency_grad`` in the backward pass. Equation numbers are those of the paper.
``affinity`` is called by itself.

Sizes
    ``T`` tasks, ``B`` samples, ``C`` channels, ``N`` positions (the product of the spatial sizes),
    ``R = min(C, N)``.
Saliencies
    ``T`` views ``(B, C, *spatial)`` of one dtype and device, with any strides. ``S``, or ``S_bt``,
    is the ``C x N`` matrix of one sample and task.
Sides
    The Gram matrix of ``S`` is made on the smaller side, so it is ``R x R``: ``S^T S`` on the
    N side (``N <= C``), ``S S^T`` on the C side.
Scaled operands
    ``S^ = scale * S``, where ``scale`` is a power of two for each task and sample. A ``^`` marks
    whatever is made from ``S^``.
Results
    Tensors of the accumulation dtype: float64 for float64 saliencies, else float32. Exceptions are
    noted where they are. The stages run outside autograd and write no argument but ``outputs``.
Norms
    With ``eps`` a norm is ``max(norm, eps)``. With ``eps = 0`` a norm of zero gives a similarity of
    0 and a gradient of 0.
Masks
    ``mask`` is ``(B, N)``, bool and contiguous: True where a position exists. None: all of them do.
    A sample may have none. No stage uses what the saliencies hold at the other positions, NaN and
    inf included: it takes 0 instead, and does not multiply by 0. No stage copies all saliencies to
    do so. ``entropy``, ``contrast`` and ``values`` have no mask: their arguments are prepared by
    the caller.

A backend may have one more function, ``in_one_call(saliency)``. It returns a namespace with the
operators ``losses`` and ``losses_backward``, which run all stages for such saliencies in one call
each, or None. Their schemas are in ``csrc/cuda/operators.cpp``. ``losses`` also does what
``_losses.entropy`` does around the entropy stage.

Another one is ``prepare(saliencies, mask, expected)``. It is called before the stages, and makes
ready what they will need for such saliencies, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Statistics(NamedTuple):
    """Means and scales of the saliencies. A field that was not asked for is None."""

    positions: Tensor | None  # (T, B, N): x, the mean over the channels
    channels: Tensor | None  # (T, B, C): a, the mean over the positions
    scale: Tensor | None  # (T, B): power of two, max |scale * S_bt| in [0.5, 2); with `channels`


class Entropy(NamedTuple):
    """TSR of position means ``x``."""

    value: Tensor  # (): mean entropy
    grad: Tensor | None  # (T, B, N): d value / d x; None without a gradient


class Anchors(NamedTuple):
    """Unit anchors ``u_bt = factor_b a_bt``: ``sum_t u u^T`` has Frobenius norm 1."""

    unit: Tensor  # (T, B, C): u, contiguous
    factor: Tensor  # (B,): 0 where the anchor is exactly zero
    # (T, B, C): sum_v (u_t . u_v) u_v, the part of a gradient that normalisation removes; 0 where
    # eps clamps the norm. None without a gradient.
    radial: Tensor | None


class AllSamples(NamedTuple):
    """The unit anchors of all processes: ``G`` samples."""

    unit: Tensor  # (T, G, C): unit anchors; in memory (T, G, C) or (G, T, C)
    first: int  # the number of this process's first sample among the G
    # From the peaks (2, G) of the columns of r over this process's samples (see peaks.py) to the
    # peaks over all samples. Every process calls it once.
    join: Callable[[Tensor], Tensor]


class Contrast(NamedTuple):
    """The negatives' half of CSA. ``r_bk = sum_tv (u_bt . u_kv)^2`` for samples ``b`` and ``k``."""

    logsumexp: Tensor  # (B,): logsumexp over k != b of r_bk / temperature
    # (T, B, C): d (mean of all samples' logsumexp) / d a, through the normalisation of the anchors.
    # None without a gradient.
    grad: Tensor | None


class Gram(NamedTuple):
    """Similarities of affinities with anchors, and what their gradient needs.

    ``p = sum_v |S^T u_v|^2`` over the tasks ``v``, and ``m`` is the Frobenius norm of the Gram
    matrix of ``S``. ``projection`` and ``matrix`` are None without a gradient.
    """

    similarity: Tensor  # (T, B): s = p / max(m, eps)
    inverse: Tensor  # (T, B): 1 / max(m^, eps scale^2), 0 where m is 0
    slope: Tensor  # (T, B): d s / d m^ = -s * inverse, 0 where eps clamps m
    projection: Tensor | None  # (T, B, T, R): S^^T u_v on the N side, S^ S^^T u_v on the C side
    # (T, B, R, R) in the saliencies' dtype: the Gram matrix of S^, times a number that the backend
    # chooses.
    matrix: Tensor | None


class Values(NamedTuple):
    """CSA, its derivative, and the total of both losses."""

    csa: Tensor  # ()
    # (T, B): d csa / d s, -1 / (B K temperature) for each of a sample's K (present) tasks, else 0
    weight: Tensor
    total: Tensor | None  # (): lambda_tsr tsr + lambda_csa csa; None without lambdas


class LossGradient(NamedTuple):
    """``dL / d loss``, the product of a tensor and a number."""

    grad: Tensor  # ()
    factor: float

    def product(self) -> Tensor:
        """Return ``dL / d loss``."""
        return self.grad if self.factor == 1 else self.grad * self.factor


class TSRGradient(NamedTuple):
    """TSR's part of the gradient of the saliencies: ``(dL / d tsr) position_grad 1^T / C``."""

    position_grad: Tensor  # (T, B, N): d tsr / d x; with a mask, anything at other positions
    of_loss: LossGradient

    def of_samples(self, samples: slice) -> TSRGradient:
        """Return the part for these samples, contiguous as the stages take it."""
        return self._replace(position_grad=self.position_grad[:, samples].contiguous())

    def of_channel(self, channels: int, mask: Tensor | None) -> Tensor:
        """Return what each of the channels adds, (T, B, N); 0 at positions that do not exist."""
        grad = self.position_grad * (self.of_loss.product() / channels)
        # NaN elsewhere, or an infinite gradient, must not spread to padding.
        return grad if mask is None else grad.masked_fill_(~mask, 0)


class Coefficients(NamedTuple):
    """The numbers in the formulas of :class:`CSAGradient`."""

    negatives: Tensor  # (): dL / d csa
    anchor_weight: Tensor  # (T, B): 2 (dL/ds) inverse
    affinity_weight: Tensor  # (T, B): anchor_weight * slope
    radial_weight: Tensor  # (B,): sum_t 2 (dL/ds) s


class CSAGradient(NamedTuple):
    """CSA's part of the gradient of the saliencies.

    For each task ``t`` and sample, with the unit anchors ``u_v`` of all tasks ``v``, the gradient
    is ``scale dS^ + da 1^T / N``; with a mask, the sample's number of positions replaces ``N``.

    ``dS^ = anchor_weight sum_v u_v (u_v^T S^) + affinity_weight S^ (S^^T S^)``

    ``da_v = negatives contrast_grad_v
    + factor (sum_t anchor_weight_t S^_t S^_t^T u_v - radial_weight radial_v)``

    The weights are those of :class:`Coefficients`, with ``dL/ds = (dL / d csa) weight``.
    """

    scale: Tensor  # (T, B)
    anchors: Anchors
    contrast_grad: Tensor  # (T, B, C): Contrast.grad
    gram: Gram
    weight: Tensor  # (T, B): Values.weight
    of_loss: LossGradient

    def coefficients(self) -> Coefficients:
        """Return the coefficients, for backends that do not compute them in their kernels."""
        negatives = self.of_loss.product()
        ds = 2 * negatives * self.weight
        anchor_weight = ds * self.gram.inverse
        return Coefficients(
            negatives,
            anchor_weight,
            anchor_weight * self.gram.slope,
            (ds * self.gram.similarity).sum(0),
        )

    def of_samples(self, samples: slice) -> CSAGradient:
        """Return the part for these samples, contiguous as the stages take it."""

        def part(value: Tensor) -> Tensor:  # (T, B, ...)
            return value[:, samples].contiguous()

        def part_or_none(value: Tensor | None) -> Tensor | None:
            return None if value is None else part(value)

        unit, factor, radial = self.anchors
        similarity, inverse, slope, projection, matrix = self.gram
        return CSAGradient(
            scale=part(self.scale),
            anchors=Anchors(part(unit), factor[samples], part_or_none(radial)),
            contrast_grad=part(self.contrast_grad),
            gram=Gram(
                part(similarity),
                part(inverse),
                part(slope),
                part_or_none(projection),
                part_or_none(matrix),
            ),
            weight=part(self.weight),
            of_loss=self.of_loss,
        )


class Expected(NamedTuple):
    """A description of what a call and its backward pass will ask of the stages."""

    entropy: tuple[str, str] | None  # `over` and `normalizer`; None: without TSR
    csa: bool
    with_grad: bool
    recompute: bool  # the backward pass makes the Gram matrices again
    present: bool  # some tasks may be missing
    total: bool  # of both losses


class Stages(Protocol):
    """The functions of a backend's module."""

    def statistics(
        self,
        saliencies: list[Tensor],
        *,
        positions: bool,
        channels: bool,
        mask: Tensor | None = None,
    ) -> Statistics:
        """Return the means that are asked for, from one read of the saliencies (eq. 4 and 8).

        With a mask, at each sample's own positions: ``positions`` is exactly 0 elsewhere,
        ``channels`` is the sum divided by their number (0 if there are none), and ``scale`` is for
        the largest magnitude at them (1 if there are none).
        """

    def entropy(
        self,
        x: Tensor,
        *,
        over: str,
        normalizer: str,
        temperature: float,
        eps: float,
        with_grad: bool,
    ) -> Entropy:
        """Return TSR of the position means ``x`` (T, B, N) and its gradient (eq. 5 and 6).

        ``over`` is ``"tasks"`` or ``"space"``, ``normalizer`` is ``"abs"`` or ``"softmax"``.
        ``"softmax"`` accepts -inf: a probability of 0 adds 0 to value and gradient, as in the
        reference. NaN and +inf give NaN, and so does a distribution that is -inf everywhere.
        """

    def anchors(self, a: Tensor, *, eps: float, with_grad: bool) -> Anchors:
        """Return the unit anchors of the channel means ``a`` (T, B, C) (eq. 8)."""

    def contrast(
        self,
        anchors: Anchors,
        *,
        temperature: float,
        with_grad: bool,
        all_samples: AllSamples | None = None,
    ) -> Contrast:
        """Return the negatives' half of CSA (eq. 9), with memory linear in the number of samples.

        It compares the samples of ``anchors`` with ``all_samples``, or with each other if that is
        None.
        """

    def gram(
        self,
        saliencies: list[Tensor],
        scale: Tensor,
        anchors: Tensor,
        *,
        eps: float,
        with_grad: bool,
        mask: Tensor | None = None,
    ) -> Gram:
        """Return each task's similarity of its affinity with its anchor (eq. 7).

        ``scale`` is :attr:`Statistics.scale`, ``anchors`` is :attr:`Anchors.unit`. Makes the
        ``C x C`` matrix on the C side only. With a mask, the affinities are those of the sample's
        own positions: on the N side the rows and columns of the matrix and the columns of the
        projection are 0 at the others.
        """

    def values(
        self,
        similarity: Tensor,
        logsumexp: Tensor,
        present: Tensor | None,
        *,
        temperature: float,
        tsr: Tensor | None = None,
        lambdas: tuple[float, float] | None = None,
    ) -> Values:
        """Return CSA (eq. 9) from :attr:`Gram.similarity` and :attr:`Contrast.logsumexp`.

        ``present`` (T, B), bool, says which tasks count for a sample; None: all of them. With
        ``lambdas``, of TSR and CSA, and the value of TSR, also the total of both losses (eq. 10).
        """

    def saliency_grad(
        self,
        saliencies: list[Tensor],
        outputs: list[Tensor | None],
        csa: CSAGradient,
        tsr: TSRGradient | None,
        mask: Tensor | None = None,
    ) -> None:
        """Write the gradient of both losses with respect to each task's saliency.

        ``outputs`` are views like the saliencies, None where no gradient is wanted. ``tsr`` is
        added to every channel; None: there is no TSR. With a mask, the gradient is exactly 0 at the
        other positions.
        """

    def affinity(self, saliencies: list[Tensor], *, mask: Tensor | None = None) -> Tensor:
        """Return the inner products (B, T, T) of the tasks' saliencies, float64, from one read.

        Symmetric to the bit. An error is relative to the product of the two tasks' norms, at any
        scale of either.
        """
