"""The methods: what each does from task losses and representation to gradients."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from benchmarks.peers import nash_mtl
from benchmarks.quality.networks import Network
from repmtl_kernels import RepMTL

# By task; None where a batch has no label for a task at all.
Losses = dict[str, Tensor | None]
Representation = Tensor | dict[str, Tensor]

# Options of RepMTL that may be given as shares of all steps instead.
SHARES = {"start_share": "start", "ramp_share": "ramp"}


class EqualWeighting:
    """The sum of the task losses."""

    def heads_context(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, losses: Losses, z: Representation, network: Network, present) -> None:
        sum(loss for loss in losses.values() if loss is not None).backward()

    def values(self) -> dict[str, Tensor | float]:
        """Of the last step, for the log."""
        return {}

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass


class RepMTLMethod(EqualWeighting):
    """Rep-MTL; the options are those of :class:`repmtl_kernels.RepMTL`."""

    def __init__(self, **options) -> None:
        self.criterion = RepMTL(**options)

    def heads_context(self):
        return self.criterion.second_order()

    def backward(self, losses, z, network, present):
        everywhere = all(bool(there.all()) for there in present.values())
        # Decided on the host, where the labels' whereabouts are known.
        first = next(iter(z.values())) if isinstance(z, dict) else z
        mask = None if everywhere else torch.stack(list(present.values())).to(first.device)
        self.criterion(losses, z, present=mask).backward()

    def values(self):
        last = self.criterion.last
        found = {"tsr": last.tsr, "csa": last.csa, "ratio": last.ratio}
        return {name: value for name, value in found.items() if value is not None}

    def state(self):
        return {"criterion": self.criterion.state_dict()}

    def load_state(self, state):
        self.criterion.load_state_dict(state["criterion"])


class GradientWeighting(EqualWeighting):
    """A method of torchjd: the encoder's gradients of all tasks, weighted by an aggregator."""

    def __init__(self, aggregator) -> None:
        self.aggregator = aggregator
        self.weights: Tensor | None = None
        aggregator.weighting.register_forward_hook(self._keep_weights)

    def _keep_weights(self, module, inputs, weights) -> None:
        self.weights = weights.detach()

    def backward(self, losses, z, network, present):
        if absent := [task for task, loss in losses.items() if loss is None]:
            raise ValueError(
                f"{type(self.aggregator).__name__} needs every task in every batch; a batch has "
                f"no label for {', '.join(absent)}"
            )
        shared = list(network.encoder.parameters())
        rows = []
        for task, loss in losses.items():
            own = list(network.heads[task].parameters())
            gradients = torch.autograd.grad(loss, shared + own, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients[: len(shared)]]))
            for parameter, gradient in zip(own, gradients[len(shared) :], strict=True):
                parameter.grad = gradient
        combined = self.aggregator(torch.stack(rows))
        parts = combined.split([p.numel() for p in shared])
        for parameter, part in zip(shared, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def values(self):
        share = self.weights / self.weights.sum()
        return {f"weight_share_{t}": w for t, w in enumerate(share)}


class NashMTLMethod(GradientWeighting):
    """Nash-MTL, whose weights depend on those of the steps before."""

    KEPT = ("step", "prvs_alpha", "normalization_factor")

    def __init__(self, tasks: int, **options) -> None:
        super().__init__(nash_mtl(tasks, **options))

    def state(self):
        return {name: getattr(self.aggregator.weighting, name) for name in self.KEPT}

    def load_state(self, state):
        weighting = self.aggregator.weighting
        for name, value in state.items():
            setattr(weighting, name, value)
        # It sets its problem up in the first step only.
        weighting._init_optim_problem()


class FairGradMethod(GradientWeighting):
    """FairGrad, with the alpha of its paper's experiments unless another is given."""

    def __init__(self, alpha: float = 2.0, **options) -> None:
        from torchjd.aggregation import FairGrad

        super().__init__(FairGrad(alpha=alpha, **options))


METHODS = {
    "equal": EqualWeighting,
    "nash_mtl": NashMTLMethod,
    "fairgrad": FairGradMethod,
    "rep_mtl": RepMTLMethod,
}


def make(method: str, options: dict, *, tasks: int, steps: int) -> EqualWeighting:
    """The method for one run of so many steps."""
    if method not in METHODS:
        raise ValueError(f"methods.method: expected one of {', '.join(METHODS)}; got {method!r}")
    kept = {k: v for k, v in options.items() if k not in SHARES}
    for share, option in SHARES.items():
        if share in options:
            kept[option] = round(options[share] * steps)
    if "tasks" in inspect.signature(METHODS[method]).parameters:
        kept["tasks"] = tasks
    return METHODS[method](**kept)
