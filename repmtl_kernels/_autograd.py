"""The one differentiable function of the package: stages in order, closed-form gradient.

``evaluate`` is the way in. In eager mode it runs :class:`Losses`, an ``autograd.Function``; under a
compiler it calls the operator ``repmtl::losses`` (``_operators.py``), which shares its forward and
backward.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from repmtl_kernels import _distributed, backends
from repmtl_kernels._distributed import Facts, Peers
from repmtl_kernels._saliency import (
    DTYPES,
    NORMALIZERS,
    OVER,
    canonical_mask,
    canonical_tasks,
    held,
    positions_to_saliency,
    without_autocast,
)
from repmtl_kernels.backends import Anchors, CSAGradient, Entropy, Everyone, Gram
from repmtl_kernels.backends._peaks import joined


class Config(NamedTuple):
    """Everything about one evaluation but the tensors."""

    backend: str  # resolved, not "auto"
    tsr: bool
    csa: bool
    stacked: bool
    channel_dim: int
    over: str
    normalizer: str
    tsr_temperature: float
    tsr_floor: float
    csa_temperature: float
    eps: float
    with_grad: bool
    group: str  # name of the process group whose samples are negatives; empty: this process alone
    recompute: bool  # the Gram matrices in the backward, instead of saving them
    # For the ranks of a group to compare; the losses are multiplied by the caller.
    lambda_tsr: float = 0.0
    lambda_csa: float = 0.0


class Saved(NamedTuple):
    """What the backward needs, contiguous; empty where the loss was not asked for.

    With ``Config.recompute`` projection and matrix are empty too.
    """

    position_grad: Tensor  # (T, B, N): d tsr / d x
    scale: Tensor
    anchors: Tensor
    factor: Tensor
    pull: Tensor
    contrast_grad: Tensor
    weight: Tensor  # (T, B): d csa / d s
    similarity: Tensor
    inverse: Tensor
    slope: Tensor
    projection: Tensor
    matrix: Tensor


# Elements of the Gram matrices that a backward with ``recompute`` has at a time, unless those of
# one sample are more: enough work to fill a GPU.
RECOMPUTE_BLOCK = 1 << 23

NO_SECOND_DERIVATIVE = (
    "repmtl_kernels: a second derivative of tsr_loss, csa_loss or rep_mtl_loss was asked for; the "
    "{backend!r} backend has hand-written first derivatives only. Use backend='reference' "
    "(repmtl_kernels.reference), which supports double backward. If nobody asked for one: inside "
    "torch.compile, inputs of torch.func.grad that require a gradient make the compiler trace it; "
    "detach them, or make the call under torch.no_grad()."
)

NO_FORWARD_MODE = (
    "repmtl_kernels: a forward-mode derivative (torch.func.jvp, jacfwd, hessian) of tsr_loss, "
    "csa_loss or rep_mtl_loss was asked for; the {backend!r} backend has reverse mode only. Use "
    "torch.func.grad, vjp or jacrev, or backend='reference'."
)
NO_BATCHED_GRADIENTS = (
    "repmtl_kernels: torch.autograd.grad(is_grads_batched=True) sends several gradients at a time "
    "to tsr_loss, csa_loss or rep_mtl_loss; the {backend!r} backend takes one. Use torch.func.vmap "
    "over torch.func.vjp, or backend='reference'."
)


def evaluate(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(tsr, csa)`` of checked operands; a loss that ``config`` leaves out is an empty tensor."""
    if torch.compiler.is_compiling():
        # Imported while the compiler traces: it must not be loaded by `import repmtl_kernels`.
        from repmtl_kernels._graph_node import graph_node

        return graph_node(present, positions, tuple(config), *operands)
    # Tensors of a dry run have no values that a backend could look at.
    tsr, csa, *_ = Losses.apply(is_fake(operands[0]), config, present, positions, *operands)
    return tsr, csa


