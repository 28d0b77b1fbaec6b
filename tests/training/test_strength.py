"""RepMTL's strength against a running mean of the ratio that the tests keep themselves."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from small_network import (
    LAMBDAS,
    TASKS,
    Network,
    batch,
    mean_of,
    parts,
    ratio_of,
    regularizer_weight,
)

from repmtl_kernels import RepMTL
from repmtl_kernels._training.strength import LARGEST_RATIO, SMALLEST_RATIO


def steps_of(network: Network, criterion: RepMTL, count: int, **theirs):
    """Check each step's total, gradient and ratio against a running mean; return the ratios."""
    mix = {name: value / sum(LAMBDAS.values()) for name, value in LAMBDAS.items()}
    observed: list[float] = []
    for call in range(count):
        z, losses = batch(network)
        total = criterion(losses, z)
        if call % criterion.every:
            assert torch.equal(total, sum(losses)) and criterion.last.ratio is None
            continue
        unit = ratio_of(*parts(losses, [z] * TASKS, lambdas=mix, **theirs), [z])
        observed.append(unit)
        estimate = mean_of(observed)
        factor = criterion.strength * criterion.every / max(estimate, SMALLEST_RATIO)
        tasks, regularizer = parts(losses, [z] * TASKS, lambdas=mix, **theirs)
        expected = tasks + factor * regularizer
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        parameters = list(network.parameters())
        want = torch.autograd.grad(expected, parameters, retain_graph=True, materialize_grads=True)
        got = torch.autograd.grad(total, parameters, materialize_grads=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
        assert criterion.last.ratio.item() == pytest.approx(factor * unit, rel=1e-5)
    return observed


@pytest.mark.parametrize(
    "options, theirs",
    [({}, {}), ({"every": 2}, {}), ({"log_losses": True}, {"log_losses": True})],
    ids=("plain", "every", "log"),
)
def test_strength_step_by_step(network: Network, options: dict, theirs: dict) -> None:
    observed = steps_of(network, RepMTL(**LAMBDAS, strength=0.3, **options), 6, **theirs)
    assert max(observed) > 1.01 * min(observed)


def test_strength_is_exact_where_nothing_changes(network: Network) -> None:
    criterion = RepMTL(strength=0.3, lambda_tsr=0.0)
    images, targets = network.images(), network.targets()
    ratios = []
    for _ in range(3):
        z = network.encoder(images)
        criterion(network.losses(z, targets), z).backward()
        ratios.append(criterion.last.ratio.item())
    assert ratios == pytest.approx([0.3, 0.3, 0.3], rel=1e-6)


def test_strength_takes_only_the_mix_from_the_lambdas(network: Network) -> None:
    images, targets = network.images(), network.targets()
    results = []
    for scale in (1.0, 1e-4):
        criterion = RepMTL(0.9 * scale, 0.7 * scale, strength=0.2)
        for _ in range(2):
            criterion.lambda_tsr *= 3
            criterion.lambda_csa *= 3
            z = network.encoder(images)
            total = criterion(network.losses(z, targets), z)
            total.backward()
            results.append((total.item(), criterion.last.ratio.item()))
    assert results[0] == pytest.approx(results[2], rel=1e-6)
    assert results[1] == pytest.approx(results[3], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "strength", "lambdas", "every"),
    [
        ({}, 0.03, (0.01, 0.01), 4),
        ({"lambda_tsr": 0.9}, None, (0.9, 0.01), 1),
        ({"lambda_csa": 0.0}, None, (0.01, 0.0), 1),
        ({"strength": 0.3}, 0.3, (0.01, 0.01), 4),
        ({"strength": 0.0}, 0.0, (0.01, 0.01), 4),
        ({"strength": 0.3, "every": 2}, 0.3, (0.01, 0.01), 2),
        ({"every": 1}, 0.03, (0.01, 0.01), 1),
        ({"log_losses": True}, 0.03, (0.01, 0.01), 4),
        ({"lambda_tsr": 0.9, "strength": 0.3}, 0.3, (0.9, 0.01), 1),
    ],
)
def test_defaults_of_options_left_out(network: Network, options, strength, lambdas, every) -> None:
    left_out = RepMTL(**options)
    assert (left_out.strength, left_out.every) == (strength, every)
    assert (left_out.lambda_tsr, left_out.lambda_csa) == lambdas
    log_losses = left_out.log_losses
    written_out = RepMTL(*lambdas, strength=strength, every=every, log_losses=log_losses)
    for _ in range(5):
        z, losses = batch(network)
        totals = [criterion(losses, z) for criterion in (left_out, written_out)]
        assert torch.equal(*totals)
        for total in totals:
            total.backward(retain_graph=True)


