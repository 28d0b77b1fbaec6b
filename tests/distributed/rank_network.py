"""A network with two dense tasks, its batches and its training, for checks on two ranks."""

import torch
from rank_batches import own
from torch import Tensor, nn

from repmtl_kernels import (
    RepMTL,
)


class Network(nn.Module):
    """Two dense tasks. The objective is computed inside or, without a criterion, by the caller."""

    def __init__(self, criterion: RepMTL | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 10, 3, padding=1), nn.Tanh()
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Conv2d(10, 5, 3), nn.Tanh(), nn.Conv2d(5, 1, 1))
                for task in ("depth", "normal")
            }
        )
        self.criterion = [criterion]  # not a submodule: its state is not the network's
        self.double()

    def forward(self, x: Tensor, targets: dict[str, Tensor] | None = None):
        z = self.encoder(x)
        outputs = {task: head(z) for task, head in self.heads.items()}
        if targets is None:
            return z, outputs
        return self.criterion[0](losses_of(outputs, targets), z)


def losses_of(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: (outputs[task] - y).square().mean() for task, y in targets.items()}


STEPS, BATCH = 5, 6


def batches(samples: slice):
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(2, BATCH, 1, 4, 4, generator=generator, dtype=torch.float64)
        yield x[samples], {"depth": y[0, samples], "normal": 3 * y[1, samples]}


def step(network: nn.Module, criterion: RepMTL, x: Tensor, targets: dict[str, Tensor], inside):
    if inside:
        total = network(x, targets)
    else:
        z, outputs = network(x)
        total = criterion(losses_of(outputs, targets), z)
    total.backward()


def train(network, criterion, samples, *, inside=False) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for x, targets in batches(samples):
        optimizer.zero_grad()
        step(network, criterion, x, targets, inside)
        optimizer.step()


LAMBDAS = {"lambda_tsr": 0.5, "lambda_csa": 1.5}


def trained_alone(**options) -> list[Tensor]:
    network = Network()
    train(network, RepMTL(**LAMBDAS, **options), slice(None))
    return [p.detach() for p in network.parameters()]


def assert_same_parameters(actual, expected: list[Tensor]) -> None:
    actual = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in actual]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-9)


def half(rank: int) -> slice:
    return own(rank, (BATCH // 2, BATCH // 2))
