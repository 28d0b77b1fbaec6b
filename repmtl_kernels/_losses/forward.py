"""The forward pass: the stages in order, and what the ranks of a group tell each other between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._distributed import Facts, Peers
from repmtl_kernels._ground.record import Config, Saved
from repmtl_kernels._ground.saliency import (
    DTYPES,
    NORMALIZERS,
    OVER,
    canonical_mask,
    canonical_tasks,
    held,
    without_autocast,
)
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import AllSamples, Entropy
from repmtl_kernels.backends.peaks import joined


def forward(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """``(tsr, csa, *saved)``."""
    stages = choice.load(config.backend)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    with without_autocast(operands[0].device):
        operators = in_one_call(stages, config, saliencies)
        if operators is not None and not config.group:  # between the stages of a group ranks talk
            return tuple(_run_in_one_call(operators, config, saliencies, present, mask))
        tsr, csa, saved = _run_stages(stages, config, operands, saliencies, present, mask)
    return tsr, csa, *(value.contiguous() for value in saved)


def _run_in_one_call(
    operators: ModuleType,
    config: Config,
    saliencies: list[Tensor],
    present: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    return operators.losses(
        saliencies,
        None if present is None else present.contiguous(),
        mask,
        config.tsr,
        config.csa,
        config.over == "tasks",
        config.normalizer == "softmax",
        config.tsr_temperature,
        config.tsr_floor,
        config.csa_temperature,
        config.eps,
        config.with_grad,
    )


def _run_stages(
    stages: ModuleType,
    config: Config,
    operands: Sequence[Tensor],
    saliencies: list[Tensor],
    present: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Saved]:
    peers = _meet(config, saliencies, mask) if config.csa and config.group else None
    statistics = stages.statistics(saliencies, positions=config.tsr, channels=config.csa, mask=mask)
    # One tensor each: operators may not return the same tensor twice.
    tsr, csa, *empty = (operands[0].new_empty(0) for _ in range(2 + len(Saved._fields)))
    saved = Saved(*empty)
    if config.tsr:
        entropy = _entropy(stages, config, statistics.positions, mask)
        tsr = entropy.value
        if config.with_grad:
            saved = saved._replace(position_grad=entropy.grad)
    if config.csa:
        anchors = stages.anchors(statistics.channels, eps=config.eps, with_grad=config.with_grad)
        # They travel while the Gram stage runs.
        arrive = None if peers is None else peers.start(anchors.unit.transpose(0, 1))
        gram = stages.gram(
            saliencies,
            statistics.scale,
            anchors.unit,
            eps=config.eps,
            with_grad=config.with_grad and not config.recompute,
            mask=mask,
        )
        all_samples = None
        if peers is not None:
            join = partial(
                joined, temperature=config.csa_temperature, most=peers.largest, total=peers.summed
            )
            all_samples = AllSamples(arrive().transpose(0, 1), peers.first, join)
            arrive = None  # holds what was received, of unequal batches a second copy
        contrast = stages.contrast(
            anchors,
            temperature=config.csa_temperature,
            with_grad=config.with_grad,
            all_samples=all_samples,
        )
        weight = _positive_weight(gram.similarity, present, config.csa_temperature)
        positive = (weight * gram.similarity).sum()
        csa = contrast.logsumexp.mean() + positive
        if config.with_grad:
            saved = saved._replace(
                scale=statistics.scale,
                anchors=anchors.unit,
                factor=anchors.factor,
                radial=anchors.radial,
                contrast_grad=contrast.grad,
                weight=weight,
                similarity=gram.similarity,
                inverse=gram.inverse,
                slope=gram.slope,
            )
            if not config.recompute:
                saved = saved._replace(projection=gram.projection, matrix=gram.matrix)
    if peers is not None:
        share = _tsr_share(config, peers, mask, saved.position_grad.dtype)
        tsr, csa, saved = _shared(tsr, csa, saved, peers, share)
    return tsr, csa, saved


def _meet(config: Config, saliencies: Sequence[Tensor], mask: Tensor | None) -> Peers:
    batch, channels = saliencies[0].shape[:2]
    facts = Facts(
        batch=batch,
        tasks=len(saliencies),
        channels=channels,
        dtype=DTYPES.index(saliencies[0].dtype),
        with_grad=config.with_grad,
        positions=mask is not None,
        temperature=config.csa_temperature,
        eps=config.eps,
        tsr=config.tsr,
        over=OVER.index(config.over),
        normalizer=NORMALIZERS.index(config.normalizer),
        tsr_temperature=config.tsr_temperature,
        tsr_floor=config.tsr_floor,
        lambda_tsr=config.lambda_tsr,
        lambda_csa=config.lambda_csa,
    )
    return _distributed.meet(config.group, facts, saliencies)


def _tsr_share(
    config: Config, peers: Peers, mask: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """:attr:`Peers.share` of what TSR is a mean over: over tasks, of the positions."""
    if not config.tsr or mask is None or config.over == "space":
        return peers.share
    count = mask.sum()
    total = _distributed.summed(count, config.group).clamp_min(1)
    return len(peers.sizes) * count.to(dtype) / total


def _shared(
    tsr: Tensor, csa: Tensor, saved: Saved, peers: Peers, tsr_share: float | Tensor
) -> tuple[Tensor, Tensor, Saved]:
    """This rank's part: the plain average of the ranks' parts is the mean over all samples."""
    parts = saved._replace(
        position_grad=saved.position_grad * tsr_share,
        weight=saved.weight * peers.share,
        # That of the mean over all samples: this rank's anchors are in every rank's loss.
        contrast_grad=saved.contrast_grad * len(peers.sizes),
    )
    return tsr * tsr_share, csa * peers.share, parts


def _entropy(stages: ModuleType, config: Config, x: Tensor, mask: Tensor | None) -> Entropy:
    """TSR of ``x`` (T, B, N) and its gradient; with a floor, of ``|x| + floor * mean |x|``.

    With a mask, ``x`` is 0 at the positions that are not there, and the gradient there is not that
    of TSR: ``backward`` leaves it out.
    """
    options = {
        "over": config.over,
        "normalizer": config.normalizer,
        "temperature": config.tsr_temperature,
        "eps": held(config.eps, x.dtype),
        "with_grad": config.with_grad,
    }
    floor = config.tsr_floor
    if not floor:
        found = stages.entropy(_without_others(config, x, mask), **options)
    else:
        magnitude = x.abs()
        raised = magnitude + floor * _mean_of_positions(magnitude, mask)
        value, grad = stages.entropy(_without_others(config, raised, mask), **options)
        if grad is not None:
            grad = (grad + floor * _mean_of_positions(grad, mask)) * x.sign()
        found = Entropy(value, grad)
    if mask is None or config.over == "space":
        return found
    # The stage divides by all positions.
    factor = mask.numel() / mask.sum().clamp_min(1).to(x.dtype)
    return Entropy(*(None if part is None else part * factor for part in found))


def _mean_of_positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``values`` (T, B, N) over all tasks and the positions that are there."""
    if mask is None:
        return values.mean()
    count = len(values) * mask.sum().clamp_min(1)
    return values.where(mask, 0).sum() / count


