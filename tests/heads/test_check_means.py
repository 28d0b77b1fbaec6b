"""RepMTL.check: heads whose saliencies have no means."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from cases import DEVICE
from faulty_heads import B, D, N
from torch import nn

from repmtl_kernels._heads.preflight import check

# Heads for tokens (B, N, D) and for maps, with and without means of their saliency over channels or
# positions: layers, the shape of one sample, and the warning.
MEANS = {
    "LayerNorm": (lambda: [nn.LayerNorm(D), nn.Linear(D, 3)], (N, D), "channels .*lambda_tsr=0"),
    "pooled LayerNorm": (lambda: [nn.LayerNorm(D), nn.Linear(D, 3)], (D,), "channels .*TSR"),
    "softmax": (lambda: [nn.Softmax(-1)], (N, D), "channels .*TSR"),
    "InstanceNorm": (
        lambda: [nn.Conv2d(D, D, 1), nn.InstanceNorm2d(D), nn.ReLU(), nn.Conv2d(D, 3, 1)],
        (D, 7, 9),
        "positions .*CSA's anchors .*lambda_csa=0",
    ),
    "linear": (lambda: [nn.Linear(D, 3)], (N, D), None),
    "LayerNorm further on": (
        lambda: [nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, 3)],
        (N, D),
        None,
    ),
    "one position": (lambda: [nn.Linear(D, 3)], (D,), None),
    "a large map": (lambda: [nn.Conv2d(D, 3, 1)], (D, 120, 160), None),
    "BatchNorm": (lambda: [nn.BatchNorm2d(D), nn.Conv2d(D, 3, 1)], (D, 7, 9), None),
    "GroupNorm": (lambda: [nn.GroupNorm(1, D), nn.Conv2d(D, 3, 1)], (D, 7, 9), None),
}


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEANS)
def test_means_that_are_nothing_but_rounding(name: str, dtype: torch.dtype, scale: float):
    make, shape, expected = MEANS[name]
    torch.manual_seed(0)
    layers = nn.Sequential(*make()).to(DEVICE, dtype)
    z = (torch.randn(B, *shape, device=DEVICE) + 3).to(dtype)
    heads = {"easy": nn.Flatten(), "hard": lambda z: scale * layers(z)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(heads, z, channel_dim=1 if len(shape) == 3 else -1)
    messages = [str(one.message) for one in caught]
    assert len(messages) == (expected is not None), messages
    if expected is not None:
        assert re.match(rf"heads\['hard'\]: .* over the {expected}", messages[0]), messages
        assert caught[0].filename == __file__
