"""RepMTL's strength, gradient ratio and clipping against gradients taken one by one."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from cases import DEVICE
from test_criterion import TASKS, Network, literal
from torch import Tensor, nn

from benchmarks.rotation import Rotating, graphed
from repmtl_kernels import RepMTL, reference, second_order
from repmtl_kernels._clip import Clip
from repmtl_kernels._strength import DECAY, BackwardPass, RunningMean, norm, unexpanded
from repmtl_kernels.criterion import SMALLEST_RATIO

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


def mean_of(observations: list[float]) -> float:
    weights = [DECAY ** (len(observations) - 1 - i) for i in range(len(observations))]
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
    total = criterion(losses, z)
    assert criterion.last.ratio is None
    expected = ratio_of(*parts(losses, [z] * TASKS, **theirs), [z])
    total.backward()
    ratio = criterion.last.ratio
    assert ratio.shape == () and ratio.dtype == torch.float32 and not ratio.requires_grad
    assert ratio.item() == pytest.approx(expected, rel=1e-6)


def of_seven_eighths(total: Tensor) -> Tensor:
    total *= 7
    total /= 8
    return total


@pytest.mark.parametrize(
    "backward",
    [
        lambda total, network: (total / 4).backward(),
        lambda total, network: (total * 65536).backward(),
        lambda total, network: (-1e-30 * total).backward(),
        lambda total, network: of_seven_eighths(total).backward(),
        lambda total, network: (total + total.square()).backward(),
        lambda total, network: torch.autograd.grad(total, list(network.encoder.parameters())),
        lambda total, network: torch.autograd.grad(
            total, list(network.encoder.parameters()), create_graph=True
        ),
    ],
    ids=("accumulated", "scaled", "tiny", "in place", "function", "grad", "create_graph"),
)
def test_ratio_whatever_is_done_with_the_total(network: Network, backward) -> None:
    z, losses = batch(network)
    criterion = RepMTL(**LAMBDAS, backend="reference")
    total = criterion(losses, z)
    expected = ratio_of(*parts(losses, [z] * TASKS), [z])
    backward(total, network)
    assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)


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
        criterion(losses, z).backward(retain_graph=True)
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


def test_ratios_of_several_calls_before_backward(network: Network) -> None:
    criterion = RepMTL(**LAMBDAS)
    totals, steps, expected = [], [], []
    for _ in range(3):
        z, losses = batch(network)
        totals.append(criterion(losses, z))
        steps.append(criterion.last)
        expected.append(ratio_of(*parts(losses, [z] * TASKS), [z]))
    (sum(totals) / 3).backward()
    assert [step.ratio.item() for step in steps] == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 3


def test_other_backward_passes_are_not_observed(network: Network) -> None:
    """Saliencies and gradients of the heads alone come by, or don't, before the one that counts."""
    z, losses = batch(network)
    criterion = RepMTL(**LAMBDAS)
    total = criterion(losses, z)
    step = criterion.last
    expected = ratio_of(*parts(losses, [z] * TASKS), [z])  # hooks on z fire here already
    torch.autograd.grad(total, list(network.heads.parameters()), retain_graph=True)
    torch.autograd.grad(losses[0], z, retain_graph=True)
    assert step.ratio is None
    first = torch.autograd.grad(total, list(network.parameters()), retain_graph=True)
    found = step.ratio
    assert found.item() == pytest.approx(expected, rel=1e-6)
    again = torch.autograd.grad(total, list(network.parameters()))
    assert step.ratio is found
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_ratio_where_nothing_was_applied(network: Network) -> None:
    for criterion in (RepMTL(0, 0), RepMTL(start=1), RepMTL().eval()):
        z, losses = batch(network)
        criterion(losses, z).backward()
        assert criterion.last.ratio is None and not criterion.last.applied


