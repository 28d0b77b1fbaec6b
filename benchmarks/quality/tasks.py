"""The kinds of tasks: loss, metrics of the field, and the value of a missing label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

# Class of a pixel or sample without a label.
UNLABELLED = -1


class Kind:
    """One kind of task.

    valid: which pixels or samples have a label; loss: the mean over these; evaluate: the metrics
    over all batches of outputs and targets.
    """

    lower_is_better: ClassVar[dict[str, bool]]
    dense: ClassVar[bool] = True
    outputs: ClassVar[int | None] = None  # channels of the network's output; None: the classes

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.channels = classes if self.outputs is None else self.outputs

    @torch.no_grad()
    def centre(self, bias: Tensor, targets: Tensor) -> None:
        """Start the output's bias at a value that suits the training targets."""


class Classification(Kind):
    """Targets ``(n,)`` int: accuracy in per cent."""

    lower_is_better: ClassVar = {"accuracy": False}
    dense = False

    def valid(self, targets):
        return targets != UNLABELLED

    def loss(self, output, targets):
        return cross_entropy(output, targets.long(), ignore_index=UNLABELLED)

    def evaluate(self, pairs):
        hits = torch.cat([(y.argmax(-1) == t)[self.valid(t)] for y, t in pairs])
        return {"accuracy": 100 * hits.double().mean().item()}


class Binary(Classification):
    """Targets ``(n,)``, 0 or 1: area under the ROC curve in per cent."""

    outputs = 1
    lower_is_better: ClassVar = {"auc": False}

    def loss(self, output, targets):
        valid = self.valid(targets)
        each = binary_cross_entropy_with_logits(
            output[:, 0], targets.clamp(min=0).to(output.dtype), reduction="none"
        )
        return each.mul(valid).sum() / valid.sum().clamp(min=1)

    def evaluate(self, pairs):
        from sklearn.metrics import roc_auc_score

        scores, labels = (torch.cat([pair[k].flatten() for pair in pairs]).cpu() for k in (0, 1))
        valid = self.valid(labels)
        return {"auc": 100 * float(roc_auc_score(labels[valid], scores[valid]))}


class Tokens(Classification):
    """Targets ``(n, L)`` int for outputs ``(n, L, classes)``: accuracy in per cent."""

    def loss(self, output, targets):
        return super().loss(output.transpose(1, 2), targets)


class Segmentation(Classification):
    """Targets ``(n, H, W)`` int8: mean intersection over union and pixel accuracy, per cent."""

    lower_is_better: ClassVar = {"miou": False, "pixel_accuracy": False}
    dense = True

    def evaluate(self, pairs):
        k = self.classes
        confusion = torch.zeros(k * k, dtype=torch.int64)
        for output, targets in pairs:
            valid = self.valid(targets)
            cells = k * targets[valid].long() + output.argmax(1)[valid]
            confusion += torch.bincount(cells, minlength=k * k).cpu()
        confusion = confusion.view(k, k).double()
        right = confusion.diag()
        union = confusion.sum(0) + confusion.sum(1) - right
        # A class that is nowhere, neither in the labels nor in the output, has no IoU.
        return {
            "miou": 100 * (right / union)[union > 0].mean().item(),
            "pixel_accuracy": 100 * (right.sum() / confusion.sum()).item(),
        }


class Depth(Kind):
    """Targets ``(n, 1, H, W)``, 0 where missing: mean absolute and mean relative error."""

    outputs = 1
    lower_is_better: ClassVar = {"absolute_error": True, "relative_error": True}

    def valid(self, targets):
        return targets != 0

    @torch.no_grad()
    def centre(self, bias, targets):
        bias.fill_(targets[self.valid(targets)].mean())

    def loss(self, output, targets):
        # Unlabelled pixels weigh nothing; indexing with the mask would wait for the device.
        valid = self.valid(targets)
        return (output - targets).abs().mul(valid).sum() / valid.sum().clamp(min=1)

    def evaluate(self, pairs):
        error, target = self._errors(pairs)
        return {
            "absolute_error": error.mean().item(),
            "relative_error": 100 * (error / target).mean().item(),
        }

    def _errors(self, pairs) -> tuple[Tensor, Tensor]:
        valid = [(y[self.valid(t)].double(), t[self.valid(t)].double()) for y, t in pairs]
        target = torch.cat([t for _, t in valid])
        return (torch.cat([y for y, _ in valid]) - target).abs(), target


class Disparity(Depth):
    """As depth, for values with an arbitrary zero, of which a relative error says nothing."""

    lower_is_better: ClassVar = {"absolute_error": True, "rms_error": True}

    def evaluate(self, pairs):
        error, _ = self._errors(pairs)
        return {
            "absolute_error": error.mean().item(),
            "rms_error": error.square().mean().sqrt().item(),
        }


class Normals(Kind):
    """Targets ``(n, 3, H, W)`` unit vectors, zero where missing: angles in degrees."""

    outputs = 3
    WITHIN = (11.25, 22.5, 30.0)
    lower_is_better: ClassVar = {
        "mean_angle": True,
        "median_angle": True,
        **{f"within_{degrees:g}": False for degrees in WITHIN},
    }

    def valid(self, targets):
        return (targets != 0).any(1)

    def loss(self, output, targets):
        valid = self.valid(targets)
        cosine = (normalize(output, dim=1) * targets).sum(1)
        return (1 - cosine).mul(valid).sum() / valid.sum().clamp(min=1)

    def evaluate(self, pairs):
        angles = torch.cat([self._angles(y, t) for y, t in pairs])
        return {
            "mean_angle": angles.mean().item(),
            "median_angle": angles.median().item(),
            **{
                f"within_{degrees:g}": 100 * (angles < degrees).double().mean().item()
                for degrees in self.WITHIN
            },
        }

    def _angles(self, output: Tensor, targets: Tensor) -> Tensor:
        cosine = (normalize(output.double(), dim=1) * targets).sum(1)[self.valid(targets)]
        return torch.rad2deg(cosine.clamp(-1, 1).acos())


KINDS = {
    "classification": Classification,
    "binary": Binary,
    "tokens": Tokens,
    "segmentation": Segmentation,
    "depth": Depth,
    "disparity": Disparity,
    "normals": Normals,
}


@dataclass(frozen=True)
class Task:
    name: str
    kind: Kind

    @classmethod
    def of(cls, name: str, kind: str, classes: int = 0) -> Task:
        return cls(name, KINDS[kind](classes))


# For each metric, whether lower is better: the s of eq. 11.
LOWER_IS_BETTER = {m: low for kind in KINDS.values() for m, low in kind.lower_is_better.items()}
