"""``RepMTL.check``: runs heads on a representation and takes both derivatives of each."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from repmtl_kernels._ground import torch_private
from repmtl_kernels._ground.checks import is_dtensor
from repmtl_kernels._ground.saliency import has_values
from repmtl_kernels._heads.preflight.arguments import Head, Heads, named_heads, one_for_each
from repmtl_kernels._heads.preflight.derivatives import Derivatives, weights_of
from repmtl_kernels._heads.preflight.faults import (
    FSDP1,
    SHARDED,
    STATIC_GRAPH,
    Fault,
    SecondDerivativeError,
)
from repmtl_kernels._heads.preflight.graph import depends, ends_of
from repmtl_kernels._heads.preflight.means import without_means
from repmtl_kernels._heads.preflight.modules import (
    Calls,
    left_as_they_were,
    modules_of,
    tensors_in,
    version_of,
)
from repmtl_kernels._training.arguments import Representation, Shared
from repmtl_kernels._training.levels import Levels, levels_of


def check(heads: Heads, z: Representation, *, channel_dim: int = 1) -> None:
    """Raise if a head can't be trained with Rep-MTL.

    Call it before a long run starts::

        RepMTL.check(heads, encoder(x))  # for tokens (B, N, D): channel_dim=-1

    It runs each head, one after the other, on a detached copy of its representation, and takes a
    saliency and its derivative. Call it as the training step calls the heads: in the same mode,
    under the same autocast, attention and cuDNN contexts, on every rank. Parameters, their
    gradients, buffers (running statistics), modes, hooks and the random state of PyTorch are left
    as they are.

    The result holds for a batch like ``z``; another path through a head may differ.

    Args:
        heads: a module or a function of the representation, or a list, tuple, ``ModuleList``, dict
            or ``ModuleDict`` of them. Its result holds tensors in lists, tuples, dicts and
            dataclasses. A loss may be part of it: ``lambda z: cross_entropy(head(z), labels)``.
        z: the shared representation, or :class:`Levels` of several, which each head is called with.
            In multi-input learning a list, tuple or dict with one per head. It needs no graph.
        channel_dim: of ``z``, as for the criterion.

    Warns:
        UserWarning: a saliency's means over the channels (what TSR sees of it) or over the
            positions (CSA's anchor) are zero but for rounding, as where a head begins with a
            LayerNorm or an InstanceNorm.

    Raises:
        SecondDerivativeError: a head has an operation without a second derivative (a compiled
            region, fused attention, a cuDNN RNN, re-entrant checkpointing, SyncBatchNorm, a sharded
            module, a custom ``autograd.Function``), or with a second derivative that is wrong
            without an error (its backward detaches its result; tensors that it detaches on the way
            are not seen); or a head does not depend on ``z``, or writes to it.
        ValueError, TypeError: an argument is not as described.
    """
    named = named_heads(heads)
    representations = one_for_each(z, heads, len(named), channel_dim)
    for (name, head), representation in zip(named.items(), representations, strict=True):
        saliencies = _saliencies_of(name, head, representation)
        for saliency in filter(has_values, saliencies):
            for no_means in without_means(saliency, channel_dim):
                warnings.warn(f"{name}: {no_means}", stacklevel=2)


def _saliencies_of(name: str, head: Head, z: Shared) -> list[Tensor]:
    """Return a saliency of the head at each level that it depends on, or raise."""
    modules = modules_of(head)
    _refuse_wrappers(name, modules.items())
    with left_as_they_were(modules, levels_of(z)):
        result = _fault_or_saliencies(head, z, None)
    if isinstance(result, list):
        return result
    # Again, and now modules are watched: hooks on them could change what a compiler does.
    calls = Calls(modules)
    with left_as_they_were(modules, levels_of(z)), calls.watched():
        watched = _fault_or_saliencies(head, z, calls)
    fault = result if isinstance(watched, list) else watched
    module = fault.module
    if module is None and fault.place is not None:
        module = calls.module_of(fault.place)
    where = f"{name}, module {module}" if module else name
    raise SecondDerivativeError(fault.message(where)) from fault.cause


def _refuse_wrappers(name: str, modules: Iterable[tuple[nn.Module, str]]) -> None:
    """Raise if a wrapper for distributed training is in a head where it can't be."""
    for module, inner in modules:
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            fault = FSDP1
        elif "FSDPModule" in kinds or any(map(is_dtensor, module._parameters.values())):
            fault = SHARDED
        elif "DistributedDataParallel" in kinds and torch_private.ddp_waits_for_static_graph(
            module
        ):
            remedy = f"{STATIC_GRAPH.remedy}; to check the heads alone, pass what it wraps"
            fault = STATIC_GRAPH._replace(remedy=remedy)
        else:
            continue
        where = f"{name}, module {inner!r}" if inner else name
        raise SecondDerivativeError(fault.message(where))


def _fault_or_saliencies(head: Head, z: Shared, calls: Calls | None) -> Fault | list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        # Not leaves, as in training: a head may then write to them, which the version shows.
        levels = [level.detach().clone().requires_grad_().clone() for level in levels_of(z)]
        ends = ends_of(levels)
        if calls is not None:
            calls.begin(levels, ends)
        outputs = list(tensors_in(head(z.like(levels) if isinstance(z, Levels) else levels[0])))
        if version_of(levels):
            return Fault(
                "the representation is written in place",
                "Use the out-of-place form, e.g. ReLU(inplace=False), on the representation",
                module=calls.writes if calls else None,
            )
        outputs = [torch.view_as_real(o) if o.is_complex() else o for o in outputs]
        outputs = [o for o in outputs if o.requires_grad]
        if not depends(outputs, ends):
            return Fault(
                "the result does not depend on the representation: it is not used, or the graph "
                "is cut (.detach(), .data, torch.no_grad(), argmax, .numpy())",
                "Keep the graph from the representation to the result",
                module=calls.cuts if calls else None,
            )
        # A square around each value: never saturated, so no gradient is lost to it.
        squares = [(weights_of(o) * (o - o.detach() + 1) ** 2).sum() for o in outputs]
        probe = functools.reduce(torch.add, (square.to(levels[0].device) for square in squares))
        return Derivatives(probe, levels, ends, own=True).result()