def test_batched_gradients_and_function_transforms_go_unobserved(network: Network) -> None:
    z, losses = batch(network)
    criterion = RepMTL(**LAMBDAS, backend="reference")
    total = criterion(losses, z)
    weight = network.encoder[0].weight
    seeds = torch.tensor([1.0, 2.0], dtype=total.dtype)
    single, doubled = torch.autograd.grad(
        total, weight, seeds, retain_graph=True, is_grads_batched=True
    )[0]
    assert criterion.last.ratio is None
    (expected,) = torch.autograd.grad(total, weight, retain_graph=True)
    torch.testing.assert_close(single, expected)
    torch.testing.assert_close(doubled, 2 * expected)
    targets = network.targets()

    def of(criterion):
        return torch.func.grad(lambda z: criterion(network.losses(z, targets), z))

    found = of(criterion)(z.detach())
    assert criterion.last.ratio is None and criterion.last.applied
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
        criterion(losses, z).backward()
        ratios.append(criterion.last.ratio.item())
    assert ratios[1] == pytest.approx(ratios[0], rel=0.1)
    assert ratios[0] > 0.1


# --- memory ---


def tensors_of(shape: torch.Size) -> int:
    return sum(type(o) is Tensor and o.shape == shape for o in gc.get_objects())


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


def test_one_tensor_is_kept_until_backward(network: Network) -> None:
    z, losses = batch(network)
    held = BackwardPass()
    saliencies = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    total = sum(losses)
    held.follow(total)
    held.measure(total, [z] * TASKS, saliencies, [1.0] * TASKS, lambda ratio: None)
    (kept,) = held._parts
    torch.testing.assert_close(kept, sum(saliencies))
    total.backward()
    assert held._parts == []


def graph_ends_on_leaf(network: Network, criterion: RepMTL, z: Tensor, how: str) -> None:
    total = criterion(network.losses(z, network.targets()), z)
    if how == "heads only":
        torch.autograd.grad(total, list(network.heads.parameters()))
    elif how == "backward":
        total.backward()
    elif how == "of a part":  # the variable dies before the graph does
        total = total / 2
        total.backward()
        assert criterion.last.ratio is not None


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
    """Of a batch norm's output, whose ReLU in the heads is fused with it."""
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


