"""RepMTL and task_saliencies against equation 10 written out with the reference losses."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import repmtl_kernels
from repmtl_kernels import RepMTL, reference, task_saliencies
from repmtl_kernels._heads import preflight

TASKS, BATCH, CHANNELS, HEIGHT, WIDTH = 3, 4, 5, 3, 2
LAMBDAS = {"lambda_tsr": 0.9, "lambda_csa": 0.7}


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


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


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
    """Total, TSR and CSA: equations 3 to 10, nothing skipped."""
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
    """Equal totals, and equal gradients of every parameter of the network."""
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


PRESENT = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("backend", ("auto", "eager", "reference"))
@pytest.mark.parametrize(
    "options, theirs",
    [
        ({}, {}),
        ({"log_losses": True}, {"log_losses": True}),
        ({"task_weights": [0.5, 2, 0]}, {"weights": [0.5, 2.0, 0.0]}),
        (
            {"log_losses": True, "task_weights": (0.3, 1.0, 4.0)},
            {"log_losses": True, "weights": [0.3, 1.0, 4.0]},
        ),
        (
            {"over": "space", "normalizer": "softmax"},
            {"over": "space", "normalizer": "softmax"},
        ),
        ({"log_losses": True, "log_offset": 0.3}, {"log_losses": True, "offset": 0.3}),
    ],
    ids=["plain", "log", "weights", "log-weights", "space-softmax", "offset"],
)
def test_total_and_gradients_are_equation_10(
    network: Network, backend: str, options: dict, theirs: dict
) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    criterion = RepMTL(**LAMBDAS, **options, backend=backend)
    total = criterion(losses, z)
    expected, tsr, csa = literal(losses, [z] * TASKS, **LAMBDAS, **theirs)
    assert_same_step(network, total, expected)
    last = criterion.last
    torch.testing.assert_close(last.tsr, tsr.detach())
    torch.testing.assert_close(last.csa, csa.detach())
    torch.testing.assert_close(last.regularizer, (0.9 * tsr + 0.7 * csa).detach())
    torch.testing.assert_close(last.total, expected.detach())
    assert last.applied is True
    assert last.losses == {t: loss.detach() for t, loss in enumerate(losses)}


@pytest.mark.parametrize(
    "lambdas",
    ({"lambda_tsr": 0.9, "lambda_csa": 0.7}, {"lambda_csa": 0}, {"lambda_tsr": 0}),
    ids=("both", "tsr", "csa"),
)
@pytest.mark.parametrize("softmax", (False, True), ids=("abs", "softmax"))
def test_options_reach_the_losses(network: Network, lambdas: dict, softmax: bool) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    lambdas = {**LAMBDAS, **lambdas}
    options = {"over": "space", "csa_temperature": 0.2, "eps": 1e-5}
    if softmax:
        options |= {"normalizer": "softmax", "tsr_temperature": 1e-3}
    else:
        options |= {"tsr_floor": 0.3}
    expected, *_ = literal(losses, [z] * TASKS, **lambdas, **options)
    for name in options:
        matters = lambdas["lambda_csa" if name == "csa_temperature" else "lambda_tsr"] != 0
        without = {key: value for key, value in options.items() if key != name}
        if matters and (name, softmax) != ("eps", True):
            changed, *_ = literal(losses, [z] * TASKS, **lambdas, **without)
            assert abs(changed - expected) > 1e-6, f"{name} makes no difference here"
    assert_same_step(network, RepMTL(**lambdas, **options)(losses, z), expected)


def test_dict_of_losses_in_any_order(network: Network) -> None:
    z = network.encoder(network.images())
    losses = dict(
        zip(("seg", "depth", "normal"), network.losses(z, network.targets()), strict=True)
    )
    weights = {"normal": 3.0, "seg": 0.5, "depth": 1.0}
    criterion = RepMTL(**LAMBDAS, task_weights=weights)
    weights["seg"] = 100.0  # the criterion keeps its own copy
    total = criterion(losses, z)
    expected, *_ = literal(list(losses.values()), [z] * 3, **LAMBDAS, weights=[0.5, 1.0, 3.0])
    assert_same_step(network, total, expected)
    assert list(criterion.last.losses) == ["seg", "depth", "normal"]


@pytest.mark.parametrize("keyed", (False, True), ids=("list", "dict"))
def test_multi_input(network: Network, keyed: bool) -> None:
    z = [network.encoder(network.images()) for _ in range(TASKS)]
    losses = network.losses(z, network.targets())
    expected, *_ = literal(losses, z, **LAMBDAS)
    if keyed:
        given = dict(zip("abc", losses, strict=True))
        representation = {"c": z[2], "a": z[0], "b": z[1]}
    else:
        given, representation = losses, tuple(z)
    assert_same_step(network, RepMTL(**LAMBDAS)(given, representation), expected)


def test_tokens_with_channels_last() -> None:
    torch.manual_seed(1)
    network = Network(tokens=True)
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    expected, *_ = literal(losses, [z] * TASKS, **LAMBDAS, channel_dim=-1)
    assert_same_step(network, RepMTL(**LAMBDAS, channel_dim=-1)(losses, z), expected)
    channels_first, *_ = literal(losses, [z] * TASKS, **LAMBDAS)
    assert not torch.isclose(channels_first, expected)


def test_present(network: Network) -> None:
    z = network.encoder(network.images())
    targets = network.targets()
    losses = [
        ((head(z) - y).square().mean((1, 2, 3)) * here).sum() / here.sum()
        for head, y, here in zip(network.heads, targets, PRESENT, strict=True)
    ]
    total = RepMTL(**LAMBDAS)(losses, z, PRESENT)
    expected, *_ = literal(losses, [z] * TASKS, **LAMBDAS, present=PRESENT)
    assert_same_step(network, total, expected)
    assert not torch.isclose(RepMTL(**LAMBDAS)(losses, z), expected)


def test_representation_that_is_a_leaf(network: Network) -> None:
    """The encoder's pass split off: z.grad carries the regulariser's gradient to it."""
    images, targets = network.images(), network.targets()
    whole = network.encoder(images)
    leaf = whole.detach().requires_grad_()
    RepMTL(**LAMBDAS)(network.losses(leaf, targets), leaf).backward()
    total = RepMTL(**LAMBDAS)(network.losses(whole, targets), whole)
    (expected,) = torch.autograd.grad(total, whole)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("lambda_tsr, lambda_csa", [(0.9, 0), (0, 0.7), (0, 0.0)])
def test_weight_of_zero_turns_its_loss_off(
    network: Network, monkeypatch: pytest.MonkeyPatch, lambda_tsr: float, lambda_csa: float
) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    expected, tsr, csa = literal(losses, [z] * TASKS, lambda_tsr=lambda_tsr, lambda_csa=lambda_csa)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    criterion = RepMTL(lambda_tsr, lambda_csa)
    total = criterion(losses, z)
    assert len(calls) == (TASKS if lambda_tsr or lambda_csa else 0)
    assert_same_step(network, total, expected)
    last = criterion.last
    assert last.applied is bool(lambda_tsr or lambda_csa)
    for weight, value, want in ((lambda_tsr, last.tsr, tsr), (lambda_csa, last.csa, csa)):
        if weight:
            torch.testing.assert_close(value, want.detach())
        else:
            assert value is None
    if last.applied:
        want = lambda_tsr * tsr + lambda_csa * csa
        torch.testing.assert_close(last.regularizer, want.detach())
    else:
        assert last.regularizer is None


def test_batch_of_one_needs_csa_off(network: Network) -> None:
    z = network.encoder(network.images()[:1])
    losses = network.losses(z, [y[:1] for y in network.targets()])
    with pytest.raises(ValueError, match="^representation: .* at least 2; got B = 1"):
        RepMTL()(losses, z)
    criterion = RepMTL(0.9, lambda_csa=0)
    saliencies = task_saliencies(losses, z)
    expected = sum(losses) + 0.9 * reference.tsr_loss(saliencies)
    torch.testing.assert_close(criterion(losses, z), expected)


def test_single_task(network: Network) -> None:
    z = network.encoder(network.images())
    loss = network.losses(z, network.targets())[0]
    expected, tsr, _ = literal([loss], [z], **LAMBDAS)
    assert tsr == 0  # one task holds all of the saliency
    assert_same_step(network, RepMTL(**LAMBDAS)([loss], z), expected)


@pytest.mark.parametrize("every", (1, 2, 3))
def test_every(network: Network, every: int) -> None:
    criterion = RepMTL(**LAMBDAS, every=every)
    for step in range(2 * every):
        z = network.encoder(network.images())
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        if step % every == 0:
            expected, *_ = literal(
                losses, [z] * TASKS, lambda_tsr=0.9 * every, lambda_csa=0.7 * every
            )
        else:
            expected = sum(losses)
        assert_same_step(network, total, expected)
        assert criterion.last.applied is (step % every == 0)
        regularizer = criterion.last.regularizer
        torch.testing.assert_close(
            criterion.last.total, sum(losses).detach() + (0 if regularizer is None else regularizer)
        )


def applied(criterion: RepMTL, network: Network, steps: int) -> list[bool]:
    found = []
    for _ in range(steps):
        z = network.encoder(network.images())
        criterion(network.losses(z, network.targets()), z)
        found.append(criterion.last.applied)
    return found


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"strength": 0.5}], ids=str)
def test_start_and_ramp(network: Network, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = RepMTL(**LAMBDAS, start=2, ramp=4, **options)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    images, targets = network.images(), network.targets()
    weights = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    for call, weight in enumerate(weights):
        z = network.encoder(images)
        losses = network.losses(z, targets)
        calls.clear()
        total = criterion(losses, z)
        weight = criterion.every * weight if (call - 2) % criterion.every == 0 else 0
        assert len(calls) == (TASKS if weight else 0)
        assert criterion.last.applied is bool(weight)
        if not weight:
            assert torch.equal(total, sum(losses))
        elif criterion.strength is None:
            lambdas = {name: weight * value for name, value in LAMBDAS.items()}
            expected, *_ = literal(losses, [z] * TASKS, **lambdas)
            assert_same_step(network, total, expected)
        else:
            total.backward()
            if call > 2:  # the estimate of a network that stays as it is
                assert criterion.last.ratio.item() == pytest.approx(0.5 * weight, rel=1e-6)


def test_start_is_counted_in_the_checkpoint(network: Network) -> None:
    criterion = RepMTL(start=3)
    assert applied(criterion, network, 2) == [False, False]
    resumed = RepMTL(start=3)
    resumed.load_state_dict(criterion.state_dict())
    assert applied(resumed, network, 3) == [False, True, True]


def absent(values, task):
    """With None for one task; a list or a dict."""
    if isinstance(values, dict):
        return {t: None if t == task else value for t, value in values.items()}
    return [None if t == task else value for t, value in enumerate(values)]


@pytest.mark.parametrize("task", range(TASKS))
@pytest.mark.parametrize("keyed", (False, True), ids=("list", "dict"))
@pytest.mark.parametrize("multi", (False, True), ids=("shared", "multi-input"))
def test_absent_task(network: Network, task: int, keyed: bool, multi: bool) -> None:
    """The same step as without that task: total, gradients, ratio."""
    z = [network.encoder(network.images()) for _ in range(TASKS)]
    losses = network.losses(z, network.targets()) if multi else None
    if not multi:
        z = z[:1] * TASKS
        losses = network.losses(z[0], network.targets())
    weights = [0.5, 2.0, 3.0]
    rest = [t for t in range(TASKS) if t != task]
    expected, *_ = literal(
        [losses[t] for t in rest],
        [z[t] for t in rest],
        **LAMBDAS,
        weights=[weights[t] for t in rest],
        present=PRESENT[rest],
    )
    given, representation = absent(losses, task), absent(z, task) if multi else z[0]
    if keyed:
        names = "abc"
        given, weights = (dict(zip(names, values, strict=True)) for values in (given, weights))
        if multi:
            representation = dict(zip(names, representation, strict=True))
    criterion = RepMTL(**LAMBDAS, task_weights=weights)
    mask = PRESENT.clone()
    mask[task] = ~mask[task]  # ignored
    assert_same_step(network, criterion(given, representation, mask), expected)
    last = criterion.last
    assert list(last.losses) == (list("abc") if keyed else [0, 1, 2])
    assert [loss is None for loss in last.losses.values()] == [t == task for t in range(TASKS)]
    assert last.ratio.isfinite()
    plain = criterion.eval()(given, None)
    torch.testing.assert_close(plain, expected.detach() - last.regularizer)


def test_message_without_any_loss(network: Network) -> None:
    z = network.encoder(network.images())
    for losses in ([None] * 3, {"a": None}):
        for training in (True, False):
            with pytest.raises(ValueError, match=r"losses: .* at least one task, got None for all"):
                RepMTL().train(training)(losses, z)
    with pytest.raises(TypeError, match=r"losses\[0\]: expected a scalar Tensor, got NoneType"):
        task_saliencies([None, z.mean()], z)


def test_second_order_where_the_next_call_applies(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    @contextlib.contextmanager
    def second_order():
        entered.append(True)
        yield

    monkeypatch.setattr("repmtl_kernels.criterion.second_order", second_order)

    def found(criterion, steps):
        shown = []
        for _ in range(steps):
            entered.clear()
            z = network.encoder(network.images())
            with criterion.second_order():
                losses = network.losses(z, network.targets())
            criterion(losses, z)
            assert bool(entered) is criterion.last.applied
            shown.append(bool(entered))
        return shown

    assert found(RepMTL(), 2) == [True, True]
    assert found(RepMTL(start=1, every=2), 4) == [False, True, False, True]
    assert found(RepMTL(strength=0.1), 1) == [True]
    for off in (RepMTL(0, 0), RepMTL().eval(), RepMTL(strength=0.0)):
        assert found(off, 1) == [False]
    criterion = RepMTL()
    criterion.every = 0
    with pytest.raises(ValueError, match="every: expected"):
        criterion.second_order()


def test_step_under_second_order(network: Network) -> None:
    z = network.encoder(network.images())
    targets = network.targets()
    expected, *_ = literal(network.losses(z, targets), [z] * TASKS, **LAMBDAS)
    criterion = RepMTL(**LAMBDAS)
    with criterion.second_order() as context:
        losses = network.losses(z, targets)
    assert isinstance(context, type(repmtl_kernels._heads.second_order.second_order()))
    assert_same_step(network, criterion(losses, z), expected)
    assert criterion.last.ratio > 0


def test_heads_without_a_second_derivative_are_explained_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    explain = preflight.explain
    monkeypatch.setattr(
        preflight,
        "explain",
        lambda new, *rest: walks.append([t.key for t in new]) or explain(new, *rest),
    )
    criterion = RepMTL(start=1)
    assert applied(criterion, network, 3) == [False, True, True]
    assert walks == [[0, 1, 2]]
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    losses[1] = checkpoint(network.heads[1], z, use_reentrant=True).mean()
    with pytest.raises(
        preflight.SecondDerivativeError, match=r"losses\[1\]: .*use_reentrant=False"
    ):
        RepMTL()(losses, z)
    assert RepMTL.check is preflight.check
    RepMTL.check(network.heads, z)


@pytest.mark.parametrize("norm", ("layer", "instance", "none"))
def test_heads_without_means_are_told_once(norm: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 6, 5, requires_grad=True)  # (B, N, D) or (B, C, N)
    channel_dim = 1 if norm == "instance" else -1
    layer = {"layer": nn.LayerNorm(5), "instance": nn.InstanceNorm1d(6), "none": nn.Tanh()}[norm]
    head = nn.Sequential(layer, nn.Linear(5, 3), nn.Tanh())
    losses = {"plain": (z**3).mean(), "normed": head(z).square().mean()}
    option = {"layer": "lambda_tsr", "instance": "lambda_csa", "none": ""}[norm]

    def told(criterion: RepMTL) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            criterion(losses, z)
        assert all(one.filename == __file__ for one in found)
        return [str(one.message) for one in found]

    criterion = RepMTL(start=1, channel_dim=channel_dim)
    assert told(criterion) == []  # without the regulariser
    messages = told(criterion)
    assert len(messages) == bool(option)
    if option:
        assert messages[0].startswith("losses['normed']: the saliency's means"), messages
        assert messages[0].endswith(f"or set {option}=0")
        assert told(RepMTL(channel_dim=channel_dim, **{option: 0})) == []
    assert told(criterion) == []


def test_evaluation_and_failed_calls_are_not_counted(network: Network) -> None:
    criterion = RepMTL(every=3)
    assert applied(criterion, network, 2) == [True, False]
    criterion.eval()
    assert applied(criterion, network, 2) == [False, False]
    criterion.train()
    with pytest.raises(TypeError):
        criterion(None, None)
    assert applied(criterion, network, 3) == [False, True, False]


def test_state_dict_in_the_middle_of_a_cycle(network: Network, tmp_path) -> None:
    criterion = RepMTL(every=3)
    assert applied(criterion, network, 4) == [True, False, False, True]
    holder = nn.ModuleDict({"network": network, "criterion": criterion})
    torch.save(holder.state_dict(), tmp_path / "checkpoint.pt")
    assert applied(criterion, network, 1) == [False]  # what was saved does not move along
    resumed = nn.ModuleDict({"network": Network(), "criterion": RepMTL(every=3)})
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert applied(resumed["criterion"], network, 4) == [False, False, True, False]


def test_checkpoint_of_the_model_without_a_criterion(network: Network) -> None:
    holder = nn.ModuleDict({"network": network, "criterion": RepMTL(every=3)})
    applied(holder["criterion"], network, 1)
    before = {k: v for k, v in holder.state_dict().items() if k.startswith("network")}
    holder.load_state_dict(before)
    assert applied(holder["criterion"], network, 3) == [False, False, True]
    before.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"network"):
        holder.load_state_dict(before)


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda criterion: pickle.loads(pickle.dumps(criterion))),
    ids=("deepcopy", "pickle"),
)
def test_copies_are_independent(network: Network, duplicate) -> None:
    criterion = RepMTL(0.9, 0.7, every=2, task_weights=[1.0, 2.0, 3.0])
    applied(criterion, network, 1)
    other = duplicate(criterion)
    torch.testing.assert_close(other.last.total, criterion.last.total)
    assert applied(other, network, 2) == [False, True]
    assert applied(criterion, network, 2) == [False, True]
    assert repr(other) == repr(criterion)


def test_a_copy_has_the_same_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    holder = nn.ModuleDict({"criterion": RepMTL(scaler=scaler), "head": nn.Linear(2, 2)})
    assert copy.deepcopy(holder)["criterion"].scaler is scaler
    other, criterion = copy.deepcopy((scaler, holder["criterion"]))  # copied before: that one
    assert other is not scaler and criterion.scaler is other


@pytest.mark.parametrize("log_losses", (False, True))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_evaluation_mode(network: Network, mode, log_losses: bool) -> None:
    criterion = RepMTL(**LAMBDAS, log_losses=log_losses, task_weights=[1.0, 2.0, 3.0]).eval()
    with mode():
        z = network.encoder(network.images())
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        terms = [loss.log() for loss in losses] if log_losses else losses
        expected = terms[0] + 2 * terms[1] + 3 * terms[2]
    assert torch.equal(total, expected)
    last = criterion.last
    assert (last.tsr, last.csa, last.regularizer, last.applied) == (None, None, None, False)
    assert torch.equal(last.total, expected)


def test_schedule_of_the_weights(network: Network) -> None:
    criterion = RepMTL(0, 0)
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    assert torch.equal(criterion(losses, z), sum(losses))
    criterion.lambda_tsr, criterion.lambda_csa = 0.9, 0.7
    expected, *_ = literal(losses, [z] * TASKS, **LAMBDAS)
    torch.testing.assert_close(criterion(losses, z), expected)
    criterion.lambda_csa = -1
    with pytest.raises(ValueError, match="lambda_csa: expected a finite number of at least 0"):
        criterion(losses, z)


def test_log_of_zero_with_an_offset(network: Network) -> None:
    criterion = RepMTL(log_losses=True, log_offset=0.01)
    for training in (True, False):
        z = network.encoder(network.images())
        losses = [*network.losses(z, network.targets())[:2], (0 * z).sum()]
        total = criterion.train(training)(losses, z)
        network.zero_grad()
        total.backward()
        assert total.isfinite() and network.encoder[0].weight.grad.isfinite().all()
        assert criterion.last.losses[2] == 0


def test_log_of_zero_is_not_hidden(network: Network) -> None:
    z = network.encoder(network.images())
    losses = [*network.losses(z, network.targets())[:2], (0 * z).sum()]
    assert not math.isfinite(RepMTL(log_losses=True)(losses, z).item())
    assert RepMTL(log_losses=True).eval()(losses, z).item() == -math.inf


def test_nan_is_not_hidden(network: Network) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    losses[1] = losses[1] * math.nan
    criterion = RepMTL(task_weights=[1, 0, 1])
    assert criterion(losses, z).isnan()
    assert criterion.last.csa.isnan()


def test_last_has_no_graph_and_does_not_follow_the_total(network: Network) -> None:
    criterion = RepMTL(**LAMBDAS)
    assert criterion.last is None
    z = network.encoder(network.images())
    total = criterion(network.losses(z, network.targets()), z)
    last = criterion.last
    scalars = [last.tsr, last.csa, last.regularizer, last.total, *last.losses.values()]
    assert all(s.shape == () and s.grad_fn is None and not s.requires_grad for s in scalars)
    before = last.total.item()
    total /= 8
    assert last.total.item() == before


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"log_losses": True, "log_offset": 0.1},
        {"every": 2},
        {"lambda_csa": 0, "tsr_floor": 0.1},
        {"lambda_tsr": 0},
        {"strength": 0.1, "clip": 2.0, "ramp": 4},
    ),
    ids=("plain", "log", "every", "tsr", "csa", "strength"),
)
def test_no_value_is_read_on_the_host(network: Network, options: dict) -> None:
    """Tensors on the meta device have no values, so that reading one raises.

    On a CUDA device, reading one waits for all work in flight.
    """
    targets = [y.to("meta") for y in network.targets()]
    images, network = network.images().to("meta"), network.to("meta")
    criterion = RepMTL(**options, task_weights=[1, 2, 3], backend="eager")
    for training in (True, True, False):
        for absent in (None, 1):
            z = network.encoder(images)
            losses = [None if t == absent else x for t, x in enumerate(network.losses(z, targets))]
            total = criterion.train(training)(losses, z, PRESENT.to("meta"))
            total.backward()
            last = criterion.last
            given = [loss for loss in last.losses.values() if loss is not None]
            assert total.is_meta and all(loss.is_meta for loss in given)
            assert last.ratio.is_meta if last.applied else last.ratio is None
    with pytest.raises(RuntimeError, match="meta"):
        bool(criterion.last.total > 0)


def test_task_saliencies(network: Network) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    saliencies = task_saliencies(losses, z)
    assert isinstance(saliencies, list)
    for saliency, loss in zip(saliencies, losses, strict=True):
        assert saliency.requires_grad
        assert saliency.shape == z.shape
        assert torch.equal(saliency, torch.autograd.grad(loss, z, retain_graph=True)[0])
    several = [network.encoder(network.images()) for _ in range(TASKS)]
    losses = dict(zip("abc", network.losses(several, network.targets()), strict=True))
    saliencies = task_saliencies(losses, dict(zip("abc", several, strict=True)))
    for saliency, task, own in zip(saliencies, "abc", several, strict=True):
        assert torch.equal(saliency, torch.autograd.grad(losses[task], own, retain_graph=True)[0])


def written_one_by_one(losses: list[Tensor]) -> Tensor:
    out = torch.zeros(len(losses), dtype=losses[0].dtype)
    for t, loss in enumerate(losses):
        out[t] = loss
    return out


ZEROS = r"backpropagates zeros through the branches of all other tasks"


def restack(how):
    """The losses as elements of one tensor."""
    return lambda losses, z: (how(losses), z)


BAD = {
    "stacked": (
        restack(torch.stack),
        TypeError,
        r"losses: expected a list or dict .* got one Tensor of shape \(3,\)\. Every .*" + ZEROS,
    ),
    "unbound": (
        restack(lambda losses: list(torch.stack(losses))),
        ValueError,
        r"losses\[0\] and losses\[1\]: .* elements of one stacked tensor.*" + ZEROS,
    ),
    "indexed": (
        restack(lambda losses: [(s := torch.stack(losses))[0], losses[1], s[2]]),
        ValueError,
        r"losses\[0\] and losses\[2\]: .*" + ZEROS,
    ),
    "concatenated": (
        restack(lambda losses: dict(zip("abc", torch.hstack(losses), strict=True))),
        ValueError,
        r"losses\['a'\] and losses\['b'\]: .*" + ZEROS,
    ),
    "written one by one": (
        restack(lambda losses: [(out := written_one_by_one(losses))[0], out[1]]),
        ValueError,
        r"losses\[0\] and losses\[1\]: .*" + ZEROS,
    ),
    "summed": (
        lambda losses, z: (sum(losses), z),
        TypeError,
        r"losses: .* got one scalar Tensor\. Pass the loss of each task, not their sum",
    ),
    "empty list": (
        lambda losses, z: ([], z),
        ValueError,
        r"losses: expected at least one task, got an empty list",
    ),
    "empty dict": (
        lambda losses, z: ({}, z),
        ValueError,
        r"losses: expected at least one task, got an empty dict",
    ),
    "generator": (
        lambda losses, z: ((loss for loss in losses), z),
        TypeError,
        r"losses: expected a list, tuple or dict of T scalar losses; got generator",
    ),
    "number": (
        lambda losses, z: ([losses[0], 0.5], z),
        TypeError,
        r"losses\[1\]: expected a scalar Tensor, got float",
    ),
    "vector": (
        lambda losses, z: ({"seg": losses[0].expand(4)}, z),
        ValueError,
        r"losses\['seg'\]: expected a scalar of shape \(\), got shape \(4,\)\. .*\.mean\(\)",
    ),
    "one element": (
        lambda losses, z: ([losses[0], losses[1].view(1)], z),
        ValueError,
        r"losses\[1\]: .* got shape \(1,\)\. Reduce it with \.mean\(\) or \.squeeze\(\)",
    ),
    "detached": (
        lambda losses, z: ([losses[0], losses[1].detach()], z),
        ValueError,
        r"losses\[1\]: expected a loss with a graph, got one without: it was detached.*pass None",
    ),
    "independent": (
        lambda losses, z: ({"a": losses[0], "c": losses[1].detach().requires_grad_().exp()}, z),
        ValueError,
        r"losses\['c'\]: does not depend on representation\. Pass the very tensor.* penalty on",
    ),
    "a leaf": (
        lambda losses, z: ([losses[0], torch.ones((), requires_grad=True)], z),
        ValueError,
        r"losses\[1\]: does not depend on representation\.",
    ),
    "another representation": (
        lambda losses, z: (losses, z.clone()),
        ValueError,
        r"losses\[0\]: does not depend on representation\.",
    ),
    "representation of another task": (
        lambda losses, z: (losses, [z, z, z.clone()]),
        ValueError,
        r"losses\[2\]: does not depend on representation\[2\]",
    ),
    "detached representation": (
        lambda losses, z: (losses, z.detach()),
        ValueError,
        r"representation: expected a tensor with requires_grad=True, .* it was detached .*frozen",
    ),
    "one detached representation": (
        lambda losses, z: (dict(zip("abc", losses, strict=True)), {"a": z, "b": z.data, "c": z}),
        ValueError,
        r"representation\['b'\]: expected a tensor with requires_grad=True",
    ),
    "too few representations": (
        lambda losses, z: (losses, [z, z]),
        ValueError,
        r"representation: expected 3, one for each loss; got 2",
    ),
    "representation of no type": (
        lambda losses, z: (losses, None),
        TypeError,
        r"representation: expected a Tensor \(multi-input: .*\), got NoneType",
    ),
    "representations of no tensor": (
        lambda losses, z: (losses, [z, z, 1.0]),
        TypeError,
        r"representation\[2\]: expected a Tensor, got float",
    ),
    "keys of the representations": (
        lambda losses, z: (dict(zip("abc", losses, strict=True)), {"a": z, "b": z, "d": z}),
        ValueError,
        r"representation: expected the keys of losses, \['a', 'b', 'c'\]; got \['a', 'b', 'd'\]",
    ),
    "dict and list": (
        lambda losses, z: (dict(zip("abc", losses, strict=True)), [z, z, z]),
        TypeError,
        r"representation: losses is a dict, so expected a dict with the same keys; got list",
    ),
    "list and dict": (
        lambda losses, z: (losses, {0: z, 1: z, 2: z}),
        TypeError,
        r"representation: losses is a list, so expected a list or tuple .* got dict",
    ),
}


@pytest.mark.parametrize("call", ("task_saliencies", "RepMTL"))
@pytest.mark.parametrize("bad, error, message", BAD.values(), ids=BAD.keys())
def test_message_for_bad_input(network: Network, bad, error, message: str, call: str) -> None:
    z = network.encoder(network.images())
    losses, representation = bad(network.losses(z, network.targets()), z)
    with pytest.raises(error, match=message):
        (task_saliencies if call == "task_saliencies" else RepMTL())(losses, representation)


def test_element_of_a_stack_within_one_task_is_accepted(network: Network) -> None:
    z = network.encoder(network.images())
    first, second, third = network.losses(z, network.targets())
    levels = torch.stack([first, third])
    expected = task_saliencies([first, second], z)
    for found, want in zip(task_saliencies([levels[0], second], z), expected, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("every", (1, 2))
def test_message_without_gradients(network: Network, every: int) -> None:
    criterion = RepMTL(every=every)
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match=r"disabled here .*criterion\.eval"):
            criterion(losses, z)
        criterion(losses, z)
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are disabled here"):
        task_saliencies(losses, z)


def test_message_names_inference_mode(network: Network) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    with torch.inference_mode():
        losses[2] = network.losses(z, network.targets())[2]
    with pytest.raises(ValueError, match=r"losses\[2\]: .* under torch.inference_mode"):
        task_saliencies(losses, z)


def test_message_for_an_inplace_head(network: Network) -> None:
    z = network.encoder(network.images())
    first = z.sum()
    second = z.relu_().square().sum()
    with pytest.raises(ValueError, match=r"losses\[0\]: does not depend .*ReLU\(inplace=True\)"):
        RepMTL()([first, second], z)


@pytest.mark.parametrize("call", (task_saliencies, RepMTL()), ids=("task_saliencies", "RepMTL"))
def test_message_for_swapped_arguments(network: Network, call) -> None:
    z = network.encoder(network.images())
    with pytest.raises(TypeError, match="got one Tensor, .* got list. Are they swapped"):
        call(z, network.losses(z, network.targets()))


def test_message_for_a_compiled_step(network: Network) -> None:
    @torch.compile(backend="aot_eager")
    def forward(x):
        z = network.encoder(x)
        return z, network.losses(z, network.targets())

    z, losses = forward(network.images())
    for given in (losses, [loss.square() for loss in losses]):  # also: the losses made outside
        with pytest.raises(ValueError, match=r"torch.compile region.* compile the encoder alone"):
            RepMTL()(given, z)


def test_message_for_a_number_in_place_of_an_absent_loss(network: Network) -> None:
    z = network.encoder(network.images())
    losses = [*network.losses(z, network.targets())[:-1], 0.0]
    with pytest.raises(TypeError, match=r"losses\[2\]: .* got float\. For a task .* pass None"):
        RepMTL()(losses, z)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(
    "weights, keyed, error, message",
    [
        ([1.0, 2.0], False, ValueError, "task_weights: expected 3, one for each loss; got 2"),
        ([1.0] * 3, True, TypeError, "task_weights: losses is a dict, .* got tuple"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, False, TypeError, "task_weights: losses is a list, .* got dict"),
        ({"a": 1.0, "b": 1.0}, True, ValueError, r"task_weights: expected the keys .*\['a', 'b'\]"),
    ],
)
def test_message_for_weights_of_other_tasks(
    network: Network, weights, keyed: bool, error, message: str, training: bool
) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    given = dict(zip("abc", losses, strict=True)) if keyed else losses
    with pytest.raises(error, match=message):
        RepMTL(task_weights=weights).train(training)(given, z)


@pytest.mark.parametrize("lambda_csa", (0, 0.01))
def test_message_for_a_mask_of_another_shape(network: Network, lambda_csa: float) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    with pytest.raises(ValueError, match=r"present: expected shape \(T, B\) = \(3, 4\)"):
        RepMTL(lambda_csa=lambda_csa)(losses, z, PRESENT.T)


@pytest.mark.parametrize("lambda_csa", (0, 0.01))
def test_a_bad_batch_is_refused_on_every_step(network: Network, lambda_csa: float) -> None:
    criterion = RepMTL(lambda_csa=lambda_csa, every=4)
    assert applied(criterion, network, 1) == [True]
    z = network.encoder(network.images())
    with pytest.raises(ValueError, match="present: expected shape"):
        criterion(network.losses(z, network.targets()), z, PRESENT.T)
    z = network.encoder(network.images()[:1])
    losses = [head(z).square().mean() for head in network.heads]
    if lambda_csa:
        with pytest.raises(ValueError, match="got B = 1.*lambda_csa=0"):
            criterion(losses, z)
    else:
        criterion(losses, z)


@pytest.mark.parametrize(
    "name, value",
    [
        ("every", 0),
        ("start", -1),
        ("ramp", -1),
        ("strength", -1.0),
        ("clip", 0.0),
        ("memory", "little"),
        ("log_offset", 0.1),
        ("tsr_floor", math.nan),
        ("task_weights", [1.0, -1.0, 1.0]),
    ],
)
def test_message_for_bad_options_set_later(network: Network, name: str, value) -> None:
    criterion = RepMTL()
    setattr(criterion, name, value)
    z = network.encoder(network.images())
    with pytest.raises(ValueError, match=f"^{name}.*: .*expected"):
        criterion(network.losses(z, network.targets()), z)


def test_message_for_representations_of_different_shapes(network: Network) -> None:
    z = [network.encoder(network.images()[: BATCH - t]) for t in range(TASKS)]
    losses = [head(x).square().mean() for head, x in zip(network.heads, z, strict=True)]
    expected = r"representation\[1\]: every task must have the shape of representation\[0\]"
    with pytest.raises(ValueError, match=expected):
        RepMTL()(losses, z)
    named = [dict(zip("abc", values, strict=True)) for values in (losses, z)]
    expected = r"representation\['b'\]: every task must have the shape of representation\['a'\]"
    with pytest.raises(ValueError, match=expected):
        RepMTL()(*named)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lambda_tsr": -1}, ValueError, "lambda_tsr: expected a finite number of at least 0"),
        ({"lambda_csa": math.nan}, ValueError, "lambda_csa: expected a finite number"),
        ({"lambda_csa": "1"}, TypeError, "lambda_csa: expected a number, got str"),
        ({"over": "channels"}, ValueError, "over: expected one of 'tasks', 'space'"),
        ({"normalizer": "l2"}, ValueError, "normalizer: expected one of"),
        ({"tsr_temperature": 0}, ValueError, "tsr_temperature: expected .* above 0"),
        ({"csa_temperature": 0}, ValueError, "csa_temperature: expected .* above 0"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"log_losses": 1}, TypeError, "log_losses: expected a bool, got int"),
        ({"every": 0}, ValueError, "every: expected an int of at least 1; got 0"),
        ({"every": 2.0}, TypeError, "every: expected an int, got float"),
        ({"every": True}, TypeError, "every: expected an int, got bool"),
        ({"start": -1}, ValueError, "start: expected an int of at least 0; got -1"),
        ({"ramp": 0.5}, TypeError, "ramp: expected an int, got float"),
        ({"strength": -0.1}, ValueError, "strength: expected a finite number of at least 0"),
        ({"strength": "high"}, TypeError, "strength: expected a number, got str"),
        ({"clip": 0}, ValueError, "clip: expected a finite number above 0"),
        ({"clip": math.inf}, ValueError, "clip: expected a finite number above 0"),
        ({"log_offset": 0.1}, ValueError, "log_offset: .* expected 0 without log_losses=True"),
        ({"log_losses": True, "log_offset": -1}, ValueError, "log_offset: expected"),
        ({"tsr_floor": -1}, ValueError, "tsr_floor: expected a finite number of at least 0"),
        (
            {"tsr_floor": 0.1, "normalizer": "softmax"},
            ValueError,
            "tsr_floor: .* expected 0 with normalizer='softmax', got 0.1",
        ),
        ({"group": "all"}, ValueError, "group: expected None .* got 'all'"),
        ({"group": 1}, TypeError, "group: expected None .* got int"),
        ({"memory": "none"}, ValueError, "memory: expected one of 'auto', 'save', 'recompute'"),
        ({"task_weights": [1, -1]}, ValueError, r"task_weights\[1\]: expected .* at least 0"),
        ({"task_weights": {"a": None}}, TypeError, r"task_weights\['a'\]: expected a number"),
        ({"task_weights": torch.ones(2)}, TypeError, "task_weights: expected .* got Tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_message_for_bad_options(options: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        RepMTL(**options)


def test_repr_shows_the_options() -> None:
    shown = repr(RepMTL(0.9, every=4))
    assert "lambda_tsr=0.9" in shown and "every=4" in shown


@pytest.mark.parametrize(
    "options", ({}, {"log_losses": True}, {"every": 4}), ids=("plain", "log", "every")
)
def test_training_run(options: dict) -> None:
    torch.manual_seed(2)
    network = Network()
    network.float()
    images, targets = network.images().float(), [y.float() for y in network.targets()]
    criterion = RepMTL(0.1, 0.1, **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    totals = []
    for _ in range(60):
        z = network.encoder(images)
        total = criterion(network.losses(z, targets), z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if criterion.last.applied:
            totals.append(criterion.last.total.item())
    assert all(p.isfinite().all() for p in network.parameters())
    assert totals[-1] < totals[0] - 0.3


def test_public_names() -> None:
    assert {"RepMTL", "task_saliencies"} <= set(repmtl_kernels.__all__)
