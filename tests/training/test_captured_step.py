"""A training step that is captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from small_network import LAMBDAS, Network

from benchmarks.rotation import Rotating, graphed
from repmtl_kernels import RepMTL
from repmtl_kernels._training.strength import FIRST


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"strength": 0.2, "clip": 0.9}], ids=("plain", "all"))
def test_no_synchronisation_and_capture(network: Network, options: dict) -> None:
    """A captured step carries the running means from replay to replay."""
    network.float().to(DEVICE)
    images = network.images().float().to(DEVICE)
    targets = [y.float().to(DEVICE) for y in network.targets()]
    batches = [images + 0.3 * i for i in range(6)]

    def step(criterion):
        z = network.encoder(images)
        total = criterion(network.losses(z, targets), z)
        grads = torch.autograd.grad(total, list(network.encoder.parameters()))
        return [criterion.last.ratio, total.detach(), *grads]

    def run(criterion, call):
        results = []
        for new in batches:
            images.copy_(new)
            results.append([value.clone() for value in call(criterion)])
        return results

    eager, captured = RepMTL(**LAMBDAS, **options), RepMTL(**LAMBDAS, **options)
    # The replay is past the calls that measure the ratio. A capture runs one more step before.
    for criterion, steps in ((eager, FIRST + 4), (captured, FIRST + 3)):
        for _ in range(steps):
            step(criterion)
    replay = graphed(Rotating(step, [captured]), torch.device(DEVICE))
    replayed = run(captured, lambda _: replay())
    for values, expected in zip(replayed, run(eager, step), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