class NoGradient(torch.autograd.Function):
    """Behind it all nodes run, and none has a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_backward_pass_without_a_gradient_is_not_observed(network: Network) -> None:
    z, losses = batch(network)
    criterion = RepMTL(**LAMBDAS, strength=0.1)
    total = criterion(losses, z)
    NoGradient.apply(total).backward()
    assert criterion.last.ratio is None and network.encoder[0].weight.grad is None
    assert criterion.get_extra_state()[1:].tolist() == [0, 0, 0, 0]


def test_a_representation_without_a_gradient_ends_the_observation(network: Network) -> None:
    z = network.encoder(network.images())
    held, reports = BackwardPass(), []
    total = NoGradient.apply(z).sum()
    held.follow(total)
    held.measure(total, [z], [torch.ones_like(z)], [1.0], reports.append)
    total.backward()
    assert held._parts == [] and reports == [] and not z._backward_hooks


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
        estimate = mean_of(observed) if observed else 1.0
        factor = criterion.strength * criterion.every / max(estimate, SMALLEST_RATIO)
        tasks, regularizer = parts(losses, [z] * TASKS, lambdas=mix, **theirs)
        expected = tasks + factor * regularizer
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        parameters = list(network.parameters())
        want = torch.autograd.grad(expected, parameters, retain_graph=True, materialize_grads=True)
        got = torch.autograd.grad(total, parameters, materialize_grads=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
        assert criterion.last.ratio.item() == pytest.approx(factor * unit, rel=1e-5)
        observed.append(unit)
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
    assert ratios[1:] == pytest.approx([0.3, 0.3], rel=1e-6)
    assert abs(ratios[0] - 0.3) > 0.01


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


@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0])
def test_bad_observations_leave_the_estimate(network: Network, poison: float) -> None:
    criterion = RepMTL(**LAMBDAS, strength=0.3)
    z, losses = batch(network)
    criterion(losses, z).backward()
    before = criterion.get_extra_state()
    z, losses = batch(network)
    (poison * criterion(losses, z)).backward()
    after = criterion.get_extra_state()
    assert torch.equal(after[1:], before[1:]) and before[1] > 0
    assert not criterion.last.ratio.isfinite()
    if poison:  # shown, not hidden
        assert not network.encoder[0].weight.grad.isfinite().any()
    network.zero_grad()
    z, losses = batch(network)
    criterion(losses, z).backward()
    assert criterion.last.ratio.isfinite() and network.encoder[0].weight.grad.isfinite().all()


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
    criterion._ratio.load([1e-9, 1e-3])
    z = network.encoder(network.images())
    criterion([(w * z).mean() for w in weights], z).backward()
    last = criterion.last
    expected = 0.1 / SMALLEST_RATIO * (0.5 * last.tsr + 0.5 * last.csa)
    torch.testing.assert_close(last.regularizer, expected, rtol=1e-6, atol=0)
    assert last.ratio < 1e-6


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
    fresh._calls = 3
    assert not torch.equal(run(fresh, data[3:])[3], expected[3])


def test_checkpoint_that_is_loaded_in_inference_mode(network: Network) -> None:
    options = {**LAMBDAS, "strength": 0.3, "clip": 2.0}
    first, resumed, fresh = (RepMTL(**options) for _ in range(3))
    z, losses = batch(network)
    first(losses, z).backward()
    with torch.inference_mode():
        resumed.load_state_dict(first.state_dict())
        fresh._ratio.value(z.device, 1.0)
        assert fresh._size.numbers() == [0, 0]
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
    mean = RunningMean()
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
        factor = min(1.0, 0.7 * mean_of(sizes) / size) if sizes else 1.0
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
    assert criterion._size.numbers()[1] == pytest.approx(1 - DECAY**4)


def test_clip_keeps_expanded_gradients_expanded() -> None:
    limit, backward = RunningMean(), BackwardPass()
    limit.observe(torch.tensor(1.0))
    saliencies = [torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2)]
    clip = Clip(0.5, limit, 1.0, backward)
    passed = clip(saliencies)
    backward.incoming = torch.tensor(1.0)
    grads = [torch.randn(2, 1, 3, 4).expand(2, 5, 3, 4) for _ in range(2)]
    found = torch.autograd.grad(passed, saliencies, grads)
    assert all(g.stride(1) == 0 for g in found)
    size = torch.stack(grads).norm() * torch.stack(list(saliencies)).norm()
    torch.testing.assert_close(found, tuple(g * 0.5 / size for g in grads))
    assert unexpanded(found[0]).shape == (2, 1, 3, 4)


def test_clip_refuses_batched_gradients(network: Network) -> None:
    z, losses = batch(network)
    total = RepMTL(clip=2.0, backend="reference")(losses, z)
    seeds = torch.ones(2, dtype=total.dtype)
    with pytest.raises(RuntimeError, match=r"RepMTL\(clip=\.\.\.\): expected one gradient"):
        torch.autograd.grad(total, network.encoder[0].weight, seeds, is_grads_batched=True)


def test_strength_and_clip_together(network: Network) -> None:
    """The ratio that strength holds is that of the clipped gradient."""
    criterion = RepMTL(**LAMBDAS, strength=0.2, clip=0.5)
    images, targets = network.images(), network.targets()
    ratios = []
    for _ in range(4):
        z = network.encoder(images)
        criterion(network.losses(z, targets), z).backward()
        ratios.append(criterion.last.ratio.item())
    first, unit = ratios[0] / 0.2, ratios[1] / 0.2 * ratios[0] / 0.2
    assert unit == pytest.approx(first / 2, rel=1e-5)  # half from the second call on
    estimate = mean_of([first, unit])
    assert ratios[2] == pytest.approx(0.2 * unit / estimate, rel=1e-5)


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
    for criterion, steps in ((eager, 4), (captured, 3)):  # before a capture comes one more step
        for _ in range(steps):
            step(criterion)
    replay = graphed(Rotating(step, [captured]), torch.device(DEVICE))
    found_steps = run(captured, lambda _: replay())
    for found, expected in zip(found_steps, run(eager, step), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
