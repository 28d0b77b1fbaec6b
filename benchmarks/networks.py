"""The networks: those of the multi-task benchmarks, and small ones in the same spirit.

``NETWORKS`` are as LibMTL's examples set them up, with random images and labels of the right form.
NYUv2 and Cityscapes: DeepLabV3+, a ResNet-50 dilated to output stride 8 (2048 channels shared) and
for each task an ASPP head with dilations 12, 24 and 36. Office: ResNet-18, pooled to 512 features,
and a linear head for each domain, which has its own images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, l1_loss

from benchmarks.lite0 import SCALE as LITE0_SCALE
from benchmarks.lite0 import lite0
from benchmarks.minilm import minilm


class Block(nn.Module):
    """A residual block: convolutions and batch norms, ReLU between them and after the sum."""

    def __init__(self, layers: Iterable[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layers(x) + self.shortcut(x))


class Flat(nn.Module):
    """Mean over positions: ``(B, C, H, W)`` to ``(B, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def plain(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


def activated(*arguments: int) -> list[nn.Module]:
    return [*plain(*arguments), nn.ReLU()]


def basic(inputs: int, width: int, stride: int, dilation: int) -> Block:
    layers = activated(inputs, width, 3, stride, dilation) + plain(width, width, 3, 1, dilation)
    return Block(layers, shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int, dilation: int) -> Block:
    layers = activated(inputs, width, 1) + activated(width, width, 3, stride, dilation)
    layers += plain(width, 4 * width, 1)
    return Block(layers, shortcut(inputs, 4 * width, stride))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(*plain(inputs, outputs, 1, stride))


class ResNet(NamedTuple):
    """A residual network; a stage with dilation 1 has its stride."""

    title: str
    block: Callable[..., Block]
    expansion: int  # of a block's channels
    blocks: tuple[int, ...]  # of each stage
    dilations: tuple[int, ...]  # of the 3 x 3 convolutions

    def channels(self, base: int) -> int:
        return (base << (len(self.blocks) - 1)) * self.expansion


RESNETS = {
    "resnet18": ResNet("ResNet-18", basic, 1, (2, 2, 2, 2), (1, 1, 1, 1)),
    "resnet50": ResNet("ResNet-50 at stride 8", bottleneck, 4, (3, 4, 6, 3), (1, 1, 2, 4)),
}


def resnet(kind: str, base: int, *, pool: bool = False) -> nn.Sequential:
    """Return an encoder of images ``(B, 3, H, W)``; ``base``: channels of the first layer."""
    about = RESNETS[kind]
    layers = [*activated(3, base, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    channels = base
    for stage, (count, dilation) in enumerate(zip(about.blocks, about.dilations, strict=True)):
        width = base << stage
        for k in range(count):
            # As dilated residual networks have it: a stage's first block keeps the field of view.
            first = k == 0
            stride = 2 if first and stage > 0 and dilation == 1 else 1
            own = max(1, dilation // 2) if first else dilation
            layers.append(about.block(channels, width, stride, own))
            channels = width * about.expansion
    encoder = nn.Sequential(*layers, *([Flat()] if pool else []))
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return encoder


def residual_encoder(
    inputs: int,
    *,
    widths: Sequence[int] = (16, 32, 64),
    strides: Sequence[int] = (2, 2, 1),
    dilations: Sequence[int] = (1, 1, 2),
) -> nn.Sequential:
    """Return a stem, then a residual block for each further width, as in a dilated ResNet."""
    layers = activated(inputs, widths[0], 3, strides[0], dilations[0])
    sizes = zip(widths[:-1], widths[1:], strides[1:], dilations[1:], strict=True)
    return nn.Sequential(*layers, *(basic(*size) for size in sizes))


def mlp_encoder(
    inputs: int, *, widths: Sequence[int] = (256, 128), dropout: float = 0.0
) -> nn.Sequential:
    """Return linear layers with batch norm and ReLU, for features."""
    layers: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


ENCODERS = {"residual": residual_encoder, "mlp": mlp_encoder, "lite0": lite0, "minilm": minilm}
# Mean and standard deviation of 8-bit images that an encoder expects; others take the data set's.
SCALES = {"lite0": LITE0_SCALE}


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling as in DeepLabV3, at the representation's resolution.

    small: without the last 3 x 3 convolution and dropout, and without batch norm in the image
    pooling, where it would see one value for each sample and channel.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, dilations: Sequence[int], small: bool = False
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(*activated(inputs, width, 1))])
        self.branches.extend(nn.Sequential(*activated(inputs, width, 3, 1, d)) for d in dilations)
        pooled = [nn.Conv2d(inputs, width, 1), nn.ReLU()] if small else activated(inputs, width, 1)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *pooled)
        last = [] if small else [nn.Dropout(0.5), *activated(width, width, 3)]
        joined = activated(width * (len(dilations) + 2), width, 1)
        self.project = nn.Sequential(*joined, *last, nn.Conv2d(width, outputs, 1))

    def forward(self, z: Tensor) -> Tensor:
        pooled = self.pooled(z).expand(-1, -1, *z.shape[2:])
        return self.project(torch.cat([*(branch(z) for branch in self.branches), pooled], dim=1))


def classifier(inputs: int, outputs: int, *, width: int, spatial: bool) -> nn.Sequential:
    """Return a linear layer; of maps after a hidden layer and the mean over positions."""
    if not spatial:
        return nn.Sequential(nn.Linear(inputs, outputs))
    return nn.Sequential(*activated(inputs, width), Flat(), nn.Linear(width, outputs))


def token_classifier(inputs: int, outputs: int, *, width: int) -> nn.Sequential:
    """Return a classifier of tokens ``(B, L, C)``.

    It does not begin with a LayerNorm, after which a saliency's mean over the channels is zero.
    """
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))


