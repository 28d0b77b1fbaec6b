"""The networks of the multi-task benchmarks, with random images and labels of the right form.

As LibMTL's examples set them up. NYUv2 and Cityscapes: DeepLabV3+, a ResNet-50 dilated to output
stride 8 (2048 channels shared) and for each task an ASPP head with dilations 12, 24 and 36. Office:
ResNet-18, pooled to 512 features, and a linear head for each domain, which has its own images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, l1_loss


@dataclass(frozen=True)
class Network:
    """A network and the size of its batch."""

    name: str
    tasks: Mapping[str, int]  # output channels of each task's head
    batch: int
    height: int
    width: int
    encoder: str = "resnet50"
    base: int = 64  # channels of the first layer; all others follow
    dilations: tuple[int, int, int] = (12, 24, 36)
    head_width: int | None = None  # channels inside an ASPP head; None: an eighth of its input's
    multi_input: bool = False
    on_cpu: Mapping[str, object] = field(default_factory=dict)  # what is smaller there

    def scaled(self, device_type: str) -> Network:
        """This network in the size for ``device_type``."""
        return replace(self, **self.on_cpu) if device_type == "cpu" else self

    def __str__(self) -> str:
        heads = "linear heads, multi-input" if self.multi_input else "ASPP heads"
        if self.head_width is not None:
            heads += f" of {self.head_width} channels"
        of_base = "" if self.base == 64 else f" of {self.base / 64:g} times the width"
        return (
            f"{ENCODERS[self.encoder].title}{of_base}, {len(self.tasks)} {heads}, "
            f"B{self.batch} {self.height}x{self.width}"
        )


# On a CPU the maps of stride 8 are a quarter and half as wide, and so are the dilations.
NETWORKS = (
    Network(
        "nyuv2", {"segmentation": 13, "depth": 1, "normals": 3}, 8, 288, 384,
        on_cpu={"batch": 2, "height": 72, "width": 96, "base": 32, "dilations": (3, 6, 9)},
    ),
    Network(
        "cityscapes", {"segmentation": 7, "depth": 1}, 64, 128, 256,
        on_cpu={"batch": 2, "height": 64, "width": 128, "base": 32, "dilations": (6, 12, 18)},
    ),
    Network(
        "office", dict.fromkeys(("art", "clipart", "product", "real world"), 65), 64, 224, 224,
        encoder="resnet18", multi_input=True, on_cpu={"batch": 4, "height": 64, "width": 64},
    ),
)  # fmt: skip


class Block(nn.Module):
    """A residual block: convolutions and batch norms, ReLU between them and after the sum."""

    def __init__(self, layers: list[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layers(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1):
    """Convolution and batch norm."""
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return [layer, nn.BatchNorm2d(outputs)]


def activated(*arguments: int) -> list[nn.Module]:
    return [*convolution(*arguments), nn.ReLU(inplace=True)]


def basic(inputs: int, width: int, stride: int, dilation: int) -> Block:
    layers = [*activated(inputs, width, 3, stride, dilation), *convolution(width, width, 3)]
    return Block(layers, shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int, dilation: int) -> Block:
    layers = [
        *activated(inputs, width, 1),
        *activated(width, width, 3, stride, dilation),
        *convolution(width, 4 * width, 1),
    ]
    return Block(layers, shortcut(inputs, 4 * width, stride))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(*convolution(inputs, outputs, 1, stride))


class Residual(NamedTuple):
    title: str
    block: type | object  # makes a Block
    expansion: int  # of its channels
    blocks: tuple[int, int, int, int]
    dilations: tuple[int, int, int, int]  # of the 3 x 3 convolutions; 1: the stage has its stride


ENCODERS = {
    "resnet18": Residual("ResNet-18", basic, 1, (2, 2, 2, 2), (1, 1, 1, 1)),
    "resnet50": Residual("ResNet-50 at stride 8", bottleneck, 4, (3, 4, 6, 3), (1, 1, 2, 4)),
}


def resnet(kind: Residual, base: int) -> nn.Sequential:
    """Images ``(B, 3, H, W)`` to ``(B, 8 * base * expansion, H / s, W / s)``, stride s 32 or 8."""
    layers = [*activated(3, base, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    channels = base
    for stage, (count, dilation) in enumerate(zip(kind.blocks, kind.dilations, strict=True)):
        width = base << stage
        for k in range(count):
            # As dilated residual networks have it: a stage's first block keeps the field of view.
            first = k == 0
            stride = 2 if first and stage > 0 and dilation == 1 else 1
            layers.append(
                kind.block(channels, width, stride, max(1, dilation // 2) if first else dilation)
            )
            channels = width * kind.expansion
    return nn.Sequential(*layers)


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling as in DeepLabV3, up to the size of the image."""

    def __init__(self, inputs: int, outputs: int, network: Network) -> None:
        super().__init__()
        width = network.head_width or inputs // 8
        self.branches = nn.ModuleList([nn.Sequential(*head_layer(inputs, width, 1))])
        self.branches.extend(
            nn.Sequential(*head_layer(inputs, width, 3, d)) for d in network.dilations
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *head_layer(inputs, width, 1))
        self.project = nn.Sequential(*head_layer(5 * width, width, 1), nn.Dropout(0.5))
        self.classify = nn.Sequential(*head_layer(width, width, 3), nn.Conv2d(width, outputs, 1))
        self.size = (network.height, network.width)

    def forward(self, z: Tensor) -> Tensor:
        found = [branch(z) for branch in self.branches]
        found.append(interpolate(self.pooled(z), size=z.shape[2:], mode="bilinear"))
        y = self.classify(self.project(torch.cat(found, 1)))
        return interpolate(y, size=self.size, mode="bilinear", align_corners=True)


