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
    """The result of :func:`rep_mtl_loss`: three scalars."""

    total: Tensor
    """``lambda_tsr * tsr + lambda_csa * csa``, the regulariser of eq. 10.

    It is a result of its own: its gradient does not pass through ``tsr`` and ``csa``.
    """
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

    TSR is the mean entropy (natural logarithm) of a distribution made from the channel means
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
            0 to 3 spatial dimensions and any strides. float64, float32, bfloat16 or float16.
        over: axis of the distribution, ``"tasks"`` or ``"space"``.
        normalizer: ``"abs"`` or ``"softmax"``. ``"abs"`` is invariant to the scale of the
            saliencies. In ``"softmax"`` a mean of -inf has probability 0 and adds 0 to value and
            gradient; NaN, +inf and a distribution of nothing but -inf give NaN.
        temperature: temperature of the softmax, above 0; ``"abs"`` does not use it. Temperatures,
            ``floor`` and ``eps`` must not be larger than the largest number of float32 (float64 for
            float64 saliencies). Temperatures, and a ``floor`` other than 0, must not be smaller
            than its smallest normal number.
        floor: at least 0, for ``"abs"`` only: the distribution is made from
            ``|x| + floor * mean |x|``. The mean is over all tasks, samples and positions, and is
            differentiated. The gradient is of order ``1 / |x|``, so a few positions with next to no
            saliency can make up most of it; a floor, e.g. 0.1, limits their part. 0, the default,
            is the paper's TSR.
        eps: guard of ``"abs"``: ``|x| / (sum + eps)``. 0, the default, is exact: a distribution
            that is zero everywhere has entropy 0 and gradient 0.
        positions: bool ``(B, *spatial)``: True where a position exists, False where it is padding,
            for tokens or for images of different sizes. None: all positions exist. Values of
            the saliencies in the padding are never used, NaN and inf included, and the gradient
            there is exactly 0. Over tasks, the loss is the mean over the existing positions of all
            samples. Over space, the distributions leave the padding out, and the loss is the mean
            over the ``B * T`` distributions. The mean in ``floor`` is over existing positions. A
            sample without any position counts as one whose saliencies are zero: entropy 0,
            gradient 0. If no position exists in the batch, the loss is 0.
        channel_dim: dimension of the channels within one task's saliency, e.g. -1 for tokens
            ``(B, N, D)``. It can't be 0, the batch.
        backend: ``"auto"``, ``"reference"``, ``"eager"``, ``"native"`` or ``"triton"``.

    Returns:
        Scalar in nats, float32 (float64 for float64 saliencies). Its gradient is constant along the
        channels and comes as an expanded view. Differentiable once; twice with ``"reference"``.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    options = TsrOptions(over, normalizer, temperature, floor, eps)
    _, tsr, _ = evaluate_losses(
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

    A task has the affinity ``M_bt = S_bt S_bt^T`` for each sample, and a sample has the anchor
    ``A_b A_b^T``, where ``A_b`` holds the position means ``a_bt`` of all tasks. Both are divided by
    their Frobenius norm. With the inner products ``s_bt`` of affinity and anchor, and ``r_bk`` of
    the anchors of samples b and k, the loss is
    ``mean_b(-mean_t s_bt / temperature + logsumexp_{k != b} r_bk / temperature)``.

    Args:
        saliencies: as for :func:`tsr_loss`. The batch needs at least 2 samples.
        temperature: tau of eq. 9, above 0, in the range that :func:`tsr_loss` gives; the paper has
            no value for it. Value and gradient are as exact as plain PyTorch's in all of the range.
        eps: guard of the normalisation: ``max(norm, eps)``. 0, the default, is exact: a sample
            whose saliency or anchor is exactly zero has similarity 0 and gradient 0.
        present: bool ``(T, B)``: which task has a label for which sample. The mean over the
            positives is over these tasks. None: over all tasks.
        positions: as for :func:`tsr_loss`. ``a_bt`` is the mean over the sample's existing
            positions, and ``M_bt`` is made from them alone. A sample without any has similarity 0
            to everything, and gradient 0.
        channel_dim: as for :func:`tsr_loss`.
        group: None: the negatives are the other samples of this process. ``"world"``, a
            ``ProcessGroup`` or a 1-D ``DeviceMesh``: the samples of all its ranks. Batches may
            differ in size, and a rank may have one sample. Every rank has to call this, and to
            backpropagate the same multiple of its result. The plain average over the ranks, which
            ``DistributedDataParallel`` takes of gradients, is then value and gradient of the whole
            batch's loss. The forward pass gathers ``T C`` numbers for each sample and reduces two;
            the backward pass sends nothing. See docs/distributed.md.
        memory: what happens to the Gram matrices until the backward: ``R^2`` numbers for each task
            and sample, ``R = min(C, N)``, in the saliencies' dtype. ``"save"`` keeps them.
            ``"recompute"`` makes them again in the backward, a few samples at a time, for at most a
            third more multiply-adds. ``"auto"`` is ``"save"``: they are never larger than the
            saliencies, which the backward needs anyway. Value and gradient are the same. See
            docs/memory.md.
        backend: as for :func:`tsr_loss`.

    Returns:
        Scalar, float32 (float64 for float64 saliencies). Differentiable once; twice with
        ``"reference"``.

    Raises:
        ValueError, TypeError: an argument is not as described. With ``group``, also if one of
            another rank is not, or if they differ. ``"recompute"`` with ``"reference"``.
    """
    options = CsaOptions(temperature, eps, memory)
    _, _, csa = evaluate_losses(
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

    The statistics of both losses come from one read of the saliencies, and one kernel writes both
    gradients.

    Args:
        saliencies: as for :func:`tsr_loss`. The batch needs at least 2 samples.
        lambda_tsr: weight of TSR, at least 0 (the paper: 0.7 to 1.5).
        lambda_csa: weight of CSA, at least 0 (the paper: 0.7 to 1.5).
        over: ``over`` of :func:`tsr_loss`.
        normalizer: ``normalizer`` of :func:`tsr_loss`.
        tsr_temperature: ``temperature`` of :func:`tsr_loss`.
        tsr_floor: ``floor`` of :func:`tsr_loss`.
        csa_temperature: ``temperature`` of :func:`csa_loss`.
        eps: ``eps`` of both losses; 0 is exact.
        present: ``present`` of :func:`csa_loss`.
        positions: ``positions`` of both losses.
        channel_dim: as for :func:`tsr_loss`.
        group: ``group`` of :func:`csa_loss`. TSR is multiplied by the rank's share of the samples
            too; with ``positions`` over tasks, by its share of the existing positions, and either
            all ranks have ``positions`` or none. The mean in ``tsr_floor`` is over this rank's
            saliencies.
        memory: ``memory`` of :func:`csa_loss`. TSR keeps ``T B N`` numbers in any case.
        backend: as for :func:`tsr_loss`.

    Returns:
        :class:`RepMTLLosses`: ``total``, ``tsr``, ``csa``; each may be differentiated.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    total, tsr, csa = evaluate_losses(
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
    return RepMTLLosses(total, tsr, csa)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and return the total, TSR and CSA from the backend.

    A loss whose options are None is left out, and so is the total without ``lambdas``: its tensor
    has no elements.
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
        # A compiled graph depends on them only with a group.
        lambdas if name or not torch.compiler.is_compiling() else None,
    )
    if backend == "reference":
        tsr_value, csa_value = reference.evaluate(config, operands, present, positions)
    else:
        total, tsr_value, csa_value = evaluate(config, operands, present, positions)
        if lambdas is None or config.lambdas is not None:
            return total, tsr_value, csa_value
    total = tsr_value.new_empty(0) if lambdas is None else lambdas.total(tsr_value, csa_value)
    return total, tsr_value, csa_value


def _is_grad_wanted(operands: Sequence[Tensor]) -> bool:
    # Inside a compiler, a function transform hides requires_grad.
    if torch.compiler.is_compiling():
        return True
    # Inside func.grad, vmap hides it.
    return torch.is_grad_enabled() and any(
        s.requires_grad or is_functorch_wrapped(s) for s in operands
    )
