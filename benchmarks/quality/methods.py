"""The methods: what each does from a forward pass to gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from benchmarks.peers import Forward, SinglePass, fairgrad, nash_mtl
from benchmarks.phases import Unmarked
from repmtl_kernels import RepMTL

# Options of RepMTL that may be shares of all steps instead.
SHARES = {"start_share": "start", "ramp_share": "ramp"}


class EqualWeighting:
    """The sum of the task losses."""

    ratio: Tensor | None = None  # the regulariser's gradient over the tasks' in the last step

    def heads_context(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, forward: Forward) -> None:
        sum(forward.losses).backward()


class RepMTLMethod(EqualWeighting):
    """Rep-MTL; the options are those of :class:`repmtl_kernels.RepMTL`."""

    def __init__(self, **options) -> None:
        self.criterion = RepMTL(**options)

    def heads_context(self) -> AbstractContextManager:
        return self.criterion.second_order()

    def backward(self, forward: Forward) -> None:
        z = forward.representations
        shared = z[0] if len(z) == 1 else z
        self.criterion(forward.losses, shared, positions=forward.positions).backward()
        self.ratio = self.criterion.last.ratio


class GradientWeighting(EqualWeighting):
    """A method of torchjd: the encoder's gradients of all tasks, weighted by an aggregator."""

    def __init__(self, aggregator) -> None:
        self.form = SinglePass(aggregator)

    def backward(self, forward: Forward) -> None:
        self.form.backward(forward, Unmarked())


# FairGrad has the alpha of its paper's experiments.
METHODS = {
    "equal": lambda tasks: EqualWeighting(),
    "nash_mtl": lambda tasks: GradientWeighting(nash_mtl(tasks)),
    "fairgrad": lambda tasks: GradientWeighting(fairgrad(tasks, alpha=2.0)),
    "rep_mtl": lambda tasks, **options: RepMTLMethod(**options),
}


def make(
    method: str, options: dict, tasks: int, steps: int, channel_dim: int = 1
) -> EqualWeighting:
    """Return the method for one run of so many steps."""
    kept = {k: v for k, v in options.items() if k not in SHARES}
    for share, option in SHARES.items():
        if share in options:
            kept[option] = round(options[share] * steps)
    if method == "rep_mtl":
        kept["channel_dim"] = channel_dim
    return METHODS[method](tasks, **kept)