class Model(nn.Module):
    """A shared encoder, and a head for each task by its name.

    neck: layers between the encoder's output, the representation, and what all heads get; None is
        none. levels: both are levels of the representation.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: Mapping[str, nn.Module],
        neck: nn.Module | None = None,
        levels: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = nn.Identity() if neck is None else neck
        self.heads = nn.ModuleDict(heads)
        self.levels = levels

    def head(self, task: str, features: Tensor, size: Sequence[int]) -> Tensor:
        """Return the task's output, at this size where it is dense; features: of the neck."""
        y = self.heads[task](features)
        if y.ndim < 4 or y.shape[2:] == tuple(size):
            return y
        return interpolate(y, tuple(size), mode="bilinear", align_corners=False)


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
    dilations: tuple[int, ...] = (12, 24, 36)
    head_width: int | None = None  # channels inside an ASPP head; None: an eighth of its input's
    multi_input: bool = False
    on_cpu: Mapping[str, object] = field(default_factory=dict)  # what is smaller there

    def scaled(self, device_type: str) -> Network:
        return replace(self, **self.on_cpu) if device_type == "cpu" else self

    def __str__(self) -> str:
        heads = "linear heads, multi-input" if self.multi_input else "ASPP heads"
        if self.head_width is not None:
            heads += f" of {self.head_width} channels"
        of_base = "" if self.base == 64 else f" of {self.base / 64:g} times the width"
        return (
            f"{RESNETS[self.encoder].title}{of_base}, {len(self.tasks)} {heads}, "
            f"B{self.batch} {self.height}x{self.width}"
        )

    def model(self) -> Model:
        channels = RESNETS[self.encoder].channels(self.base)
        encoder = resnet(self.encoder, self.base, pool=self.multi_input)
        if self.multi_input:
            # The field's Office encoder ends with a hidden layer.
            encoder.extend([nn.Linear(channels, channels), nn.BatchNorm1d(channels)])
            encoder.extend([nn.ReLU(), nn.Dropout(0.5)])
            heads = {task: nn.Linear(channels, outputs) for task, outputs in self.tasks.items()}
            return Model(encoder, heads)
        size = (self.height, self.width)
        width = self.head_width or channels // 8
        return Model(
            encoder,
            {
                task: nn.Sequential(
                    ASPP(channels, outputs, width, self.dilations),
                    nn.Upsample(size, mode="bilinear", align_corners=True),
                )
                for task, outputs in self.tasks.items()
            },
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


class Batch(NamedTuple):
    """Images and labels of one step."""

    images: list[Tensor]  # one tensor that all tasks share; multi-input: one for each task
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


def cosine_loss(output: Tensor, unit: Tensor) -> Tensor:
    """Return one minus the cosine of the angle to the normal, averaged over pixels."""
    return 1 - (output / output.norm(dim=1, keepdim=True) * unit).sum(1).mean()


# All other tasks are classifications, of pixels or of images.
DENSE_REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "depth": l1_loss,
    "normals": cosine_loss,
}


def task_loss(task: str, output: Tensor, label: Tensor) -> Tensor:
    return DENSE_REGRESSIONS.get(task, cross_entropy)(output, label)
