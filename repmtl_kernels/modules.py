"""The losses as modules: the options are given once, the saliencies at each call."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repmtl_kernels._distributed import Group
from repmtl_kernels._ground.checks import check_number
from repmtl_kernels._losses.arguments import check_channel_dim, check_csa_options, check_tsr_options
from repmtl_kernels.backends.choice import check_backend
from repmtl_kernels.functional import RepMTLLosses, csa_loss, rep_mtl_loss, tsr_loss


class _Loss(nn.Module):
    """Keeps the keyword options of a loss; they are its attributes and its ``repr``."""

    def __init__(self, **options: object) -> None:
        check_channel_dim(options["channel_dim"])
        check_backend(options["backend"])
        super().__init__()
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __deepcopy__(self, memo: dict) -> _Loss:
        # One for the whole process: a ProcessGroup has no copy, and nobody would update a scaler's.
        for shared in (getattr(self, "group", None), getattr(self, "scaler", None)):
            if shared is not None:
                memo.setdefault(id(shared), shared)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def options(self) -> dict:
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class TSRLoss(_Loss):
    """Module form of :func:`repmtl_kernels.tsr_loss`, same options."""

    def __init__(
        self,
        *,
        over: str = "tasks",
        normalizer: str = "abs",
        temperature: float = 1.0,
        floor: float = 0.0,
        eps: float = 0.0,
        channel_dim: int = 1,
        backend: str = "auto",
    ) -> None:
        check_tsr_options(
            over=over, normalizer=normalizer, temperature=temperature, floor=floor, eps=eps
        )
        super().__init__(
            over=over,
            normalizer=normalizer,
            temperature=temperature,
            floor=floor,
            eps=eps,
            channel_dim=channel_dim,
            backend=backend,
        )

    def forward(
        self, saliencies: Tensor | Sequence[Tensor], positions: Tensor | None = None
    ) -> Tensor:
        return tsr_loss(saliencies, positions=positions, **self.options())


class CSALoss(_Loss):
    """Module form of :func:`repmtl_kernels.csa_loss`, same options."""

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        eps: float = 0.0,
        channel_dim: int = 1,
        group: Group | None = None,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_csa_options(temperature=temperature, eps=eps, group=group, memory=memory)
        super().__init__(
            temperature=temperature,
            eps=eps,
            channel_dim=channel_dim,
            group=group,
            memory=memory,
            backend=backend,
        )

    def forward(
        self,
        saliencies: Tensor | Sequence[Tensor],
        present: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        return csa_loss(saliencies, present=present, positions=positions, **self.options())


class RepMTLLoss(_Loss):
    """Module form of :func:`repmtl_kernels.rep_mtl_loss`, same options."""

    def __init__(
        self,
        *,
        lambda_tsr: float = 0.01,
        lambda_csa: float = 0.01,
        over: str = "tasks",
        normalizer: str = "abs",
        tsr_temperature: float = 1.0,
        tsr_floor: float = 0.0,
        csa_temperature: float = 0.5,
        eps: float = 0.0,
        channel_dim: int = 1,
        group: Group | None = None,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        check_number("lambda_tsr", lambda_tsr, minimum=0, dtype=torch.float64)
        check_number("lambda_csa", lambda_csa, minimum=0, dtype=torch.float64)
        check_tsr_options(
            over=over,
            normalizer=normalizer,
            temperature=tsr_temperature,
            floor=tsr_floor,
            eps=eps,
            prefix="tsr_",
        )
        check_csa_options(
            temperature=csa_temperature, eps=eps, group=group, memory=memory, prefix="csa_"
        )
        super().__init__(
            lambda_tsr=lambda_tsr,
            lambda_csa=lambda_csa,
            over=over,
            normalizer=normalizer,
            tsr_temperature=tsr_temperature,
            tsr_floor=tsr_floor,
            csa_temperature=csa_temperature,
            eps=eps,
            channel_dim=channel_dim,
            group=group,
            memory=memory,
            backend=backend,
        )

    def forward(
        self,
        saliencies: Tensor | Sequence[Tensor],
        present: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> RepMTLLosses:
        return rep_mtl_loss(saliencies, present=present, positions=positions, **self.options())
