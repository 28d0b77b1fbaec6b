"""The losses as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels import reference
from repmtl_kernels._distributed import Group, errors_shared, name_of
from repmtl_kernels._ground.saliency import accumulation_dtype
from repmtl_kernels._ground.torch_private import is_functorch_wrapped
from repmtl_kernels._losses.arguments import checked_call
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.evaluate import evaluate
from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions
from repmtl_kernels.backends import choice


class RepMTLLosses(NamedTuple):
    """Result of :func:`rep_mtl_loss`: three scalars."""

    total: Tensor
    """``lambda_tsr * tsr + lambda_csa * csa``, the regulariser of eq. 10."""
    tsr: Tensor
    csa: Tensor


def tsr_loss(
    saliencies: Tensor | Sequence[Tensor],
    *,
    over: str = "tasks",
    normalizer: str = "abs",
    temperature: float = 1.0,
    floor: float = 0.0,
    eps: float = 0.0,
    positions: Tensor | None = None,
    channel_dim: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Task-specific saliency regulation (TSR) of Rep-MTL, arXiv 2507.21049, eq. 4 to 6.

    The mean entropy (natural logarithm) of a distribution made from the channel means
    ``x_t = mean_c S_t``:

    ============ ============= ==========================================================
    ``over``     ``normalizer``  distribution
    ============ ============= ==========================================================
    ``"tasks"``  ``"abs"``     ``|x_t| / sum_k |x_k|`` at each position (the paper, eq. 5)
    ``"space"``  ``"softmax"`` ``softmax_i(x_i / temperature)`` of each sample and task
    ``"tasks"``  ``"softmax"`` ``softmax_t(x_t / temperature)`` at each position
    ``"space"``  ``"abs"``     ``|x_i| / sum_j |x_j|`` of each sample and task
    ============ ============= ==========================================================

    Args:
        saliencies: gradients of the T task losses with respect to the shared representation: a
            sequence of T tensors ``(B, C, *spatial)``, or one tensor ``(T, B, C, *spatial)``, with
            0 to 3 spatial dimensions and any strides; float64, float32, bfloat16 or float16.
        over: axis of the distribution, ``"tasks"`` or ``"space"``.
        normalizer: ``"abs"`` (invariant to the scale of the saliencies) or ``"softmax"``, where a
            mean of -inf has probability 0 and adds 0 to value and gradient; NaN, +inf and a
            distribution of nothing but -inf give NaN.
        temperature: of the softmax, above 0; not used by ``"abs"``. Temperatures, ``floor`` and
            ``eps`` are at most the largest number of float32, temperatures and ``floor``, unless 0,
            at least its smallest normal one; of float64 for float64 saliencies.
        floor: of ``"abs"``, at least 0: the distribution is made from ``|x| + floor * mean |x|``,
            the mean over all tasks, samples and positions, and differentiated. The gradient is of
            order ``1 / |x|``, so a few positions with next to no saliency can make up most of it;
            a floor, e.g. 0.1, bounds their part. 0, the default, is the paper.
        eps: guard of ``"abs"``: ``|x| / (sum + eps)``. 0, the default, is exact: a distribution
            that is zero everywhere has entropy 0 and gradient 0.
        positions: bool ``(B, *spatial)``, True where a position is there, False where it is
            padding, of tokens or of images of different sizes. None: all are there. The values of
            the saliencies at padding are never used, NaN and inf included, and their gradient is
            exactly 0. Over tasks, the loss is the mean over the positions that are there: their sum
            over all samples, divided by their number. Over space, distributions have only these
            positions, and the loss is the mean over ``B * T`` distributions. ``floor`` is a share
            of the mean over the positions that are there. A sample without any position counts as
            one whose saliencies are zero: entropy 0, gradient 0. Without any position in the batch
            the loss is 0.
        channel_dim: dimension of the channels within one task's saliency, e.g. -1 for tokens
            ``(B, N, D)``. Not 0, the batch.
        backend: ``"auto"``, ``"reference"``, ``"eager"``, ``"native"`` or ``"triton"``.

    Returns:
        Scalar in nats, float32 (float64 for float64 saliencies). Its gradient is constant along the
        channels and comes as an expanded view. Differentiable once; twice with ``"reference"``.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    options = TsrOptions(over, normalizer, temperature, floor, eps)
    tsr, _ = evaluate_losses(
        saliencies, tsr=options, positions=positions, channel_dim=channel_dim, backend=backend
    )
    return tsr


def csa_loss(
    saliencies: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.5,
    eps: float = 0.0,
    present: Tensor | None = None,
    positions: Tensor | None = None,
    channel_dim: int = 1,
    group: Group | None = None,
    memory: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Cross-task saliency alignment (CSA) of Rep-MTL, arXiv 2507.21049, eq. 7 to 9.

    With the affinity ``M_bt = S_bt S_bt^T`` and the anchor ``A_b A_b^T`` of the position means
    ``a_bt``, both Frobenius-normalised, ``s_bt`` their inner product and ``r_bk`` that of the
    anchors of samples b and k, the loss is
    ``mean_b(-mean_t s_bt / temperature + logsumexp_{k != b} r_bk / temperature)``.

    Args:
        saliencies: as for :func:`tsr_loss`. The batch needs at least 2 samples.
        temperature: above 0 (tau of eq. 9; the paper gives no value). In the range that
            :func:`tsr_loss` says; value and gradient are as exact as plain PyTorch's down to its
            end.
        eps: guard of the normalisation: ``max(norm, eps)``. 0, the default, is exact: a sample
            whose saliency or anchor is exactly zero has similarity 0 and gradient 0.
        present: bool ``(T, B)``, which task has a label for which sample; positives are averaged
            over those. None: over all tasks.
        positions: as for :func:`tsr_loss`. ``a_bt`` is the mean over the sample's positions that
            are there and ``M_bt`` is made of them alone. A sample without any has similarity 0 to
            everything, and gradient 0.
        channel_dim: as for :func:`tsr_loss`.
        group: None: negatives are the other samples of this process. ``"world"``, a
            ``ProcessGroup`` or a 1-D ``DeviceMesh``: those of all its ranks, whose batches may
            differ in size; a rank may have one sample. Every rank has to call this, and to
            backpropagate the same multiple of its result: the plain average over the ranks, which
            is what ``DistributedDataParallel`` takes of gradients, is then value and gradient of
            the whole batch's loss. The forward pass gathers ``T C`` numbers a sample and reduces
            two, the backward pass sends nothing. See docs/distributed.md.
        memory: of the Gram matrices, ``R^2`` numbers for each task and sample, ``R = min(C, N)``,
            in the saliencies' dtype, until the backward: ``"save"`` keeps them, ``"recompute"``
            makes them again there, a few samples at a time, for at most a third more
            multiply-adds. ``"auto"`` is ``"save"``: they are never larger than the saliencies,
            which the backward needs anyway. Same value, same gradient. See docs/memory.md.
        backend: as for :func:`tsr_loss`.

    Returns:
        Scalar, float32 (float64 for float64 saliencies). Differentiable once; twice with
        ``"reference"``.

    Raises:
        ValueError, TypeError: an argument is not as described, or with ``group`` that of another
            rank is not, or not the same; ``"recompute"`` with ``"reference"``.
    """
    options = CsaOptions(temperature, eps, memory)
    _, csa = evaluate_losses(
        saliencies,
        csa=options,
        present=present,
        positions=positions,
        channel_dim=channel_dim,
        group=group,
        backend=backend,
    )
    return csa


