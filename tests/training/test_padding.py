"""Positions that a mask leaves out, such as padding."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from small_network import LAMBDAS, losses_of
from torch import Tensor, nn

from repmtl_kernels import RepMTL


def padded_step(width: int, dtype: torch.dtype, **options) -> tuple[Tensor, list[Tensor], RepMTL]:
    """Train on sequences of 8, 5, 6 and 3 tokens; the padding has values that would count."""
    torch.manual_seed(0)
    encoder = nn.Linear(5, 8).to(DEVICE, dtype)
    heads = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(3)
    ).to(DEVICE, dtype)
    x = torch.randn(4, 8, 5).to(DEVICE, dtype)
    positions = torch.arange(width) < torch.tensor([8, 5, 6, 3])[:, None]
    positions = positions.to(DEVICE)
    padding = torch.full((4, width - 8, 5), 3.0, dtype=dtype, device=DEVICE)
    z = encoder(torch.cat([x, padding], 1))
    mask = positions[:, :, None].to(dtype)
    losses = [((head(z) - t).square() * mask).sum() / mask.sum() for t, head in enumerate(heads)]
    criterion = RepMTL(channel_dim=-1, **options)
    total = criterion(losses, z, positions=positions)
    parameters = [*encoder.parameters(), *heads.parameters()]
    return total.detach(), torch.autograd.grad(total, parameters, materialize_grads=True), criterion


@pytest.mark.parametrize(
    "options",
    (
        LAMBDAS,
        {"strength": 0.3, "clip": 2.0},
        {**LAMBDAS, "over": "space", "normalizer": "softmax", "tsr_temperature": 0.01},
        {**LAMBDAS, "tsr_floor": 0.1, "lambda_csa": 0.0},
    ),
    ids=("plain", "strength", "space", "floor"),
)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_wider_padding_changes_nothing(options: dict, dtype: torch.dtype) -> None:
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    total, grads, criterion = padded_step(8, dtype, **options)
    for width in (9, 16, 40):
        other, other_grads, wider = padded_step(width, dtype, **options)
        torch.testing.assert_close(other, total, rtol=rtol, atol=0)
        for name in ("tsr", "csa", "regularizer", "ratio"):
            if (value := getattr(wider.last, name)) is not None:
                expected = getattr(criterion.last, name)
                # The ratio is always float32.
                loose = max(rtol, 1e-6) if name == "ratio" else rtol
                torch.testing.assert_close(value, expected, rtol=10 * loose, atol=0)
        for g, h in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(
                h, g, rtol=1e3 * rtol, atol=1e3 * rtol * g.abs().max().item()
            )


def test_bad_positions() -> None:
    z = torch.randn(4, 3, 5, device=DEVICE, requires_grad=True)
    mask = torch.ones(4, 5, dtype=torch.bool, device=DEVICE)
    for bad, error in (
        (mask.float(), TypeError), (mask[:, :4], ValueError), (mask[None], ValueError),
        ([mask], TypeError), (3, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="positions: expected"):
            RepMTL(**LAMBDAS)(losses_of(z), z, positions=bad)