def forward(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """``(tsr, csa, *saved)``."""
    stages = backends.load(config.backend)
    saliencies = canonical_tasks(operands, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    with without_autocast(operands[0].device):
        operators = _in_one_call(stages, config, saliencies)
        if operators is not None and not config.group:  # between the stages of a group ranks talk
            return tuple(_run_in_one_call(operators, config, saliencies, present, mask))
        tsr, csa, saved = _run_stages(stages, config, operands, saliencies, present, mask)
    return tsr, csa, *(value.contiguous() for value in saved)


def _in_one_call(
    stages: ModuleType, config: Config, saliencies: Sequence[Tensor]
) -> ModuleType | None:
    """The operators that do all stages at once, where the backend has them."""
    find = getattr(stages, "in_one_call", None)
    if find is None or config.recompute:  # they save what the forward has
        return None
    return find(saliencies[0])


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
        everyone = None
        if peers is not None:
            join = partial(
                joined, temperature=config.csa_temperature, most=peers.largest, total=peers.summed
            )
            everyone = Everyone(arrive().transpose(0, 1), peers.first, join)
            arrive = None  # holds what was received, of unequal batches a second copy
        contrast = stages.contrast(
            anchors,
            temperature=config.csa_temperature,
            with_grad=config.with_grad,
            everyone=everyone,
        )
        weight = _positive_weight(gram.similarity, present, config.csa_temperature)
        positive = (weight * gram.similarity).sum()
        csa = contrast.logsumexp.mean() + positive
        if config.with_grad:
            saved = saved._replace(
                scale=statistics.scale,
                anchors=anchors.unit,
                factor=anchors.factor,
                pull=anchors.pull,
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


def backward(
    config: Config,
    wanted: Sequence[bool],
    grad_tsr: Tensor | None,
    grad_csa: Tensor | None,
    positions: Tensor | None,
    operands: Sequence[Tensor],
    saved: Saved,
) -> list[Tensor]:
    """The gradients of the wanted operands."""
    stages = backends.load(config.backend)
    tasks = canonical_tasks(operands, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    position_grad = None
    if grad_tsr is not None:
        position_grad = saved.position_grad * (grad_tsr / tasks[0].shape[1])
        if mask is not None:  # NaN elsewhere, or an infinite gradient, must not spread to padding
            position_grad = position_grad.masked_fill_(~mask, 0)
    if grad_csa is None:
        return expanded_grads(config, wanted, position_grad, operands)
    grads = [torch.empty_like(s) if w else None for s, w in zip(operands, wanted, strict=True)]
    outputs = canonical_tasks(grads, config.stacked, config.channel_dim)
    with without_autocast(operands[0].device):
        if (operators := _in_one_call(stages, config, tasks)) is not None:
            _run_backward_in_one_call(
                operators, grad_csa, position_grad, mask, tasks, outputs, saved
            )
            return [g for g in grads if g is not None]
        csa = _csa_gradient(grad_csa, saved)
        if config.recompute:
            _recompute(stages, config, tasks, outputs, csa, position_grad, mask)
        else:
            stages.saliency_grad(tasks, outputs, csa, position_grad, mask=mask)
    return [g for g in grads if g is not None]


def _run_backward_in_one_call(
    operators: ModuleType,
    grad_csa: Tensor,
    position_grad: Tensor | None,
    mask: Tensor | None,
    tasks: list[Tensor],
    outputs: list[Tensor | None],
    saved: Saved,
) -> None:
    numbers = [t for t, output in enumerate(outputs) if output is not None]
    some = [outputs[t] for t in numbers]
    operators.losses_backward(
        grad_csa.resolve_neg(), position_grad, mask, tasks, some, numbers, list(saved)
    )


def _recompute(
    stages: ModuleType,
    config: Config,
    tasks: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    position_grad: Tensor | None,
    mask: Tensor | None,
) -> None:
    """``saliency_grad`` of a few samples at a time, their Gram matrices made again before it.

    Samples, not tasks: both stages treat them one by one, while the gradient of an anchor is a sum
    over the tasks.
    """
    step = samples_at_a_time(tasks[0].shape, len(tasks))
    csa = csa._replace(gram=csa.gram._replace(projection=None, matrix=None))  # empty tensors
    for first in range(0, len(tasks[0]), step):
        some = slice(first, first + step)
        part = csa.of_samples(some)
        saliencies = [s[some] for s in tasks]
        kept = None if mask is None else mask[some]
        gram = stages.gram(
            saliencies, part.scale, part.anchors.unit, eps=config.eps, with_grad=True, mask=kept
        )
        made = part.gram._replace(projection=gram.projection, matrix=gram.matrix)
        stages.saliency_grad(
            saliencies,
            [None if output is None else output[some] for output in outputs],
            part._replace(gram=made),
            None if position_grad is None else position_grad[:, some].contiguous(),
            mask=kept,
        )


def samples_at_a_time(shape: Sequence[int], tasks: int) -> int:
    """Whose Gram matrices the backward makes together; ``shape``: (B, C, *spatial)."""
    side = min(shape[1], math.prod(shape[2:]))
    return max(1, RECOMPUTE_BLOCK // (tasks * side * side))


def _csa_gradient(grad_csa: Tensor, saved: Saved) -> CSAGradient:
    ds = 2 * grad_csa * saved.weight
    rank = ds * saved.inverse
    return CSAGradient(
        scale=saved.scale,
        anchors=Anchors(saved.anchors, saved.factor, saved.pull),
        contrast_grad=saved.contrast_grad,
        gram=Gram(saved.similarity, saved.inverse, saved.slope, saved.projection, saved.matrix),
        rank=rank,
        curl=rank * saved.slope,
        tug=(ds * saved.similarity).sum(0),
        negatives=grad_csa.resolve_neg(),
    )


def expanded_grads(
    config: Config, wanted: Sequence[bool], position_grad: Tensor, operands: Sequence[Tensor]
) -> list[Tensor]:
    """TSR's gradient is constant along the channels: a stride-0 view, no write of size C."""
    per_operand = [position_grad] if config.stacked else position_grad.unbind(0)
    return [
        positions_to_saliency(g.to(s.dtype, copy=True), s, config.channel_dim)
        for g, s, w in zip(per_operand, operands, wanted, strict=True)
        if w
    ]


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple, inputs: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The batching rule of ``vmap``. CSA contrasts the samples of one call, so what is mapped over
    can't be folded into the batch."""
    runs = [
        function.apply(
            *(
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(values) for values in zip(*runs, strict=True))
    return outputs, (0,) * len(outputs)


class Losses(torch.autograd.Function):
    """``(traced, config, present, positions, *operands) -> (tsr, csa, *saved)``; the losses
    differentiable.

    traced: by a compiler, which is to see operators; not in every part of it does PyTorch 2.11
    know that it is compiling.
    """

    @staticmethod
    def forward(
        traced: bool,
        config: Config,
        present: Tensor | None,
        positions: Tensor | None,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        if traced:
            return tuple(torch.ops.repmtl.losses(operands, present, positions, *config))
        return forward(config, operands, present, positions)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(Losses, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_FORWARD_MODE.format(backend=ctx.config.backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        traced, config, _, positions, *operands = inputs
        _, _, *saved = output
        ctx.traced = traced
        ctx.config = config
        ctx.operands = len(operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(positions, *operands, *saved)

    @staticmethod
    def backward(ctx, grad_tsr, grad_csa, *_):
        wanted = tuple(ctx.needs_input_grad[4:])
        if grad_tsr is None and grad_csa is None:
            return None, None, None, None, *(None for _ in wanted)
        batched = torch._C._functorch.is_legacy_batchedtensor
        if any(g is not None and batched(g) for g in (grad_tsr, grad_csa)):
            raise RuntimeError(NO_BATCHED_GRADIENTS.format(backend=ctx.config.backend))
        saved = ctx.saved_tensors
        traced = ctx.traced or torch.compiler.is_compiling()
        given = traced, ctx.config, wanted, ctx.operands, grad_tsr, grad_csa
        found = iter(Gradient.apply(*given, *saved))
        return None, None, None, None, *(next(found) if w else None for w in wanted)


class Gradient(torch.autograd.Function):
    """The backward of :class:`Losses`, a node of its own so that a second derivative is refused."""

    @staticmethod
    def forward(traced, config, wanted, count, grad_tsr, grad_csa, positions, *tensors):
        operands, saved = tensors[:count], Saved(*tensors[count:])
        if traced:
            return tuple(
                torch.ops.repmtl.losses_backward(
                    grad_tsr, grad_csa, positions, operands, saved, wanted, *config
                )
            )
        return tuple(backward(config, wanted, grad_tsr, grad_csa, positions, operands, saved))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(Gradient, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_FORWARD_MODE.format(backend=ctx.backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[1].backend

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(NO_SECOND_DERIVATIVE.format(backend=ctx.backend))


# PyTorch asks for the signature of `forward` at every call; found afresh, it takes longer than most
# kernels.
for _function in (Losses, Gradient):
    _function.forward.__signature__ = inspect.signature(_function.forward)
