"""The forward pass: the stages in their order, with the exchanges of a group's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels import _distributed
from repmtl_kernels._distributed import Fact, Peers
from repmtl_kernels._ground.record import Saved
from repmtl_kernels._ground.saliency import (
    DTYPES,
    canonical_mask,
    canonical_tasks,
    without_autocast,
)
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.entropy import entropy_of_means
from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions, facts
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import AllSamples, Expected, Stages, Statistics
from repmtl_kernels.backends.peaks import joined


def run_forward(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return ``(tsr, csa, *saved)``, tensors without elements for a loss that is left out."""
    stages = choice.load(config.backend)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    with without_autocast(operands[0].device):
        operators = fused_operators(stages, config, saliencies)
        if operators is not None and not config.group:  # a group's ranks talk between the stages
            return tuple(_run_fused(operators, config, saliencies, present, mask))
        if (prepare := getattr(stages, "prepare", None)) is not None:
            prepare(saliencies, mask, _expected(config))
        tsr, csa, saved = run_stages(stages, config, saliencies, present, mask)
    return tsr, csa, *(value.contiguous() for value in saved)


def fused_operators(
    stages: Stages, config: Config, saliencies: Sequence[Tensor]
) -> ModuleType | None:
    """Return the backend's operators that run all stages in one call, or None."""
    find = getattr(stages, "in_one_call", None)
    if find is None or config.recompute:  # these operators save the Gram matrices
        return None
    return find(saliencies[0])