def rep_mtl_loss(
    saliencies: Tensor | Sequence[Tensor],
    *,
    lambda_tsr: float = 0.01,
    lambda_csa: float = 0.01,
    over: str = "tasks",
    normalizer: str = "abs",
    tsr_temperature: float = 1.0,
    tsr_floor: float = 0.0,
    csa_temperature: float = 0.5,
    eps: float = 0.0,
    present: Tensor | None = None,
    positions: Tensor | None = None,
    channel_dim: int = 1,
    group: Group | None = None,
    memory: str = "auto",
    backend: str = "auto",
) -> RepMTLLosses:
    """Both losses of Rep-MTL in one fused pass: the regulariser of arXiv 2507.21049, eq. 10.

    The saliencies are read once for the statistics of both losses, and one kernel writes both
    gradients.

    Args:
        saliencies: as for :func:`tsr_loss`. The batch needs at least 2 samples.
        lambda_tsr: weight of :func:`tsr_loss`, at least 0 (the paper: 0.7 to 1.5).
        lambda_csa: weight of :func:`csa_loss`, at least 0 (the paper: 0.7 to 1.5).
        over, normalizer, tsr_temperature, tsr_floor: of :func:`tsr_loss`.
        csa_temperature, present: of :func:`csa_loss`.
        group: of :func:`csa_loss`. TSR is weighted in the same way, by the rank's share of the
            samples; with ``positions`` over tasks by its share of the positions that are there,
            and every rank gives them or none does. The mean in ``tsr_floor`` is that of this rank's
            saliencies.
        eps: guard of both losses; 0 is exact.
        memory: of :func:`csa_loss`. TSR keeps ``T B N`` numbers either way.
        positions: of both losses, see :func:`tsr_loss` and :func:`csa_loss`.
        channel_dim, backend: as for :func:`tsr_loss`.

    Returns:
        :class:`RepMTLLosses`: ``total``, ``tsr``, ``csa``; each may be differentiated.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    tsr, csa = evaluate_losses(
        saliencies,
        tsr=TsrOptions(over, normalizer, tsr_temperature, tsr_floor, eps),
        csa=CsaOptions(csa_temperature, eps, memory),
        lambdas=Lambdas(lambda_tsr, lambda_csa),
        present=present,
        positions=positions,
        channel_dim=channel_dim,
        group=group,
        backend=backend,
    )
    return RepMTLLosses(float(lambda_tsr) * tsr + float(lambda_csa) * csa, tsr, csa)


def evaluate_losses(
    saliencies: Tensor | Sequence[Tensor],
    *,
    tsr: TsrOptions | None = None,
    csa: CsaOptions | None = None,
    lambdas: Lambdas | None = None,
    present: Tensor | None = None,
    positions: Tensor | None = None,
    channel_dim: int,
    group: Group | None = None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return TSR and CSA, from checked arguments and by the backend that they ask for.

    A loss whose options are None is left out: its tensor has no elements.
    """
    name = "" if group is None else name_of(group)
    with errors_shared(name, saliencies):
        operands, stacked, tsr, csa = checked_call(
            saliencies, tsr, csa, present, positions, channel_dim, name
        )
        if lambdas is not None:
            lambdas = lambdas.check(accumulation_dtype(operands[0].dtype))
        backend = choice.resolve(backend, operands[0])
        if backend == "reference":
            reference.check_supported(csa, name)
    config = Config(
        backend,
        stacked,
        channel_dim,
        _is_grad_wanted(operands),
        tsr,
        csa,
        name,
        lambdas if name else None,  # a compiled graph depends on them only with a group
    )
    losses = reference.evaluate if backend == "reference" else evaluate
    return losses(config, operands, present, positions)


def _is_grad_wanted(operands: Sequence[Tensor]) -> bool:
    # A function transform inside a compiler hides requires_grad.
    if torch.compiler.is_compiling():
        return True
    # So does vmap inside func.grad.
    return torch.is_grad_enabled() and any(
        s.requires_grad or is_functorch_wrapped(s) for s in operands
    )
