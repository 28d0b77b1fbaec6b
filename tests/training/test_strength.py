"""RepMTL's strength, gradient ratio and clipping against gradients taken one by one."""

from __future__ import annotations

import gc
import math
import warnings

import pytest
import torch
from cases import DEVICE, settled
from test_criterion import TASKS, Network, literal
from torch import Tensor, nn

from benchmarks.rotation import Rotating, graphed
from repmtl_kernels import RepMTL, reference, second_order, task_saliencies, tsr_loss
from repmtl_kernels._training.clip import clipped
from repmtl_kernels._training.norms import norm, unexpanded
from repmtl_kernels._training.progress import RATIO_DECAY, SIZE_DECAY
from repmtl_kernels._training.running_mean import RunningMean
from repmtl_kernels._training.strength import (
    BETWEEN,
    FIRST,
    LARGEST_RATIO,
    SMALLEST_RATIO,
    is_measured,
)

LAMBDAS = {"lambda_tsr": 0.9, "lambda_csa": 0.7}


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch(network: Network) -> tuple[Tensor, list[Tensor]]:
    z = network.encoder(network.images())
    return z, network.losses(z, network.targets())


def parts(losses, representations, weights=None, lambdas=LAMBDAS, **options):
    """The tasks' objective and the regulariser, as two scalars."""
    total, tsr, csa = literal(losses, representations, **lambdas, weights=weights, **options)
    regularizer = lambdas["lambda_tsr"] * tsr + lambdas["lambda_csa"] * csa
    return total - regularizer, regularizer


def ratio_of(tasks: Tensor, regularizer: Tensor, representations: list[Tensor]) -> float:
    """Of two gradients that are each taken on their own."""
    sizes = []
    for value in (regularizer, tasks):
        grads = torch.autograd.grad(value, representations, retain_graph=True)
        sizes.append(torch.cat([g.flatten() for g in grads]).norm())
    return (sizes[0] / sizes[1]).item()


def mean_of(observations: list[float], decay: float = RATIO_DECAY) -> float:
    weights = [decay ** (len(observations) - 1 - i) for i in range(len(observations))]
    return sum(w * o for w, o in zip(weights, observations, strict=True)) / sum(weights)


# --- the ratio ---


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
    """Both losses are scale-free, so the tasks' gradient alone changes."""
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
    """Norms over all of them; two tasks share one."""
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
    z.grad = torch.ones_like(z)  # of an earlier backward
    criterion = RepMTL(**LAMBDAS)
    total = criterion(losses, z)
    expected = ratio_of(*parts(losses, [z] * TASKS), [z])
    total.backward()
    assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)


def test_measurements_are_some_of_the_calls_that_apply(network: Network) -> None:
    """The others show the last one."""
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

    def of(criterion):
        return torch.func.grad(lambda z: criterion(network.losses(z, targets), z))

    measured = criterion.last.ratio
    found = of(criterion)(z.detach())
    assert criterion.last.ratio is measured and criterion.last.applied
    leaf = z.detach().requires_grad_()
    criterion(network.losses(leaf, targets), leaf).backward()
    torch.testing.assert_close(found, leaf.grad)
    for options in ({"strength": 0.1}, {"clip": 2.0}):
        with pytest.raises(ValueError, match="strength and clip .* torch.func"):
            of(RepMTL(**options))(z.detach())


def test_heads_under_autocast(network: Network) -> None:
    """The ratio of bfloat16 heads is that of float32 ones, within bfloat16's noise."""
    network.float()
    images, targets = network.images().float(), [y.float() for y in network.targets()]
    ratios = []
    for enabled in (False, True):
        z = network.encoder(images)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = network.losses(z, targets)
        criterion = RepMTL(0.2, 0.2)
        criterion(losses, z)
        ratios.append(criterion.last.ratio.item())
    assert ratios[1] == pytest.approx(ratios[0], rel=0.1)
    assert ratios[0] > 0.1


# --- memory ---


def tensors_of(shape: torch.Size) -> int:
    tensors = (o for o in gc.get_objects() if type(o) is Tensor and not o.is_nested)
    return sum(tensor.shape == shape for tensor in tensors)


