"""The methods: what each does from a forward pass to gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import grad

from benchmarks.peers import Forward, SinglePass, fairgrad, nash_mtl
from benchmarks.phases import Unmarked
from repmtl_kernels import RepMTL, saliency_affinity
from repmtl_kernels._monitor.grouping import mean_cosines
from repmtl_kernels._training.options import logarithm

# Options of a method that may be shares of all steps instead.
SHARES = {
    "start_share": "start", "ramp_share": "ramp", "decay_share": "decay", "until_share": "until",
}  # fmt: skip


class EqualWeighting:
    """The sum of the task losses."""

    ratio: Tensor | None = None  # the regulariser's gradient over the tasks' in the last step
    takes_neck = True  # whether it trains layers between the representation and the heads

    def heads_context(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, forward: Forward) -> None:
        sum(forward.losses).backward()

    def findings(self) -> dict[str, object]:
        """Return what the record of a run has besides its metrics."""
        return {}


class Watched(EqualWeighting):
    """The sum of the task losses, and the cosines of the tasks' saliencies in the first steps.

    every, until: cosines are taken on every so many of the first so many steps; their mean is over
        all samples of these steps that both tasks have a label for.
    """

    def __init__(self, *, every: int, until: int, channel_dim: int) -> None:
        self.every, self.until, self.channel_dim = every, until, channel_dim
        self.calls, self.products = 0, []

    def backward(self, forward: Forward) -> None:
        if self.calls < self.until and self.calls % self.every == 0:
            (z,) = forward.representations
            saliencies = [grad(loss, z, retain_graph=True)[0] for loss in forward.losses]
            self.products.append(saliency_affinity(saliencies, channel_dim=self.channel_dim))
        self.calls += 1
        super().backward(forward)

    def findings(self) -> dict[str, object]:
        return {"cosine": mean_cosines(torch.cat(self.products)).tolist()}


class RepMTLMethod(EqualWeighting):
    """Rep-MTL; the options are those of :class:`repmtl_kernels.RepMTL`, and three more.

    decay: steps until `strength` has fallen to 0, linearly.
    balanced: the saliencies that TSR and CSA see are divided by their task's mean absolute value,
        so that a task with large gradients does not rule TSR.
    encoder_only: the regulariser trains the encoder, and the heads their losses alone.
    """

    def __init__(
        self,
        *,
        decay: int = 0,
        balanced: bool = False,
        encoder_only: bool = False,
        **options,
    ) -> None:
        self.decay, self.balanced, self.encoder_only = decay, balanced, encoder_only
        self.log = options.get("log_losses", False)
        self.log_offset = options.get("log_offset", 0.0)
        if balanced:  # the scale comes after the logarithm
            options = {k: v for k, v in options.items() if not k.startswith("log_")}
        self.criterion = RepMTL(**options)
        self.calls, self.full_strength = 0, self.criterion.strength
        self.takes_neck = not (balanced or encoder_only)

    def heads_context(self) -> AbstractContextManager:
        if self.decay:
            rest = max(0.0, 1 - self.calls / self.decay)
            self.criterion.strength = self.full_strength * rest
        return self.criterion.second_order()

    def backward(self, forward: Forward) -> None:
        self.calls += 1
        z, losses = forward.representations, forward.losses
        if self.balanced:
            losses = self._balanced(self._objectives(losses), forward.of_tasks())
        shared = z[0] if len(z) == 1 else z
        total = self.criterion(losses, shared, positions=forward.positions)
        if self.encoder_only:
            encoder = [p for p in forward.encoder.parameters() if p.requires_grad]
            total.backward(inputs=encoder, retain_graph=True)
            heads = [p for head in forward.heads for p in head.parameters()]
            sum(self._objectives(forward.losses)).backward(inputs=heads)
        else:
            total.backward()
        self.ratio = self.criterion.last.ratio

    def _objectives(self, losses: list[Tensor]) -> list[Tensor]:
        return [logarithm(loss, self.log_offset) for loss in losses] if self.log else losses

    def _balanced(self, losses: list[Tensor], of_tasks: list[Tensor]) -> list[Tensor]:
        """Return losses whose saliencies have a mean absolute value of 1, weighted with the rest.

        Their weighted sum is that of the losses.
        """
        saliencies = [
            grad(loss, z, retain_graph=True)[0] for loss, z in zip(losses, of_tasks, strict=True)
        ]
        sizes = [float(saliency.abs().mean()) for saliency in saliencies]
        self.criterion.task_weights = sizes
        return [loss / size for loss, size in zip(losses, sizes, strict=True)]


class GradientWeighting(EqualWeighting):
    """A method of torchjd: the encoder's gradients of all tasks, weighted by an aggregator."""

    takes_neck = False

    def __init__(self, aggregator) -> None:
        self.form = SinglePass(aggregator)

    def backward(self, forward: Forward) -> None:
        self.form.backward(forward, Unmarked())


# FairGrad has the alpha of its paper's experiments.
METHODS = {
    "equal": lambda tasks: EqualWeighting(),
    "watched": lambda tasks, **options: Watched(**options),
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
    if method in ("rep_mtl", "watched"):
        kept["channel_dim"] = channel_dim
    return METHODS[method](tasks, **kept)
