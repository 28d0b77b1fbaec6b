"""Rep-MTL together with the aggregators of TorchJD."""

import copy

import pytest
import torch
from cases import settled
from torch import nn

pytest.importorskip("torchjd")

from torchjd.aggregation import FairGrad, Mean, NashMTL, Sum, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from repmtl_kernels import Levels, RepMTL, rep_mtl_loss, task_saliencies
from repmtl_kernels.integrations.torchjd import rep_mtl_backward, rep_mtl_backward_multi_input

TASKS = ("a", "b", "c")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
STRONG = {"lambda_tsr": 0.9, "lambda_csa": 0.7}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh())
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Conv2d(6, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 2, 1)
                )
                for task in TASKS
            }
        )
        self.double()

    def losses(self, x, y, tasks=TASKS):
        z = self.encoder(x)
        return {t: (self.heads[t](z) - y[t]).square().mean() for t in tasks}, z

    def multi_input_losses(self, x, y):
        z = {t: self.encoder(x + i) for i, t in enumerate(TASKS)}
        return {t: (self.heads[t](z[t]) - y[t]).square().mean() for t in TASKS}, z


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def batch():
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    return x, {t: torch.randn(4, 2, 5, 6, dtype=torch.float64) for t in TASKS}


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters()}


def assert_same_gradients(network, expected, **tolerance):
    for name, p in network.named_parameters():
        torch.testing.assert_close(
            p.grad, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


AGGREGATORS = {
    "nash": lambda: NashMTL(n_tasks=3),
    "fairgrad": lambda: FairGrad(alpha=2.0),
    "upgrad": UPGrad,
    "mean": Mean,
}


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.parametrize("name", AGGREGATORS)
def test_equals_the_literal_composition(network, batch, name):
    """The result is that of torchjd alone plus the gradient of the regulariser."""
    twin = copy.deepcopy(network)
    losses, z = twin.losses(*batch)
    regularizer = rep_mtl_loss(
        task_saliencies(losses, z), lambda_tsr=0.9, lambda_csa=0.7, csa_temperature=0.5
    ).total
    added = torch.autograd.grad(regularizer, list(twin.parameters()), retain_graph=True)
    mtl_backward(list(losses.values()), features=z)
    weights = jac_to_grad(twin.encoder.parameters(), AGGREGATORS[name]())
    alone = gradients(twin)
    expected = {name: alone[name] + r for name, r in zip(alone, added, strict=True)}

    losses, z = network.losses(*batch)
    criterion = RepMTL(**STRONG)
    assert rep_mtl_backward(losses, features=z, criterion=criterion) is None
    got = jac_to_grad(network.encoder.parameters(), AGGREGATORS[name]())
    torch.testing.assert_close(got, weights, **TIGHT)
    if name != "mean":
        assert got.max() > 1.05 * got.min()  # otherwise the aggregator would be Mean
    assert_same_gradients(network, expected, rtol=1e-9, atol=1e-12)
    # The regulariser is not negligible here.
    assert all((r.norm() > 1e-3 * g.norm()) for g, r in zip(alone.values(), added, strict=True))
    torch.testing.assert_close(criterion.last.regularizer, regularizer.detach(), **TIGHT)


OPTIONS = {
    "plain": {},
    "log losses": {"log_losses": True},
    "weights": {"task_weights": {"a": 0.5, "b": 2.0, "c": 1.0}},
    "log losses and weights": {"log_losses": True, "task_weights": {"a": 0.5, "b": 2.0, "c": 1.0}},
    "strength and clip": {"strength": 0.3, "clip": 0.5},
    "off": {"lambda_tsr": 0.0, "lambda_csa": 0.0, "log_losses": True},
}


@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_with_sum_it_is_the_backward_of_the_total(network, batch, options, multi_input):
    twin = copy.deepcopy(network)
    forward = Network.multi_input_losses if multi_input else Network.losses
    plain, criterion = (RepMTL(**{**STRONG, **options}) for _ in range(2))
    for _ in range(2):  # the second weight depends on the first ratio
        plain(*forward(twin, *batch)).backward()
        losses, z = forward(network, *batch)
        rep_mtl_backward(losses, features=z, criterion=criterion)
        jac_to_grad(network.encoder.parameters(), Sum())
    assert_same_gradients(network, gradients(twin), **TIGHT)
    assert criterion.last.applied is plain.last.applied is bool(criterion.lambda_tsr)
    torch.testing.assert_close(criterion.last.total, plain.last.total, **TIGHT)
    torch.testing.assert_close(criterion.last.ratio, plain.last.ratio)


@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize("lambdas", [STRONG, {"lambda_tsr": 0.0, "lambda_csa": 0.0}])
def test_rows_are_the_weighted_objectives(network, batch, lambdas, multi_input):
    """The aggregator gets these rows; a test with Sum would not notice wrong ones."""
    twin = copy.deepcopy(network)
    forward = Network.multi_input_losses if multi_input else Network.losses
    losses, z = forward(twin, *batch)
    weights = {"a": 0.5, "b": 2.0, "c": 1.0}
    objectives = [weights[t] * (loss + 0.1).log() for t, loss in losses.items()]
    mtl_backward(objectives, features=list(z.values()) if multi_input else z)
    options = {"log_losses": True, "log_offset": 0.1, "task_weights": weights}
    rep_mtl_backward(*forward(network, *batch), RepMTL(**lambdas, **options))
    for got, expected in zip(network.encoder.parameters(), twin.encoder.parameters(), strict=True):
        assert got.jac.shape == (3, *got.shape)
        torch.testing.assert_close(got.jac, expected.jac, **TIGHT)


@pytest.mark.parametrize("why", ["off", "every", "eval"])
def test_without_the_regularizer_it_is_torchjd_alone(network, batch, why):
    twin = copy.deepcopy(network)
    criterion = RepMTL(0.0, 0.0) if why == "off" else RepMTL(every=2).train(why != "eval")
    criterion(*twin.losses(*batch))  # the second call does not apply the regulariser
    losses, z = twin.losses(*batch)
    mtl_backward(list(losses.values()), features=z)
    jac_to_grad(twin.encoder.parameters(), UPGrad())
    losses, z = network.losses(*batch)
    rep_mtl_backward(list(losses.values()), features=z, criterion=criterion)
    assert not criterion.last.applied
    jac_to_grad(network.encoder.parameters(), UPGrad())
    assert_same_gradients(network, gradients(twin), rtol=0, atol=0)


def test_accumulates_like_torchjd(network, batch):
    """Jacobians accumulate until they are aggregated, gradients until they are set to zero."""
    x, y = batch
    parts = [(x[i : i + 2], {t: v[i : i + 2] for t, v in y.items()}) for i in (0, 2)]
    twin = copy.deepcopy(network)
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for part in parts:
        losses, z = twin.losses(*part)
        total = RepMTL(**STRONG)(losses, z)
        regularizer = total - sum(losses.values())
        added = torch.autograd.grad(regularizer, list(twin.parameters()), retain_graph=True)
        for sum_, grad in zip(expected.values(), added, strict=True):
            sum_ += grad
        mtl_backward(list(losses.values()), features=z)
    jac_to_grad(twin.encoder.parameters(), UPGrad())
    for name, grad in gradients(twin).items():
        expected[name] += grad

    criterion = RepMTL(**STRONG)
    for part in parts:
        losses, z = network.losses(*part)
        rep_mtl_backward(losses, features=z, criterion=criterion)
    assert network.encoder[0].weight.jac.shape == (3, 6, 3, 3, 3)
    jac_to_grad(network.encoder.parameters(), UPGrad())
    assert_same_gradients(network, expected, **TIGHT)
    rep_mtl_backward(*network.losses(*batch), criterion)
    twin.zero_grad()
    rep_mtl_backward(*twin.losses(*batch), RepMTL(**STRONG))
    for name, p in twin.heads.named_parameters():
        expected[f"heads.{name}"] += p.grad
    heads = {n: p for n, p in network.named_parameters() if n.startswith("heads")}
    for name, p in heads.items():
        torch.testing.assert_close(p.grad, expected[name], **TIGHT)


def test_heads_under_second_order(network, batch):
    twin = copy.deepcopy(network)
    RepMTL(**STRONG)(*twin.losses(*batch)).backward()
    criterion = RepMTL(**STRONG)
    z = network.encoder(batch[0])
    with criterion.second_order():
        losses = {t: (network.heads[t](z) - batch[1][t]).square().mean() for t in TASKS}
    rep_mtl_backward(losses, z, criterion)
    jac_to_grad(network.encoder.parameters(), Sum())
    assert_same_gradients(network, gradients(twin), **TIGHT)


@pytest.mark.parametrize("lambdas", [STRONG, {"lambda_tsr": 0.0, "lambda_csa": 0.0}])
def test_an_absent_task_has_no_row(network, batch, lambdas):
    twin = copy.deepcopy(network)
    losses, z = twin.losses(*batch, tasks=("a", "c"))
    rep_mtl_backward(losses, z, RepMTL(**lambdas))
    jac_to_grad(twin.encoder.parameters(), UPGrad())
    losses, z = network.losses(*batch, tasks=("a", "c"))
    rep_mtl_backward([losses["a"], None, losses["c"]], z, RepMTL(**lambdas))
    assert network.encoder[0].weight.jac.shape[0] == 2
    jac_to_grad(network.encoder.parameters(), UPGrad())
    assert network.heads["b"][0].weight.grad is None
    assert_same_gradients(network, gradients(twin), **TIGHT)


class Shared(nn.Module):
    """Two shared features of different shapes; task c uses only the first."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(5, 6), nn.Linear(5, 4)])
        self.heads = nn.ModuleDict(
            {
                t: nn.Sequential(nn.Linear(6 if t == "c" else 10, 4), nn.Tanh(), nn.Linear(4, 1))
                for t in TASKS
            }
        )
        self.double()

    def losses(self, x, y):
        z = [torch.tanh(encoder(x)) for encoder in self.encoders]
        inputs = {t: z[0] if t == "c" else torch.cat(z, 1) for t in TASKS}
        return {t: (self.heads[t](inputs[t]) - y[t]).square().mean() for t in TASKS}, z


@pytest.fixture
def shared():
    torch.manual_seed(0)
    x = torch.randn(8, 5, dtype=torch.float64)
    y = {t: torch.randn(8, 1, dtype=torch.float64) for t in TASKS}
    return Shared(), (x, y)


@pytest.mark.parametrize("form", (list, tuple, Levels))
def test_features_that_all_tasks_share(shared, form):
    """The result is the gradient of ``mtl_backward`` plus the regulariser's."""
    network, batch = shared
    twin = copy.deepcopy(network)
    losses, z = twin.losses(*batch)
    total = RepMTL(**STRONG)(losses, Levels(z))
    added = torch.autograd.grad(
        total - sum(losses.values()), list(twin.parameters()), retain_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    mtl_backward(list(losses.values()), features=z)
    jac_to_grad(twin.encoders.parameters(), UPGrad())
    alone = gradients(twin)
    expected = {name: alone[name] + r for name, r in zip(alone, added, strict=True)}
    losses, z = network.losses(*batch)
    rep_mtl_backward(losses, form(z), RepMTL(**STRONG))
    jac_to_grad(network.encoders.parameters(), UPGrad())
    assert_same_gradients(network, expected, rtol=1e-9, atol=1e-12)
    assert all(r.norm() > 1e-4 * g.norm() for g, r in zip(alone.values(), added, strict=True))


@pytest.mark.parametrize("options", ({"start": 1}, {"lambda_tsr": 1e-12, "lambda_csa": 1e-12}))
def test_features_that_all_tasks_share_without_a_regulariser(shared, options):
    network, batch = shared
    twin = copy.deepcopy(network)
    losses, z = twin.losses(*batch)
    mtl_backward(list(losses.values()), features=z)
    jac_to_grad(twin.encoders.parameters(), UPGrad())
    losses, z = network.losses(*batch)
    rep_mtl_backward(losses, z, RepMTL(**options))
    jac_to_grad(network.encoders.parameters(), UPGrad())
    assert_same_gradients(network, gradients(twin), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("start", (0, 1))
def test_features_that_are_made_from_each_other_are_refused(start):
    layer = nn.Linear(5, 6)
    second = layer(torch.randn(8, 5))
    first = second.tanh()
    losses = [(first * second).mean(), first.square().mean()]
    for features in ([first, second], Levels(p3=first, p4=second)):
        with pytest.raises(ValueError, match="features: expected .* none is made from another"):
            rep_mtl_backward(losses, features, RepMTL(**STRONG, start=start))


def test_features_of_one_task_each_have_a_name_of_their_own(network, batch):
    losses, z = network.multi_input_losses(*batch)
    rep_mtl_backward(losses, z, RepMTL(**STRONG), retain_graph=True)
    jac_to_grad(network.encoder.parameters(), UPGrad())
    expected = {name: grad.clone() for name, grad in gradients(network).items()}
    for task_losses, features in ((losses, z), (list(losses.values()), list(z.values()))):
        network.zero_grad()
        rep_mtl_backward_multi_input(task_losses, features, RepMTL(**STRONG), retain_graph=True)
        jac_to_grad(network.encoder.parameters(), UPGrad())
        assert_same_gradients(network, expected, **TIGHT)


def test_the_step_is_passed_on(network, batch):
    criterion, applied = RepMTL(**STRONG, every=2), []
    for step in (0, 0, 1, 1, 2):
        losses, z = network.losses(*batch)
        rep_mtl_backward(losses, z, criterion, step=step)
        applied.append(criterion.last.applied)
    assert applied == [True, True, False, False, True]


def test_backward_passes(network, batch):
    """A head has two passes: its saliency and a merged one. The encoder has one more than T."""
    passes = {"heads": 0, "encoder": 0}

    def counted(module, name):
        def hook(_module, _inputs, output):
            def count(grad):
                passes[name] += 1

            output.register_hook(count)

        module.register_forward_hook(hook)

    for head in network.heads.values():
        counted(head, "heads")
    counted(network.encoder[0], "encoder")
    losses, z = network.losses(*batch)
    rep_mtl_backward(losses, z, settled(RepMTL(**STRONG)), parallel_chunk_size=1)
    assert passes == {"heads": 2 * 3, "encoder": 1 + 3}


def test_graph_is_retained_on_request(network, batch):
    losses, z = network.losses(*batch)
    rep_mtl_backward(losses, z, RepMTL(**STRONG), retain_graph=True)
    rep_mtl_backward(losses, z, RepMTL(**STRONG))
    with pytest.raises(RuntimeError, match="second time"):
        sum(losses.values()).backward()


def test_no_hook_stays_on_the_features(network, batch):
    losses, z = network.losses(*batch)
    with pytest.raises(ValueError, match="losses"):
        rep_mtl_backward({**losses, "b": losses["b"].detach()}, z, RepMTL(**STRONG))
    rep_mtl_backward(losses, z, RepMTL(**STRONG), retain_graph=True)
    again, fresh = network.losses(*batch)
    torch.testing.assert_close(
        torch.autograd.grad(losses["a"], z), torch.autograd.grad(again["a"], fresh), **TIGHT
    )


def test_what_the_criterion_refuses(network, batch):
    losses, z = network.losses(*batch)
    with pytest.raises(TypeError, match="losses: expected a list or dict .* one Tensor"):
        rep_mtl_backward(torch.stack(list(losses.values())), z, RepMTL())
    with pytest.raises(ValueError, match="representation: expected the keys of losses"):
        rep_mtl_backward(losses, {"a": z}, RepMTL())
    for bad in (None, 3, [], [None], "z"):
        with pytest.raises((TypeError, ValueError), match="features: expected a Tensor or several"):
            rep_mtl_backward(losses, bad, RepMTL())
    for bad in (z, Levels(z)):
        with pytest.raises(TypeError, match="features: expected a list, tuple or dict"):
            rep_mtl_backward_multi_input(losses, bad, RepMTL())
    with pytest.raises(ValueError, match="features: expected another representation"):
        rep_mtl_backward(losses, dict.fromkeys(TASKS, z), RepMTL())
    with pytest.raises(ValueError, match="criterion: expected one without a scaler"):
        rep_mtl_backward(losses, z, RepMTL(scaler=torch.amp.GradScaler("cpu")))
