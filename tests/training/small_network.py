"""A small network, and the steps of Rep-MTL on it written out."""

from __future__ import annotations

import torch
from cases import DEVICE
from torch import Tensor, nn

from repmtl_kernels import RepMTL, reference
from repmtl_kernels._training.progress import RATIO_DECAY

TASKS, BATCH, CHANNELS, HEIGHT, WIDTH = 3, 4, 5, 3, 2
LAMBDAS = {"lambda_tsr": 0.9, "lambda_csa": 0.7}
PRESENT = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)


class Network(nn.Module):
    """A smooth encoder and heads, so that second derivatives are not zero anywhere."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        if tokens:
            self.encoder = nn.Sequential(nn.Linear(2, CHANNELS), nn.Tanh())
            widths = [nn.Linear(CHANNELS, 4) for _ in range(TASKS)]
            last = [nn.Linear(4, 1) for _ in range(TASKS)]
        else:
            self.encoder = nn.Sequential(nn.Conv2d(2, CHANNELS, 3, padding=1), nn.Tanh())
            widths = [nn.Conv2d(CHANNELS, 4, 3, padding=1) for _ in range(TASKS)]
            last = [nn.Conv2d(4, 1, 1) for _ in range(TASKS)]
        self.heads = nn.ModuleList(
            nn.Sequential(a, nn.Softplus(), b) for a, b in zip(widths, last, strict=True)
        )
        self.double()

    def images(self) -> Tensor:
        shape = (HEIGHT * WIDTH, 2) if self.tokens else (2, HEIGHT, WIDTH)
        return torch.randn(BATCH, *shape, dtype=torch.float64)

    def targets(self) -> list[Tensor]:
        shape = (HEIGHT * WIDTH, 1) if self.tokens else (1, HEIGHT, WIDTH)
        return [torch.randn(BATCH, *shape, dtype=torch.float64) for _ in range(TASKS)]

    def losses(self, z: Tensor | list[Tensor], targets: list[Tensor]) -> list[Tensor]:
        inputs = [z] * TASKS if isinstance(z, Tensor) else z
        return [
            (head(x) - y).square().mean()
            for head, x, y in zip(self.heads, inputs, targets, strict=True)
        ]


def batch(network: Network) -> tuple[Tensor, list[Tensor]]:
    """Return a representation of random images, and the losses of random targets."""
    z = network.encoder(network.images())
    return z, network.losses(z, network.targets())


def literal(
    losses: list[Tensor],
    representations: list[Tensor],
    *,
    lambda_tsr: float,
    lambda_csa: float,
    weights: list[float] | None = None,
    log_losses: bool = False,
    offset: float = 0.0,
    present: Tensor | None = None,
    channel_dim: int = 1,
    over: str = "tasks",
    normalizer: str = "abs",
    tsr_temperature: float = 1.0,
    tsr_floor: float = 0.0,
    csa_temperature: float = 0.5,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total, TSR and CSA from equations 3 to 10, as they are written."""
    objectives = [torch.log(loss + offset) for loss in losses] if log_losses else losses
    saliencies = [
        torch.autograd.grad(objective, z, create_graph=True)[0]
        for objective, z in zip(objectives, representations, strict=True)
    ]
    tsr = reference.tsr_loss(
        saliencies,
        over=over,
        normalizer=normalizer,
        temperature=tsr_temperature,
        floor=tsr_floor,
        eps=eps,
        channel_dim=channel_dim,
    )
    csa = reference.csa_loss(
        saliencies,
        temperature=csa_temperature,
        eps=eps,
        present=present,
        channel_dim=channel_dim,
    )
    weights = [1.0] * len(losses) if weights is None else weights
    total = lambda_tsr * tsr + lambda_csa * csa
    for weight, objective in zip(weights, objectives, strict=True):
        total = total + weight * objective
    return total, tsr, csa


def assert_same_step(network: Network, ours: Tensor, theirs: Tensor) -> None:
    """Assert equal totals, and equal gradients of every parameter of the network."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    parameters = list(network.parameters())
    network.zero_grad()
    ours.backward(retain_graph=True)
    expected = torch.autograd.grad(
        theirs, parameters, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    assert any(g.abs().max() > 1e-3 for g in expected)
    for parameter, want in zip(parameters, expected, strict=True):
        got = torch.zeros_like(want) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def applied(criterion: RepMTL, network: Network, steps: int) -> list[bool]:
    """Train, and return for each step whether the regulariser was applied."""
    was_applied = []
    for _ in range(steps):
        z, losses = batch(network)
        criterion(losses, z)
        was_applied.append(criterion.last.applied)
    return was_applied


def parts(losses, representations, weights=None, lambdas=LAMBDAS, **options):
    """Return the tasks' objective and the regulariser, as two scalars."""
    total, tsr, csa = literal(losses, representations, **lambdas, weights=weights, **options)
    regularizer = lambdas["lambda_tsr"] * tsr + lambdas["lambda_csa"] * csa
    return total - regularizer, regularizer


def ratio_of(tasks: Tensor, regularizer: Tensor, representations: list[Tensor]) -> float:
    """Return the ratio of the two gradients' norms, each gradient taken on its own."""
    sizes = []
    for value in (regularizer, tasks):
        grads = torch.autograd.grad(value, representations, retain_graph=True)
        sizes.append(torch.cat([g.flatten() for g in grads]).norm())
    return (sizes[0] / sizes[1]).item()


def mean_of(observations: list[float], decay: float = RATIO_DECAY) -> float:
    """Return the running mean after these observations."""
    weights = [decay ** (len(observations) - 1 - i) for i in range(len(observations))]
    return sum(w * o for w, o in zip(weights, observations, strict=True)) / sum(weights)


def losses_of(z: Tensor) -> list[Tensor]:
    return [(z**3).mean(), z.sin().mean()]


def step_on_noise(criterion: RepMTL, seed: int = 0, **options) -> Tensor:
    """Do one training step on a random representation, without a network; return the total."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 3, 5, generator=generator).to(DEVICE).requires_grad_()
    total = criterion(losses_of(z), z, **options)
    total.backward()
    return total.detach()


def regularizer_weight(criterion: RepMTL) -> float:
    """Return the factor of the regulariser on the last call, for lambdas that are equal."""
    last = criterion.last
    return (last.regularizer / (0.5 * (last.tsr + last.csa))).item()
