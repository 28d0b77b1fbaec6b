"""The running mean and the norm that strength and clip use."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import mean_of

from repmtl_kernels._training.norms import norm
from repmtl_kernels._training.progress import RATIO_DECAY
from repmtl_kernels._training.running_mean import RunningMean


def test_running_mean() -> None:
    mean = RunningMean(RATIO_DECAY)
    device = torch.device("cpu")
    assert mean.value(device, 5.0) == 5.0
    observations = [3.0, 1.0, 10.0, 2.0]
    for observation in (*observations[:2], math.nan, math.inf, 0.0, -1.0, *observations[2:]):
        mean.observe(torch.tensor(observation))
    assert mean.value(device, 5.0).item() == pytest.approx(mean_of(observations), rel=1e-6)
    assert mean.value(torch.device("meta"), 5.0).is_meta  # it moves to the device


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm(dtype: torch.dtype, scale: float) -> None:
    x = [(torch.randn(3, 4, 1).expand(3, 4, 5) * scale).to(dtype), torch.zeros(2, dtype=dtype)]
    x += [torch.randn(7, 2).mul(scale).to(dtype).T]
    expected = torch.cat([v.double().flatten() / scale for v in x]).norm().item()
    rel = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    assert norm(x).item() / scale == pytest.approx(expected, rel=rel)
    assert norm([torch.zeros(3)]) == 0
    assert norm([torch.tensor([1.0, math.nan])]).isnan()