@pytest.mark.parametrize("backward", [None, "backward", "heads only", "create_graph"])
@pytest.mark.parametrize("options", [{}, {"clip": 2.0, "strength": 0.1}], ids=("plain", "all"))
def test_nothing_is_kept_alive(network: Network, backward, options: dict) -> None:
    """Without the cyclic collector: nothing refers to itself through the graph."""
    criterion = RepMTL(**LAMBDAS, **options)
    gc.collect()
    gc.disable()
    try:
        z, losses = batch(network)
        shape = z.shape
        before = tensors_of(shape)
        total = criterion(losses, z)
        if backward == "backward":
            total.backward()
            assert tensors_of(shape) == before  # with z and its hooks alive
        elif backward == "heads only":
            torch.autograd.grad(total, list(network.heads.parameters()))
        elif backward:
            torch.autograd.grad(total.square(), network.encoder[0].weight, create_graph=True)
        del z, losses, total
        assert tensors_of(shape) == 0
    finally:
        gc.enable()


def graph_ends_on_leaf(network: Network, criterion: RepMTL, z: Tensor, how: str) -> None:
    total = criterion(network.losses(z, network.targets()), z)
    if how == "heads only":
        torch.autograd.grad(total, list(network.heads.parameters()))
    elif how == "backward":
        total.backward()
    elif how == "of a part":  # the variable dies before the graph does
        total = total / 2
        total.backward()


