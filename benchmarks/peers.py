"""Nash-MTL and FairGrad: as torchjd runs them, and with as few passes as each method allows.

Both weigh the tasks by the Gram matrix of their gradients. torchjd's solvers find the weights in
every form here, so that the forms differ in their passes alone:

- :class:`ByTorchjd`: ``mtl_backward`` and ``jac_to_grad``;
- :class:`SinglePass`: each head once, the encoder once per task; the weighted sum of these
  gradients is the step. The same gradients as torchjd's;
- :class:`AtRepresentation`: the Gram matrix of the gradients at the shared representation, and the
  encoder once, as LibMTL's ``rep_grad=True`` does it for other methods. An approximation.

As in torchjd, heads get the gradients of their own losses, unweighted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.phases import Unmarked


class Forward(NamedTuple):
    """The results of a forward pass that the backward pass needs."""

    encoder: nn.Module
    heads: list[nn.Module]  # of the tasks, in order
    losses: list[Tensor]
    representations: list[Tensor]  # one that all tasks share; multi-input: one per task
    positions: Tensor | None = None  # of texts: where there is no padding

    def of_tasks(self) -> list[Tensor]:
        shared = len(self.representations) == 1
        return self.representations * len(self.losses) if shared else self.representations


def nash_mtl(tasks: int) -> nn.Module:
    """Return torchjd's Nash-MTL in LibMTL's and its own default setting."""
    from torchjd.aggregation import NashMTL

    # Its solver says once that solving Nash-MTL's problem again is no faster. It is measured so.
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not")
    return NashMTL(n_tasks=tasks)


def fairgrad(tasks: int, *, alpha: float = 1.0) -> nn.Module:
    """Return torchjd's FairGrad, with LibMTL's alpha."""
    from torchjd.aggregation import FairGrad

    return FairGrad(alpha=alpha)


class ByTorchjd:
    """``chunk``: how many tasks go through the encoder at once; None is all, by ``vmap``."""

    def __init__(self, aggregator: nn.Module) -> None:
        self.aggregator = aggregator
        self.chunk: int | None = None

    def tune(self, step: Callable[[], object], wait: Callable[[], None]) -> None:
        """Set the faster ``chunk``: which one it is depends on network and device."""
        seconds = {}
        for self.chunk in (None, 1):
            step()
            wait()
            began = time.perf_counter()
            step()
            wait()
            seconds[self.chunk] = time.perf_counter() - began
        self.chunk = min(seconds, key=seconds.get)

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        from torchjd.autojac import jac_to_grad, mtl_backward

        z = forward.representations
        marks.mark_at(z, "heads_backward", times=len(forward.losses))
        mtl_backward(forward.losses, features=z, parallel_chunk_size=self.chunk)
        marks.mark("encoder_backward")
        jac_to_grad(forward.encoder.parameters(), self.aggregator)
        marks.mark("weighting")


class OwnPasses:
    """Passes of this file's own, with the weights of an aggregator of torchjd."""

    def __init__(self, aggregator: nn.Module) -> None:
        self.weighting = aggregator.weighting


class SinglePass(OwnPasses):
    """Each head once and the encoder once for each task: torchjd's gradients."""

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        saliencies = heads_backward(forward)
        marks.mark("heads_backward")
        # With LoRA only the adapters are trained.
        parameters = [p for p in forward.encoder.parameters() if p.requires_grad]
        sizes = [p.numel() for p in parameters]
        jacobian = parameters[0].new_empty(len(saliencies), sum(sizes))
        users = len(saliencies) // len(forward.representations)
        for t, (z, saliency) in enumerate(zip(forward.of_tasks(), saliencies, strict=True)):
            again = users > 1 and t + 1 < len(saliencies)
            rows = torch.autograd.grad(z, parameters, saliency, retain_graph=again)
            torch.cat([row.flatten() for row in rows], out=jacobian[t])
        marks.mark("encoder_backward")
        weights = self.weighting(jacobian)
        for p, gradient in zip(parameters, (weights @ jacobian).split(sizes), strict=True):
            p.grad = gradient.view_as(p)
        marks.mark("weighting")


class AtRepresentation(OwnPasses):
    """For one representation that all tasks share."""

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        (z,) = forward.representations
        saliencies = heads_backward(forward)
        marks.mark("heads_backward")
        # Not in bfloat16, where the solvers' Gram matrix would be rounded.
        jacobian = torch.stack([s.flatten() for s in saliencies]).to(forward.losses[0].dtype)
        weights = self.weighting(jacobian)
        gradient = (weights @ jacobian).view_as(z).to(z.dtype)
        marks.mark("weighting")
        z.backward(gradient)
        marks.mark("encoder_backward")


def heads_backward(forward: Forward) -> list[Tensor]:
    """Pass through each head once: set its gradients, return the one at its representation."""
    saliencies = []
    for head, loss, z in zip(forward.heads, forward.losses, forward.of_tasks(), strict=True):
        parameters = list(head.parameters())
        saliency, *gradients = torch.autograd.grad(loss, [z, *parameters])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        saliencies.append(saliency)
    return saliencies