def _run_fused(
    operators: ModuleType,
    config: Config,
    saliencies: list[Tensor],
    present: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    tsr, csa = config.tsr or TsrOptions(), config.csa or CsaOptions()
    return operators.losses(
        saliencies,
        None if present is None else present.contiguous(),
        mask,
        config.tsr is not None,
        config.csa is not None,
        tsr.over == "tasks",
        tsr.normalizer == "softmax",
        tsr.temperature,
        tsr.floor,
        csa.temperature,
        tsr.eps if config.csa is None else csa.eps,
        config.with_grad,
    )


def _expected(config: Config) -> Expected:
    tsr, csa = config.tsr, config.csa
    entropy = None if tsr is None else (tsr.over, tsr.normalizer)
    return Expected(entropy, csa is not None, config.with_grad, config.recompute)


def run_stages(
    stages: Stages,
    config: Config,
    saliencies: list[Tensor],
    present: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Saved]:
    """Return TSR, CSA and what the backward needs, from one stage after the other."""
    peers = None
    if config.csa is not None and config.group:
        facts_of_rank = _facts(config, config.csa, saliencies, mask)
        peers = _distributed.meet_peers(config.group, len(saliencies[0]), facts_of_rank, saliencies)
    statistics = stages.statistics(
        saliencies, positions=config.tsr is not None, channels=config.csa is not None, mask=mask
    )
    # One tensor each: operators may not return the same tensor twice.
    tsr, csa, *empty = (saliencies[0].new_empty(0) for _ in range(2 + len(Saved._fields)))
    saved = Saved(*empty)
    if config.tsr is not None:
        assert statistics.positions is not None
        tsr, grad = entropy_of_means(
            stages, config.tsr, statistics.positions, mask, with_grad=config.with_grad
        )
        if grad is not None:
            saved = saved._replace(position_grad=grad)
    if config.csa is not None:
        csa, saved = _run_csa(
            stages, config, config.csa, saliencies, statistics, present, mask, peers, saved
        )
    if peers is not None:
        share = _tsr_share(config, peers, mask, saved.position_grad.dtype)
        tsr, csa, saved = _part_of_rank(tsr, csa, saved, peers, share)
    return tsr, csa, saved


def _run_csa(
    stages: Stages,
    config: Config,
    options: CsaOptions,
    saliencies: list[Tensor],
    statistics: Statistics,
    present: Tensor | None,
    mask: Tensor | None,
    peers: Peers | None,
    saved: Saved,
) -> tuple[Tensor, Saved]:
    """Return CSA, of the samples of all peers, and ``saved`` with what its backward needs."""
    assert statistics.channels is not None and statistics.scale is not None
    anchors = stages.anchors(statistics.channels, eps=options.eps, with_grad=config.with_grad)
    # The anchors travel while the Gram stage runs.
    receive = None if peers is None else peers.start_gather(anchors.unit.transpose(0, 1))
    gram = stages.gram(
        saliencies,
        statistics.scale,
        anchors.unit,
        eps=options.eps,
        with_grad=config.with_grad and not options.recompute,
        mask=mask,
    )
    all_samples = None
    if peers is not None and receive is not None:
        join = partial(
            joined, temperature=options.temperature, most=peers.largest, total=peers.summed
        )
        all_samples = AllSamples(receive().transpose(0, 1), peers.first, join)
        # It holds what arrived: with unequal batches that is a second copy.
        receive = None
    contrast = stages.contrast(
        anchors,
        temperature=options.temperature,
        with_grad=config.with_grad,
        all_samples=all_samples,
    )
    weight = _positive_weight(gram.similarity, present, options.temperature)
    csa = contrast.logsumexp.mean() + (weight * gram.similarity).sum()
    if anchors.radial is not None and contrast.grad is not None:
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
    if gram.projection is not None and gram.matrix is not None:
        saved = saved._replace(projection=gram.projection, matrix=gram.matrix)
    return csa, saved


def _facts(
    config: Config, csa: CsaOptions, saliencies: list[Tensor], mask: Tensor | None
) -> list[Fact]:
    """Return what must be the same on all ranks. The same places on every rank, without TSR too."""
    same_loss = "the same loss, csa_loss or rep_mtl_loss,"
    # The eps of CSA is that of both losses, and the only one without TSR.
    options = facts(config.tsr or TsrOptions(), config.lambdas or Lambdas())
    options |= facts(csa, prefixed=config.tsr is not None)
    return [
        Fact(len(saliencies), "the same number of tasks T"),
        Fact(saliencies[0].shape[1], "the same number of channels C"),
        Fact(str(saliencies[0].dtype), "saliencies of the same dtype", [str(d) for d in DTYPES]),
        Fact(config.with_grad, "saliencies that require a gradient, or none"),
        Fact(mask is not None, "a mask of positions, or none,"),
        Fact(config.tsr is not None, same_loss),
        *options.values(),
    ]


def _tsr_share(
    config: Config, peers: Peers, mask: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """Return :attr:`Peers.share` for TSR: over tasks, it is a mean over positions."""
    if config.tsr is None or mask is None or config.tsr.over == "space":
        return peers.share
    count = mask.sum()
    total = _distributed.summed(count, config.group).clamp_min(1)
    return len(peers.sizes) * count.to(dtype) / total


def _part_of_rank(
    tsr: Tensor, csa: Tensor, saved: Saved, peers: Peers, tsr_share: float | Tensor
) -> tuple[Tensor, Tensor, Saved]:
    """Return this rank's part: the plain average of the parts is the mean over all samples."""
    saved = saved._replace(
        position_grad=saved.position_grad * tsr_share,
        weight=saved.weight * peers.share,
        # The gradient of the mean over all samples: this rank's anchors are in every rank's loss.
        contrast_grad=saved.contrast_grad * len(peers.sizes),
    )
    return tsr * tsr_share, csa * peers.share, saved


def _positive_weight(similarity: Tensor, present: Tensor | None, temperature: float) -> Tensor:
    """Return d csa / d s (T, B) of the mean over (present) tasks and the batch."""
    tasks, batch = similarity.shape
    if present is None:
        return torch.full_like(similarity, -1 / (tasks * batch * temperature))
    share = present.to(similarity.dtype) / present.sum(0).clamp_min(1)
    return share * (-1 / (batch * temperature))
