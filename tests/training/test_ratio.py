"""The ratio of the gradients that a call reports, against gradients taken one by one."""

from __future__ import annotations

import pytest
import torch
from cases import settled
from small_network import LAMBDAS, TASKS, Network, batch, parts, ratio_of

from repmtl_kernels import RepMTL, reference, task_saliencies
from repmtl_kernels._training.strength import BETWEEN, FIRST, is_measured


@pytest.mark.parametrize(
    "options, theirs",
    [
        ({}, {}),
        ({"task_weights": [0.5, 2.0, 0.0]}, {"weights": [0.5, 2.0, 0.0]}),
        (
            {"log_losses": True, "task_weights": [3, 1, 1]},
            {"log_losses": True, "weights": [3, 1, 1]},
        ),
        ({"lambda_csa": 0}, {"lambdas": {"lambda_tsr": 0.9, "lambda_csa": 0.0}}),
        ({"every": 3}, {"lambdas": {"lambda_tsr": 2.7, "lambda_csa": 2.1}}),
        ({"ramp": 2}, {"lambdas": {"lambda_tsr": 0.45, "lambda_csa": 0.35}}),
    ],
    ids=("plain", "weights", "log", "tsr", "every", "ramp"),
)
def test_ratio(network: Network, options: dict, theirs: dict) -> None:
    z, losses = batch(network)
    criterion = RepMTL(**{**LAMBDAS, **options})
    criterion(losses, z)
    expected = ratio_of(*parts(losses, [z] * TASKS, **theirs), [z])
    ratio = criterion.last.ratio
    assert ratio.shape == () and ratio.dtype == torch.float32 and not ratio.requires_grad
    assert ratio.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e20])
def test_ratio_at_any_scale_of_the_losses(network: Network, scale: float) -> None:
    """TSR and CSA do not depend on the scale, so only the tasks' gradient changes."""
    network.float()
    images, targets = network.images().float(), [y.float() for y in network.targets()]
    z = network.encoder(images)
    ratios = []
    for factor in (1.0, scale):
        criterion = RepMTL(lambda_tsr=0.9 * factor, lambda_csa=0.7 * factor)
        losses = [factor * loss for loss in network.losses(z, targets)]
        criterion(losses, z)
        ratios.append(criterion.last.ratio.item())
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-3)


def test_ratio_of_several_representations(network: Network) -> None:
    """The norms are over all of them; two tasks share one."""
    z = [network.encoder(network.images()) for _ in range(2)]
    z = [z[0], z[1], z[0]]
    losses = network.losses(z, network.targets())
    criterion = RepMTL(**LAMBDAS)
    total = criterion(losses, z)
    expected = ratio_of(*parts(losses, z), z[:2])
    total.backward()
    assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)


def test_ratio_of_a_representation_that_is_a_leaf(network: Network) -> None:
    z = network.encoder(network.images()).detach().requires_grad_()
    losses = network.losses(z, network.targets())
    z.grad = torch.ones_like(z)  # from an earlier backward pass
    criterion = RepMTL(**LAMBDAS)
    total = criterion(losses, z)
    expected = ratio_of(*parts(losses, [z] * TASKS), [z])
    total.backward()
    assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)


def test_calls_that_measure_the_ratio(network: Network) -> None:
    """The other calls that apply the regulariser report the last measurement."""
    for options in ({}, {"every": 2}, {"start": 3}, {"strength": 0.1}):
        criterion = RepMTL(**LAMBDAS, **options)
        turns, shown = [], None
        for call in range(3 + 2 * (FIRST + BETWEEN)):
            z, losses = batch(network)
            criterion(losses, z)
            since, rest = divmod(call - criterion.start, criterion.every)
            if since < 0 or rest:
                assert criterion.last.ratio is None
                continue
            if criterion.last.ratio is not shown:
                turns.append(since)
            shown = criterion.last.ratio
            assert shown is not None
        assert turns == [n for n in range(since + 1) if is_measured(n)]
        assert turns[:FIRST] == list(range(FIRST))


def test_a_measurement_is_one_pass_through_the_heads(network: Network) -> None:
    passes = []

    def count(call: int, **options) -> int:
        criterion = settled(RepMTL(**LAMBDAS, **options))
        z = network.encoder(network.images())
        outputs = [head(z) for head in network.heads]
        losses = [o.square().mean() for o in outputs]
        criterion._progress.calls = call
        outputs[0].register_hook(passes.append)
        passes.clear()
        criterion(losses, z).backward()
        return len(passes)

    for options in ({}, {"strength": 0.1}):
        assert count(BETWEEN + 1, **options) == 2  # the saliency, and the total
        assert count(2 * BETWEEN, **options) == 3


def test_no_ratio_where_nothing_was_applied(network: Network) -> None:
    for criterion in (RepMTL(0, 0), RepMTL(start=1), RepMTL().eval()):
        z, losses = batch(network)
        criterion(losses, z).backward()
        assert criterion.last.ratio is None and not criterion.last.applied


def test_batched_gradients_and_function_transforms(network: Network) -> None:
    z, losses = batch(network)
    criterion = RepMTL(**LAMBDAS, backend="reference")
    total = criterion(losses, z)
    weight = network.encoder[0].weight
    seeds = torch.tensor([1.0, 2.0], dtype=total.dtype)
    single, doubled = torch.autograd.grad(
        total, weight, seeds, retain_graph=True, is_grads_batched=True
    )[0]
    (expected,) = torch.autograd.grad(total, weight, retain_graph=True)
    torch.testing.assert_close(single, expected)
    torch.testing.assert_close(doubled, 2 * expected)
    targets = network.targets()

    def gradient_of(criterion):
        return torch.func.grad(lambda z: criterion(network.losses(z, targets), z))

    measured = criterion.last.ratio
    gradient = gradient_of(criterion)(z.detach())
    assert criterion.last.ratio is measured and criterion.last.applied
    leaf = z.detach().requires_grad_()
    criterion(network.losses(leaf, targets), leaf).backward()
    torch.testing.assert_close(gradient, leaf.grad)
    for options in ({"strength": 0.1}, {"clip": 2.0}):
        with pytest.raises(ValueError, match="strength and clip .* torch.func"):
            gradient_of(RepMTL(**options))(z.detach())


def test_heads_under_autocast(network: Network) -> None:
    """The ratio is that of the gradients which bfloat16 heads have."""
    network.float()
    z = network.encoder(network.images().float())
    targets = [y.float() for y in network.targets()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = network.losses(z, targets)
    criterion = RepMTL(0.2, 0.2)
    criterion(losses, z)
    saliencies = task_saliencies(losses, z)
    regularizer = 0.2 * (reference.tsr_loss(saliencies) + reference.csa_loss(saliencies))
    (gradient,) = torch.autograd.grad(regularizer, z)
    expected = (gradient.norm() / sum(saliencies).norm()).item()
    assert criterion.last.ratio.item() == pytest.approx(expected, rel=0.02)
    assert expected > 0.1
