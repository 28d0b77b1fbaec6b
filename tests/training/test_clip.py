"""RepMTL's clip against gradients that the tests clip themselves."""

from __future__ import annotations

import pytest
import torch
from small_network import LAMBDAS, TASKS, Network, batch, mean_of, parts

from repmtl_kernels import RepMTL, reference, tsr_loss
from repmtl_kernels._training.clip import clipped
from repmtl_kernels._training.norms import unexpanded
from repmtl_kernels._training.progress import SIZE_DECAY
from repmtl_kernels._training.running_mean import RunningMean


@pytest.mark.parametrize(
    "options, theirs",
    [
        ({}, {}),
        ({"lambda_csa": 0}, {"lambdas": {"lambda_tsr": 0.9, "lambda_csa": 0.0}}),
        ({"task_weights": [2, 1, 1]}, {"weights": [2.0, 1.0, 1.0]}),
    ],
    ids=("both", "tsr", "weights"),
)
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_clip_step_by_step(network: Network, options: dict, theirs: dict, scale: float) -> None:
    criterion = RepMTL(**{**LAMBDAS, **options}, clip=0.7)
    lambdas = theirs.get("lambdas", LAMBDAS)
    sizes: list[float] = []
    clipped = 0
    for _ in range(6):
        z, losses = batch(network)
        total = criterion(losses, z)
        saliencies = [torch.autograd.grad(loss, z, create_graph=True)[0] for loss in losses]
        tsr = lambdas["lambda_tsr"] * reference.tsr_loss(saliencies)
        value = tsr + lambdas["lambda_csa"] * reference.csa_loss(saliencies)
        grads = torch.autograd.grad(value, saliencies, retain_graph=True)
        size = (torch.stack(grads).norm() * torch.stack(saliencies).norm()).item()
        size /= sum(lambdas.values())
        factor = min(1.0, 0.7 * mean_of(sizes, SIZE_DECAY) / size) if sizes else 1.0
        clipped += factor < 1
        sizes.append(size)
        tasks, regularizer = parts(losses, [z] * TASKS, **theirs)
        torch.testing.assert_close(total, tasks + regularizer)  # the value is not clipped
        parameters = list(network.parameters())
        want = torch.autograd.grad(
            scale * (tasks + factor * regularizer), parameters, retain_graph=True,
            materialize_grads=True,
        )  # fmt: skip
        for _ in range(2):  # the gradient is the same each time
            got = torch.autograd.grad(
                scale * total, parameters, retain_graph=True, materialize_grads=True
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8 * scale)
    assert 1 <= clipped <= 5


def test_clip_does_not_depend_on_schedules(network: Network) -> None:
    """Neither a weight that grows nor a scaled loss counts as a larger gradient."""
    criterion = RepMTL(**LAMBDAS, clip=1.0 + 1e-5, ramp=3)
    images, targets = network.images(), network.targets()
    for call in range(4):
        z = network.encoder(images)
        losses = [loss * 10**call for loss in network.losses(z, targets)]
        total = criterion(losses, z)
        weight = min(1.0, (call + 1) / 3)
        lambdas = {name: weight * value for name, value in LAMBDAS.items()}
        tasks, regularizer = parts(losses, [z] * TASKS, lambdas=lambdas)
        want = torch.autograd.grad(
            tasks + regularizer, list(network.encoder.parameters()), retain_graph=True
        )
        got = torch.autograd.grad(total, list(network.encoder.parameters()))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert criterion._progress.size.numbers()[1] == pytest.approx(1 - SIZE_DECAY**4)


def test_clip_keeps_expanded_gradients_expanded() -> None:
    limit = RunningMean(SIZE_DECAY)
    limit.observe(torch.tensor(1.0))
    saliencies = [torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2)]
    value, rest = clipped(
        lambda leaves: (tsr_loss(leaves), "rest"),
        saliencies,
        limit=0.5,
        mean=limit,
        factor=0.01,
        scale=None,
    )
    assert rest == "rest"
    clipped_grads = torch.autograd.grad(value, saliencies)
    assert all(g.stride(1) == 0 for g in clipped_grads)
    grads = torch.autograd.grad(tsr_loss(saliencies), saliencies)
    size = torch.stack(grads).norm() * torch.stack(list(saliencies)).norm() / 0.01
    assert size > 0.5
    torch.testing.assert_close(clipped_grads, tuple(g * 0.5 / size for g in grads))
    assert unexpanded(clipped_grads[0]).shape == (2, 1, 3, 4)


def test_clip_of_batched_gradients(network: Network) -> None:
    z, losses = batch(network)
    total = RepMTL(**LAMBDAS, clip=2.0)(losses, z)
    weight = network.encoder[0].weight
    seeds = torch.tensor([1.0, 2.0], dtype=total.dtype)
    batched = torch.autograd.grad(total, weight, seeds, retain_graph=True, is_grads_batched=True)[0]
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(batched, torch.stack([expected, 2 * expected]))


def test_strength_and_clip_together(network: Network) -> None:
    """Strength keeps the ratio of the clipped gradient."""
    criterion = RepMTL(**LAMBDAS, strength=0.2, clip=0.5)
    images, targets = network.images(), network.targets()
    ratios = []
    for _ in range(4):
        z = network.encoder(images)
        criterion(network.losses(z, targets), z).backward()
        ratios.append(criterion.last.ratio.item())
    # From the second call on the gradient is half of the first, so the mean is over 1, 0.5, ...
    assert ratios[0] == pytest.approx(0.2, rel=1e-5)
    for n in (2, 3):
        estimate = mean_of([1.0, *[0.5] * (n - 1)])
        assert ratios[n - 1] == pytest.approx(0.2 * 0.5 / estimate, rel=1e-5)