@pytest.mark.parametrize("how", ["heads only", "never", "backward", "of a part"])
def test_no_hook_stays_on_a_representation_that_outlives_its_totals(network, how: str) -> None:
    """Features that are cached; no backward pass may ever reach them."""
    z = network.encoder(network.images()).detach().requires_grad_()
    criterion = RepMTL(**LAMBDAS, clip=2.0, strength=0.1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            graph_ends_on_leaf(network, criterion, z, how)
            z.grad = None
            assert not z._backward_hooks
            assert tensors_of(z.shape) == 1
    finally:
        gc.enable()


def dropped(criterion: RepMTL, encoder: nn.Module, heads: nn.ModuleList, x: Tensor) -> Tensor:
    """The heads' fused ReLU goes around ``z`` where nobody has it."""
    with second_order():
        z = encoder(x)
        losses = [head(z).square().mean() for head in heads]
    return criterion(losses, z)


@pytest.mark.parametrize("all_heads", [True, False])
def test_ratio_where_only_the_total_is_left(all_heads: bool) -> None:
    """The representation is a batch norm's output, whose ReLU in the heads is fused with it."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)).double()
    heads = nn.ModuleList(
        nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Softplus(), nn.Conv2d(4, 2, 1))
        for _ in range(2)
    ).double()
    if not all_heads:
        heads[1] = heads[1][1:]  # its gradient comes by in any case
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    parameters = [*encoder.parameters(), *heads.parameters()]
    z = encoder(x)
    losses = [head(z).square().mean() for head in heads]
    tasks, regularizer = parts(losses, [z] * 2)
    expected = ratio_of(tasks, regularizer, [z])
    want = torch.autograd.grad(tasks + regularizer, parameters)
    criterion = RepMTL(**LAMBDAS)
    gc.collect()
    gc.disable()
    try:
        before = tensors_of(z.shape)
        total = dropped(criterion, encoder, heads, x)
        # Where the graph is retained, what a convolution has saved keeps z alive too.
        got = torch.autograd.grad(total, parameters, retain_graph=all_heads)
        assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)
        if all_heads:
            again = torch.autograd.grad(total, parameters)  # nobody has z any more
            torch.testing.assert_close(again, want, rtol=1e-9, atol=1e-12)
        assert tensors_of(z.shape) == before  # with the total alive
    finally:
        gc.enable()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# --- nothing but the regulariser counts ---


def auxiliary(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + 10 * z.square().mean()


def left_out(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + 30 * (z**3).mean()


def second_criterion(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + RepMTL(100.0, 100.0)(losses, z)


def hook_that_clips(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    z.register_hook(lambda grad: grad.clamp(-1e-6, 1e-6))
    return total


def hook_of_nan(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    z.register_hook(lambda grad: grad * math.nan)
    return total


def gradient_for_a_log(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    torch.autograd.grad(total, z, retain_graph=True)
    return total


def part_of_the_tasks(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total - 0.9 * sum(losses)


def scaled(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total * 65536


def of_another_total(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    total *= -7
    return total + total.square()


OUTSIDE = [
    auxiliary, left_out, second_criterion, hook_that_clips, hook_of_nan, gradient_for_a_log,
    part_of_the_tasks, scaled, of_another_total,
]  # fmt: skip


def weights_of(network: Network, outside=None, before: bool = False, **options) -> list[float]:
    """The weight of the regulariser over some steps with the same data."""
    criterion, found = RepMTL(**{"strength": 0.3, **options}), []
    torch.manual_seed(3)
    for _ in range(FIRST + 3):
        z = network.encoder(network.images())
        if before:
            outside(torch.zeros(()), z, [])
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        last = criterion.last
        found.append((last.regularizer / (0.5 * (last.tsr + last.csa))).item())
        if outside is not None and not before:
            total = outside(total, z, losses)
        total.backward()
    return found


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}], ids=("plain", "clip"))
@pytest.mark.parametrize("outside", OUTSIDE)
def test_nothing_outside_changes_the_weight(network: Network, outside, options: dict) -> None:
    alone = weights_of(network, **options)
    assert len(set(alone)) > FIRST - 1  # it follows
    assert weights_of(network, outside, **options) == alone


@pytest.mark.parametrize("outside", [hook_that_clips, hook_of_nan])
def test_hooks_from_before_the_call_are_passed_by(network: Network, outside) -> None:
    assert weights_of(network, outside, before=True) == weights_of(network)


def test_the_user_s_hooks_and_grad_see_the_backward_pass_alone(network: Network) -> None:
    z, losses = batch(network)
    seen = []
    z.register_hook(lambda grad: seen.append(grad) or grad * 2)
    z.retain_grad()
    plain = [torch.autograd.grad(loss, z, retain_graph=True)[0] / 2 for loss in losses]
    seen.clear()
    z.grad = None
    for found, expected in zip(task_saliencies(losses, z), plain, strict=True):
        torch.testing.assert_close(found, expected)
    total = RepMTL(**LAMBDAS)(losses, z)
    assert seen == [] and z.grad is None
    total.backward()
    assert len(seen) == 1
    torch.testing.assert_close(z.grad, 2 * seen[0])


def test_weight_where_no_backward_pass_ever_comes(network: Network) -> None:
    criterion = RepMTL(strength=0.3)
    for _ in range(3):
        z, losses = batch(network)
        criterion(losses, z)
    assert criterion.get_extra_state()[1] > 0


# --- strength ---


def steps_of(network: Network, criterion: RepMTL, count: int, **theirs):
    """Checks each step's total, gradient and ratio against a running mean kept here."""
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
    found = []
    for scale in (1.0, 1e-4):
        criterion = RepMTL(0.9 * scale, 0.7 * scale, strength=0.2)
        for _ in range(2):
            criterion.lambda_tsr *= 3
            criterion.lambda_csa *= 3
            z = network.encoder(images)
            total = criterion(network.losses(z, targets), z)
            total.backward()
            found.append((total.item(), criterion.last.ratio.item()))
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    assert found[1] == pytest.approx(found[3], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "strength", "lambdas"),
    [
        ({}, 0.03, (0.01, 0.01)),
        ({"lambda_tsr": 0.9}, None, (0.9, 0.01)),
        ({"lambda_csa": 0.0}, None, (0.01, 0.0)),
        ({"strength": 0.3}, 0.3, (0.01, 0.01)),
        ({"strength": 0.0}, 0.0, (0.01, 0.01)),
        ({"lambda_tsr": 0.9, "strength": 0.3}, 0.3, (0.9, 0.01)),
    ],
)
def test_what_is_left_out(network: Network, given, strength, lambdas) -> None:
    left_out = RepMTL(**given)
    assert left_out.strength == strength
    assert (left_out.lambda_tsr, left_out.lambda_csa) == lambdas
    written_out = RepMTL(*lambdas, strength=strength)
    for _ in range(3):
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
    assert not network.encoder[0].weight.grad.isfinite().any()  # shown, not hidden
    network.zero_grad()
    z, losses = batch(network)
    criterion(losses, z).backward()
    assert criterion.last.ratio.isfinite() and network.encoder[0].weight.grad.isfinite().all()