def test_strength_of_zero_and_zero_lambdas_are_off(network: Network) -> None:
    z, losses = batch(network)
    for criterion in (RepMTL(strength=0.0), RepMTL(0, 0, strength=0.5)):
        assert torch.equal(criterion(losses, z), sum(losses))
        assert not criterion.last.applied


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_observations_leave_the_estimate(network: Network, poison: float) -> None:
    criterion = RepMTL(**LAMBDAS, strength=0.3)
    z, losses = batch(network)
    criterion(losses, z).backward()
    before = criterion.get_extra_state()
    network.zero_grad()
    z, losses = batch(network)
    criterion([poison * loss for loss in losses], z).backward()
    after = criterion.get_extra_state()
    assert torch.equal(after[1:], before[1:]) and before[1] > 0
    assert not criterion.last.ratio.isfinite()
    assert not network.encoder[0].weight.grad.isfinite().any()  # the NaN is not hidden
    network.zero_grad()
    z, losses = batch(network)
    criterion(losses, z).backward()
    assert criterion.last.ratio.isfinite() and network.encoder[0].weight.grad.isfinite().all()


def test_a_weight_that_falls_is_reported_once(network: Network) -> None:
    """The gradient of tasks vanishes as they are learned, and the regulariser's does not."""
    criterion = RepMTL(strength=0.1, every=1)
    reports = []
    for size in (1.0, 1e-5, 1e-5):
        for _ in range(2):
            z, losses = batch(network)
            losses = [size * loss + (1 - size) * loss.detach() for loss in losses]
            if size < 1:  # the direction of one task is left
                losses[1:] = [loss - losses[0] * (1 - 1e-6) for loss in losses[1:]]
                losses = [loss - sum(losses) / TASKS * (1 - 1e-7) for loss in losses]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                criterion(losses, z).backward()
            reports += [w for w in caught if "strength" in str(w.message)]
            if not reports:
                assert regularizer_weight(criterion) > 0.1 / LARGEST_RATIO
    (warning,) = reports
    assert str(warning.message).startswith("strength: the lambdas have fallen below")
    assert warning.filename == __file__


def test_nan_in_a_loss_is_not_hidden_by_strength(network: Network) -> None:
    criterion = RepMTL(**LAMBDAS, strength=0.3, clip=2.0)
    z, losses = batch(network)
    criterion(losses, z).backward()
    before = criterion.get_extra_state()[1:]
    network.zero_grad()
    z, losses = batch(network)
    losses[1] = losses[1] * math.nan
    total = criterion(losses, z)
    total.backward()
    assert total.isnan() and network.encoder[0].weight.grad.isnan().any()
    assert torch.equal(criterion.get_extra_state()[1:], before)


def test_strength_is_bounded_where_the_regulariser_has_no_gradient(network: Network) -> None:
    """Heads are linear in z: saliencies do not depend on it, and no weight gives the ratio."""
    weights = torch.randn(2, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    criterion = RepMTL(0.5, 0.5, strength=0.1)
    z = network.encoder(network.images())
    criterion([(w * z).mean() for w in weights], z).backward()
    last = criterion.last
    # A ratio of zero is no observation, so the mean has its default.
    expected = 0.1 * (0.5 * last.tsr + 0.5 * last.csa)
    torch.testing.assert_close(last.regularizer, expected, rtol=1e-6, atol=0)
    assert last.ratio == 0
    criterion._progress.ratio.load([1e-9, 1e-3])
    criterion([(w * z).mean() for w in weights], z)
    expected = 0.1 / SMALLEST_RATIO * (0.5 * last.tsr + 0.5 * last.csa)
    torch.testing.assert_close(criterion.last.regularizer, expected, rtol=1e-6, atol=0)
