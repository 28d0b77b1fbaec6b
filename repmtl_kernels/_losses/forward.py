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
from repmtl_kernels.backends.contract import AllSamples, Expected, Stages, Statistics, Values
from repmtl_kernels.backends.peaks import joined


def run_forward(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return ``(total, tsr, csa, *saved)``, tensors without elements for what is left out."""
    stages = choice.load(config.backend)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    with without_autocast(operands[0].device):
        operators = fused_operators(stages, config, saliencies)
        if operators is not None and not config.group:  # a group's ranks talk between the stages
            tsr, csa, *saved = _run_fused(operators, config, saliencies, present, mask)
            total = None if config.lambdas is None else config.lambdas.total(tsr, csa)
            results: tuple[Tensor | None, ...] = (total, tsr, csa, *saved)
        else:
            if (prepare := getattr(stages, "prepare", None)) is not None:
                prepare(saliencies, mask, _expected(config, present is not None))
            results = run_stages(stages, config, saliencies, present, mask)
    # One tensor each: operators may not return the same tensor twice.
    return tuple(saliencies[0].new_empty(0) if x is None else x.contiguous() for x in results)


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


def _expected(config: Config, present: bool) -> Expected:
    return Expected(
        entropy=None if config.tsr is None else (config.tsr.over, config.tsr.normalizer),
        csa=config.csa is not None,
        with_grad=config.with_grad,
        recompute=config.recompute,
        present=present,
        total=config.total,
    )


def run_stages(
    stages: Stages,
    config: Config,
    saliencies: list[Tensor],
    present: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the results of :func:`run_forward`, stage by stage; None for what is left out."""
    peers = None
    if config.csa is not None and config.group:
        facts_of_rank = _facts(config, config.csa, saliencies, mask)
        peers = _distributed.meet_peers(config.group, len(saliencies[0]), facts_of_rank, saliencies)
    statistics = stages.statistics(
        saliencies, positions=config.tsr is not None, channels=config.csa is not None, mask=mask
    )
    tsr = position_grad = None
    if config.tsr is not None:
        assert statistics.positions is not None
        tsr, position_grad = entropy_of_means(
            stages, config.tsr, statistics.positions, mask, with_grad=config.with_grad
        )
        if peers is not None:
            share = _tsr_share(config.tsr, config.group, peers, mask, tsr.dtype)
            tsr = tsr * share
            position_grad = None if position_grad is None else position_grad * share
    total = csa = None
    saved: dict[str, Tensor | None] = {}
    if config.csa is not None:
        (csa, _, total), saved = _run_csa(
            stages, config, config.csa, saliencies, statistics, present, mask, peers, tsr
        )
    saved["position_grad"] = position_grad
    return total, tsr, csa, *(saved.get(name) for name in Saved._fields)


def _run_csa(
    stages: Stages,
    config: Config,
    options: CsaOptions,
    saliencies: list[Tensor],
    statistics: Statistics,
    present: Tensor | None,
    mask: Tensor | None,
    peers: Peers | None,
    tsr: Tensor | None,
) -> tuple[Values, dict[str, Tensor | None]]:
    """Return CSA, of the samples of all peers, the total, and what the backward needs of CSA."""
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
    values = stages.values(
        gram.similarity,
        contrast.logsumexp,
        present,
        temperature=options.temperature,
        tsr=tsr,
        lambdas=None if config.lambdas is None else (config.lambdas.tsr, config.lambdas.csa),
    )
    contrast_grad = contrast.grad
    if peers is not None:
        values = _part_of_rank(values, peers.share, tsr, config.lambdas)
        # The gradient of the mean over all samples: this rank's anchors are in every rank's loss.
        contrast_grad = None if contrast_grad is None else contrast_grad * len(peers.sizes)
    if not config.with_grad:
        return values, {}
    return values, {
        "scale": statistics.scale,
        "anchors": anchors.unit,
        "factor": anchors.factor,
        "radial": anchors.radial,
        "contrast_grad": contrast_grad,
        "weight": values.weight,
        "similarity": gram.similarity,
        "inverse": gram.inverse,
        "slope": gram.slope,
        "projection": gram.projection,
        "matrix": gram.matrix,
    }


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
    tsr: TsrOptions, group: str, peers: Peers, mask: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """Return :attr:`Peers.share` for TSR: over tasks, it is a mean over positions."""
    if mask is None or tsr.over == "space":
        return peers.share
    count = mask.sum()
    total = _distributed.summed(count, group).clamp_min(1)
    return len(peers.sizes) * count.to(dtype) / total


def _part_of_rank(
    values: Values, share: float, tsr: Tensor | None, lambdas: Lambdas | None
) -> Values:
    """Return this rank's part: the plain average of the parts is the mean over all samples."""
    csa = values.csa * share
    total = None
    if lambdas is not None and tsr is not None:
        total = lambdas.total(tsr, csa)
    return Values(csa, values.weight * share, total)
