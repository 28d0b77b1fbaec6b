"""Clipping of the regulariser's gradient where it enters the saliencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_kernels._strength import BackwardPass, RunningMean, norm, unexpanded


class Clip:
    """Of one call: limits ``||dR/dS|| ||S||`` to ``limit`` times its running mean ``mean``.

    ``R`` is the regulariser divided by ``factor``, its weight on this call, so that schedules don't
    count. The norms are over the saliencies of all tasks; their product does not depend on the
    scale of the losses. The first observation is never above the limit.
    """

    def __init__(
        self, limit: float, mean: RunningMean, factor: float | Tensor, backward: BackwardPass
    ) -> None:
        self.limit, self.mean, self.factor, self.backward = limit, mean, factor, backward
        self.norm: Tensor | None = None  # ||S||
        self.scale: Tensor | None = None

    def __call__(self, saliencies: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same saliencies, for the regulariser to be computed from."""
        with torch.no_grad():
            self.norm = norm(saliencies)
        return _Identity.apply(self, *saliencies)

    @torch.no_grad()
    def _find_scale(self, grads: Sequence[Tensor]) -> Tensor:
        incoming = self.backward.incoming
        if incoming is None:
            raise RuntimeError(
                "RepMTL(clip=...): expected one gradient of the total at a time, as backward() "
                "sends; got a batch of them (is_grads_batched, vmap) or none. Use clip=None"
            )
        size = (norm(grads) * self.norm / (incoming * self.factor).abs()).float()
        bound = self.limit * self.mean.value(size.device, torch.inf)
        scale = (bound / size).where(size > bound, 1)  # a NaN stays in the gradient
        self.mean.observe(size)
        return scale

    def scaled(self, grads: Sequence[Tensor]) -> list[Tensor]:
        if self.scale is None:  # a second backward pass has the gradient of the first
            self.scale = self._find_scale(grads)
        return [(unexpanded(g) * self.scale).expand_as(g) for g in grads]


class _Identity(torch.autograd.Function):
    """One node for the saliencies of all tasks: none is scaled before all are known."""

    @staticmethod
    def forward(ctx, clip: Clip, *saliencies: Tensor) -> tuple[Tensor, ...]:
        ctx.clip = clip
        return tuple(s.view_as(s) for s in saliencies)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, *ctx.clip.scaled(grads)