def _without_others(config: Config, x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (T, B, N) whose other positions have no part in a distribution over space, and are
    distributions of entropy 0 over tasks."""
    if mask is None:
        return x
    if config.normalizer == "abs":
        return x.where(mask, 0)
    x = x.masked_fill(~mask, -math.inf)
    # A distribution that is left with nothing gets one element that is all of it.
    if config.over == "tasks":
        x[0].masked_fill_(~mask, 0)
    else:
        x[:, :, 0].masked_fill_(~mask.any(1), 0)
    return x


def _positive_weight(similarity: Tensor, present: Tensor | None, temperature: float) -> Tensor:
    """d csa / d s (T, B): minus the mean over (present) tasks and the batch, over temperature."""
    tasks, batch = similarity.shape
    if present is None:
        return torch.full_like(similarity, -1 / (tasks * batch * temperature))
    share = present.to(similarity.dtype) / present.sum(0).clamp_min(1)
    return share * (-1 / (batch * temperature))


def in_one_call(
    stages: ModuleType, config: Config, saliencies: Sequence[Tensor]
) -> ModuleType | None:
    """The operators that do all stages at once, where the backend has them."""
    find = getattr(stages, "in_one_call", None)
    if find is None or config.recompute:  # they save what the forward has
        return None
    return find(saliencies[0])
