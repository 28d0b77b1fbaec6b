"""The methods: what each does from task losses and representation to gradients."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from benchmarks.networks import Model
from benchmarks.peers import Forward, SinglePass, fairgrad, nash_mtl
from benchmarks.phases import Unmarked
from repmtl_kernels import RepMTL

Losses = dict[str, Tensor]  # by task
Representation = Tensor | dict[str, Tensor]  # multi-input: by task
# Options of RepMTL that may be shares of all steps instead.
SHARES = {"start_share": "start", "ramp_share": "ramp"}


class EqualWeighting:
    """The sum of the task losses."""

    def heads_context(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, losses: Losses, z: Representation, network: Model) -> None:
        sum(losses.values()).backward()

    def values(self) -> dict[str, Tensor]:
        """Return values of the last step, for the log."""
        return {}


class RepMTLMethod(EqualWeighting):
    """Rep-MTL; the options are those of :class:`repmtl_kernels.RepMTL`."""

    def __init__(self, **options) -> None:
        self.criterion = RepMTL(**options)

    def heads_context(self) -> AbstractContextManager:
        return self.criterion.second_order()

    def backward(self, losses: Losses, z: Representation, network: Model) -> None:
        self.criterion(losses, z).backward()

    def values(self) -> dict[str, Tensor]:
        ratio = self.criterion.last.ratio
        return {} if ratio is None else {"ratio": ratio}


class GradientWeighting(EqualWeighting):
    """A method of torchjd: the encoder's gradients of all tasks, weighted by an aggregator."""

    def __init__(self, aggregator) -> None:
        self.form = SinglePass(aggregator)

    def backward(self, losses: Losses, z: Representation, network: Model) -> None:
        heads = [network.heads[task] for task in losses]
        representations = list(z.values()) if isinstance(z, dict) else [z]
        forward = Forward(network.encoder, heads, list(losses.values()), representations)
        self.form.backward(forward, Unmarked())


def fairgrad_of_paper(tasks: int, *, alpha: float = 2.0, **options) -> GradientWeighting:
    """Return FairGrad with the alpha of its paper's experiments."""
    return GradientWeighting(fairgrad(tasks, alpha=alpha, **options))


METHODS = {
    "equal": EqualWeighting,
    "nash_mtl": lambda tasks, **options: GradientWeighting(nash_mtl(tasks, **options)),
    "fairgrad": fairgrad_of_paper,
    "rep_mtl": RepMTLMethod,
}


def make(method: str, options: dict, tasks: int, steps: int) -> EqualWeighting:
    """Return the method for one run of so many steps."""
    if method not in METHODS:
        raise ValueError(f"methods.method: expected one of {', '.join(METHODS)}; got {method!r}")
    kept = {k: v for k, v in options.items() if k not in SHARES}
    for share, option in SHARES.items():
        if share in options:
            kept[option] = round(options[share] * steps)
    if "tasks" in inspect.signature(METHODS[method]).parameters:
        kept["tasks"] = tasks
    return METHODS[method](**kept)
