"""The losses as modules: the options are set once, the saliencies are an argument of each call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from repmtl_kernels._distributed import Group, check_group
from repmtl_kernels._losses.arguments import check_channel_dim
from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions
from repmtl_kernels.backends.choice import check_backend
from repmtl_kernels.functional import RepMTLLosses, csa_loss, rep_mtl_loss, tsr_loss


class LossModule(nn.Module):
    """A loss, or a monitor, whose keyword options are its attributes and its ``repr``.

    A class declares its options as attributes with their types, and gives all of them to
    ``super().__init__`` as keywords.
    """

    channel_dim: int
    backend: str

    def __init__(self, **options: object) -> None:
        super().__init__()
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)
        check_channel_dim(self.channel_dim)
        check_backend(self.backend)

    def __deepcopy__(self, memo: dict[int, object]) -> LossModule:
        # Shared with the copy: a ProcessGroup can't be copied, and nobody would update the copy of
        # a gradient scaler.
        for shared in (getattr(self, "group", None), getattr(self, "scaler", None)):
            if shared is not None:
                memo.setdefault(id(shared), shared)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def options(self) -> dict[str, Any]:
        """Return the options by name, with their present values."""
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:
        """Return the options as they are in ``repr``, which adds the modules among them."""
        options = {k: v for k, v in self.options().items() if not isinstance(v, nn.Module)}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args):
        # A checkpoint of the model from before it had this module is complete without its state.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)


class TSRLoss(LossModule):
    """Module form of :func:`repmtl_kernels.tsr_loss`, same options."""

    over: str
    normalizer: str
    temperature: float
    floor: float
    eps: float

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
        TsrOptions(over, normalizer, temperature, floor, eps).check()
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
        """Return TSR of these saliencies; see :func:`repmtl_kernels.tsr_loss`."""
        return tsr_loss(saliencies, positions=positions, **self.options())


class CSALoss(LossModule):
    """Module form of :func:`repmtl_kernels.csa_loss`, same options."""

    temperature: float
    eps: float
    group: Group | None
    memory: str

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
        CsaOptions(temperature, eps, memory).check()
        check_group(group)
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
        """Return CSA of these saliencies; see :func:`repmtl_kernels.csa_loss`."""
        return csa_loss(saliencies, present=present, positions=positions, **self.options())


class RepMTLLoss(LossModule):
    """Module form of :func:`repmtl_kernels.rep_mtl_loss`, same options."""

    lambda_tsr: float
    lambda_csa: float
    over: str
    normalizer: str
    tsr_temperature: float
    tsr_floor: float
    csa_temperature: float
    eps: float
    group: Group | None
    memory: str

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
        Lambdas(lambda_tsr, lambda_csa).check()
        TsrOptions(over, normalizer, tsr_temperature, tsr_floor, eps).check(TsrOptions.prefix)
        CsaOptions(csa_temperature, eps, memory).check(CsaOptions.prefix)
        check_group(group)
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
        """Return both losses and their sum; see :func:`repmtl_kernels.rep_mtl_loss`."""
        return rep_mtl_loss(saliencies, present=present, positions=positions, **self.options())