def head_layer(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class Model(nn.Module):
    """One encoder, and a head for each task by its name."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        kind = ENCODERS[network.encoder]
        channels = 8 * network.base * kind.expansion
        self.encoder = resnet(kind, network.base)
        if network.multi_input:
            # The field's Office encoder ends with a hidden layer.
            self.encoder.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
            self.encoder.extend([nn.Linear(channels, channels), nn.BatchNorm1d(channels)])
            self.encoder.extend([nn.ReLU(), nn.Dropout(0.5)])
        self.heads = nn.ModuleDict(
            {
                task: nn.Linear(channels, outputs)
                if network.multi_input
                else ASPPHead(channels, outputs, network)
                for task, outputs in network.tasks.items()
            }
        )


class Batch(NamedTuple):
    images: list[Tensor]  # one tensor that all tasks share; multi-input: one per task
    labels: dict[str, Tensor]


def random_batch(network: Network, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(0)
    size = (network.batch, 3, network.height, network.width)
    count = len(network.tasks) if network.multi_input else 1
    images = [torch.randn(size, generator=generator, device=device) for _ in range(count)]
    labels = {}
    for task, outputs in network.tasks.items():
        shape = (network.batch, outputs, *size[2:])
        if task in DENSE_REGRESSIONS:
            values = torch.randn(shape, generator=generator, device=device)
            unit = task == "normals"
            labels[task] = nn.functional.normalize(values, dim=1) if unit else values
        else:
            shape = shape[:1] if network.multi_input else (shape[0], *shape[2:])
            labels[task] = torch.randint(outputs, shape, generator=generator, device=device)
    return Batch(images, labels)


def cosine_loss(found: Tensor, unit: Tensor) -> Tensor:
    """One minus the cosine of the angle to the normal, averaged over pixels."""
    return 1 - (found / found.norm(dim=1, keepdim=True) * unit).sum(1).mean()


# All other tasks are classifications, of pixels or of images.
DENSE_REGRESSIONS = {"depth": l1_loss, "normals": cosine_loss}


def task_loss(task: str, found: Tensor, label: Tensor) -> Tensor:
    return DENSE_REGRESSIONS.get(task, cross_entropy)(found, label)