def test_a_weight_that_falls_is_told_once(network: Network) -> None:
    """Tasks that are learned have no gradient, and the regulariser's stays."""
    criterion = RepMTL(strength=0.1)
    told = []
    for size in (1.0, 1e-5, 1e-5):
        for _ in range(2):
            z, losses = batch(network)
            losses = [size * loss + (1 - size) * loss.detach() for loss in losses]
            if size < 1:  # what is left: the direction in which one of the tasks goes
                losses[1:] = [loss - losses[0] * (1 - 1e-6) for loss in losses[1:]]
                losses = [loss - sum(losses) / TASKS * (1 - 1e-7) for loss in losses]
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                criterion(losses, z).backward()
            told += [w for w in found if "strength" in str(w.message)]
            if not told:
                last = criterion.last
                weight = (last.regularizer / (0.5 * (last.tsr + last.csa))).item()
                assert weight > 0.1 / LARGEST_RATIO
    (warning,) = told
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
    """Heads linear in z: saliencies don't depend on it, and no weight gives the ratio."""
    weights = torch.randn(2, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    criterion = RepMTL(0.5, 0.5, strength=0.1)
    z = network.encoder(network.images())
    criterion([(w * z).mean() for w in weights], z).backward()
    last = criterion.last
    # The ratio is zero: no observation, so that the mean stays at its default.
    expected = 0.1 * (0.5 * last.tsr + 0.5 * last.csa)
    torch.testing.assert_close(last.regularizer, expected, rtol=1e-6, atol=0)
    assert last.ratio == 0
    criterion._progress.ratio.load([1e-9, 1e-3])
    criterion([(w * z).mean() for w in weights], z)
    expected = 0.1 / SMALLEST_RATIO * (0.5 * last.tsr + 0.5 * last.csa)
    torch.testing.assert_close(criterion.last.regularizer, expected, rtol=1e-6, atol=0)


def test_resumed_run_is_the_uninterrupted_one(network: Network, tmp_path) -> None:
    options = {**LAMBDAS, "strength": 0.3, "clip": 0.9, "every": 2}
    images, targets = network.images(), network.targets()
    data = [(images + 0.1 * i, [y * (1 + 0.2 * i) for y in targets]) for i in range(6)]

    def run(criterion, steps):
        found = []
        for images, targets in steps:
            z = network.encoder(images)
            total = criterion(network.losses(z, targets), z)
            found += [total.detach(), *torch.autograd.grad(total, network.encoder.parameters())]
        return found

    whole = RepMTL(**options)
    expected = run(whole, data[:3]) and run(whole, data[3:])
    first = RepMTL(**options)
    run(first, data[:3])
    torch.save(first.state_dict(), tmp_path / "criterion.pt")
    run(first, data[3:])  # what was saved does not move along
    resumed = RepMTL(**options)
    resumed.load_state_dict(torch.load(tmp_path / "criterion.pt", weights_only=True))
    found = run(resumed, data[3:])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    fresh = RepMTL(**options)
    fresh._progress.calls = 3
    assert not torch.equal(run(fresh, data[3:])[3], expected[3])


def test_checkpoint_that_is_loaded_in_inference_mode(network: Network) -> None:
    options = {**LAMBDAS, "strength": 0.3, "clip": 2.0}
    first, resumed, fresh = (RepMTL(**options) for _ in range(3))
    z, losses = batch(network)
    first(losses, z).backward()
    with torch.inference_mode():
        resumed.load_state_dict(first.state_dict())
        fresh._progress.ratio.value(z.device, 1.0)
        assert fresh._progress.size.numbers() == [0, 0]
    z, losses = batch(network)
    for criterion in (first, resumed, fresh):
        criterion(losses, z).backward(retain_graph=True)
    assert torch.equal(first.get_extra_state(), resumed.get_extra_state())
    assert fresh.get_extra_state()[1] > 0


def test_checkpoint_of_the_first_version_has_a_count_alone() -> None:
    criterion = RepMTL(strength=0.1)
    criterion.load_state_dict({"_extra_state": torch.tensor(7)})
    assert criterion.get_extra_state().tolist() == [7, 0, 0, 0, 0]


def test_running_mean() -> None:
    mean = RunningMean(RATIO_DECAY)
    device = torch.device("cpu")
    assert mean.value(device, 5.0) == 5.0
    observations = [3.0, 1.0, 10.0, 2.0]
    for observation in (*observations[:2], math.nan, math.inf, 0.0, -1.0, *observations[2:]):
        mean.observe(torch.tensor(observation))
    assert mean.value(device, 5.0).item() == pytest.approx(mean_of(observations), rel=1e-6)
    assert mean.value(torch.device("meta"), 5.0).is_meta  # it moves


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


def test_default_step_is_the_sum_and_the_losses_bit_by_bit(network: Network) -> None:
    from repmtl_kernels import rep_mtl_loss, task_saliencies

    z, losses = batch(network)
    total = RepMTL(**LAMBDAS)(losses, z)
    expected = sum(losses) + rep_mtl_loss(task_saliencies(losses, z), **LAMBDAS).total
    parameters = list(network.parameters())
    found = torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
    want = torch.autograd.grad(expected, parameters, materialize_grads=True)
    assert torch.equal(total, expected)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


# --- clip ---


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
        for _ in range(2):  # the second has the gradient of the first
            got = torch.autograd.grad(
                scale * total, parameters, retain_graph=True, materialize_grads=True
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8 * scale)
    assert 1 <= clipped <= 5


def test_clip_does_not_depend_on_schedules(network: Network) -> None:
    """A weight that grows is no larger gradient; nor is a scaled loss."""
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
        lambda given: (tsr_loss(given), "rest"),
        saliencies,
        limit=0.5,
        mean=limit,
        factor=0.01,
        scale=None,
    )
    assert rest == "rest"
    found = torch.autograd.grad(value, saliencies)
    assert all(g.stride(1) == 0 for g in found)
    grads = torch.autograd.grad(tsr_loss(saliencies), saliencies)
    size = torch.stack(grads).norm() * torch.stack(list(saliencies)).norm() / 0.01
    assert size > 0.5
    torch.testing.assert_close(found, tuple(g * 0.5 / size for g in grads))
    assert unexpanded(found[0]).shape == (2, 1, 3, 4)


