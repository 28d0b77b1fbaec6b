"""Small networks in the spirit of the field's: a shared encoder and a head for each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks import networks as full_size
from benchmarks.quality.data import Dataset, stream


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1, dilation: int = 1):
    """Convolution, batch norm, ReLU."""
    padding = dilation * (size // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions beside an identity (a 1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, 3, stride, dilation)
        self.second = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.skip(x))


class Flat(nn.Module):
    """Mean over positions: ``(B, C, H, W)`` to ``(B, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def residual_encoder(
    inputs: int,
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    strides: Sequence[int] = (2, 2, 1),
    dilations: Sequence[int] = (1, 1, 2),
    pool: bool = False,
) -> nn.Sequential:
    """A stem, then a stage of residual blocks for each further width, as a dilated ResNet.

    pool: the representation is the mean over positions, ``(B, C)``.
    """
    if not len(widths) == len(strides) == len(dilations):
        raise ValueError(
            "network: expected as many strides and dilations as widths, got "
            f"{len(strides)}, {len(dilations)} and {len(widths)}"
        )
    layers = [conv_bn(inputs, widths[0], 3, strides[0], dilations[0])]
    for before, width, stride, dilation in zip(
        widths, widths[1:], strides[1:], dilations[1:], strict=False
    ):
        layers.append(Residual(before, width, stride, dilation))
        layers += [Residual(width, width, 1, dilation) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, *([Flat()] if pool else []))


def mlp_encoder(inputs: int, *, widths: Sequence[int] = (256, 128), dropout: float = 0.0):
    """Linear layers with batch norm and ReLU, for features."""
    layers: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling, the head of DeepLabV3+, at the representation's resolution.

    A 1x1 branch, a dilated 3x3 branch for each dilation and an image-pooling branch, projected.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn(inputs, width, 1), *(conv_bn(inputs, width, 3, 1, d) for d in dilations)]
        )
        # No batch norm here: it sees one value per sample and channel.
        self.pooled = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.ReLU())
        self.project = nn.Sequential(
            conv_bn(width * (len(dilations) + 2), width, 1), nn.Conv2d(width, outputs, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        pooled = self.pooled(z.mean((2, 3), keepdim=True)).expand(-1, -1, *z.shape[2:])
        return self.project(torch.cat([*(branch(z) for branch in self.branches), pooled], dim=1))


def classifier(inputs: int, outputs: int, *, width: int, spatial: bool) -> nn.Sequential:
    """A linear layer on ``(B, C)``; on ``(B, C, H, W)`` after a 3x3 convolution, if `width`."""
    if not spatial:
        hidden = [nn.Linear(inputs, width), nn.ReLU()] if width else []
        return nn.Sequential(*hidden, nn.Linear(width or inputs, outputs))
    convolution = [conv_bn(inputs, width)] if width else []
    return nn.Sequential(*convolution, Flat(), nn.Linear(width or inputs, outputs))


def resnet_encoder(inputs: int, *, kind: str = "resnet50", base: int = 64, pool: bool = False):
    """The field's residual networks for images with three channels; base: width of the stem."""
    encoder = full_size.resnet(full_size.ENCODERS[kind], base)
    return nn.Sequential(*encoder, *([Flat()] if pool else []))


ENCODERS = {"residual": residual_encoder, "mlp": mlp_encoder, "resnet": resnet_encoder}


class Network(nn.Module):
    """A shared encoder and heads by task."""

    def __init__(self, encoder: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def head(self, task: str, z: Tensor, size: Sequence[int]) -> Tensor:
        """The task's output, at this size where it is dense."""
        y = self.heads[task](z)
        if y.ndim == 2 or y.shape[2:] == tuple(size):
            return y
        return interpolate(y, tuple(size), mode="bilinear", align_corners=False)


def build(
    dataset: Dataset,
    seed: int,
    *,
    encoder: str = "residual",
    head_width: int = 32,
    head_dilations: Sequence[int] = (1, 2, 3),
    **options,
) -> Network:
    """The network for a data set; the weights of encoder and of each head depend on the seed alone.

    So multi-task and single-task runs of one seed start from the same weights.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"network.encoder: expected one of {', '.join(ENCODERS)}; got {encoder!r}")
    example = dataset.prepared(dataset.splits["train"].of(dataset.names[0])[:2])
    torch.manual_seed(stream(seed, "encoder"))
    shared = ENCODERS[encoder](example.shape[1], **options)
    with torch.no_grad():
        z = shared.eval()(example)
    shared.train()
    heads = {}
    for task in dataset.tasks:
        torch.manual_seed(stream(seed, "head", task.name))
        if task.kind.dense:
            head = ASPP(z.shape[1], task.kind.channels, width=head_width, dilations=head_dilations)
            task.kind.centre(head.project[-1].bias, dataset.splits["train"].targets[task.name])
            heads[task.name] = head
        else:
            heads[task.name] = classifier(
                z.shape[1], task.kind.channels, width=head_width, spatial=z.ndim == 4
            )
    return Network(shared, heads)