def test_clip_of_batched_gradients(network: Network) -> None:
    z, losses = batch(network)
    total = RepMTL(**LAMBDAS, clip=2.0)(losses, z)
    weight = network.encoder[0].weight
    seeds = torch.tensor([1.0, 2.0], dtype=total.dtype)
    found = torch.autograd.grad(total, weight, seeds, retain_graph=True, is_grads_batched=True)[0]
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, torch.stack([expected, 2 * expected]))


def test_strength_and_clip_together(network: Network) -> None:
    """The ratio that strength holds is that of the clipped gradient."""
    criterion = RepMTL(**LAMBDAS, strength=0.2, clip=0.5)
    images, targets = network.images(), network.targets()
    ratios = []
    for _ in range(4):
        z = network.encoder(images)
        criterion(network.losses(z, targets), z).backward()
        ratios.append(criterion.last.ratio.item())
    # Half of the first from the second call on: the mean of 1 and 0.5 ...
    assert ratios[0] == pytest.approx(0.2, rel=1e-5)
    for n in (2, 3):
        estimate = mean_of([1.0, *[0.5] * (n - 1)])
        assert ratios[n - 1] == pytest.approx(0.2 * 0.5 / estimate, rel=1e-5)


# --- CUDA ---


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
        found = []
        for new in batches:
            images.copy_(new)
            found.append([value.clone() for value in call(criterion)])
        return found

    eager, captured = RepMTL(**LAMBDAS, **options), RepMTL(**LAMBDAS, **options)
    # Past the calls that measure the ratio; before a capture comes one more step.
    for criterion, steps in ((eager, FIRST + 4), (captured, FIRST + 3)):
        for _ in range(steps):
            step(criterion)
    replay = graphed(Rotating(step, [captured]), torch.device(DEVICE))
    found_steps = run(captured, lambda _: replay())
    for found, expected in zip(found_steps, run(eager, step), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
