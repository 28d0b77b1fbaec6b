"""Autocast, 16-bit heads and GradScaler: the dtype of results, and underflow in float16."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BACKENDS, DEVICE, relative_error
from torch import Tensor, nn

from repmtl_kernels import RepMTL, reference, task_saliencies
from repmtl_kernels._training.progress import NO_STEP

TASKS = 3
BACKENDS = ["reference", *BACKENDS]
SIXTEEN = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 0.08, torch.float16: 0.03}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 3)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 6, 3), nn.Softplus(), nn.Conv2d(6, 2, 1))
            for _ in range(TASKS)
        )

    def losses(self, z: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
        """Return mean losses, which are float32 under autocast as PyTorch's are."""
        return [
            scale * (head(z) - y).square().float().mean()
            for head, y in zip(self.heads, targets, strict=True)
        ]


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().to(DEVICE)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, 12, 12, device=DEVICE)
    return x, torch.randn(TASKS, 4, 2, 8, 8, device=DEVICE)


def train(network, batch, criterion, dtype=None, *, scaler=None, small=1.0):
    """Return the gradients of one step of a copy, without the scale, and the representation.

    ``small`` scales the losses, for saliencies that are too small for float16.
    """
    network = copy.deepcopy(network)
    x, targets = batch
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        z = network.encoder(x)
        total = criterion(network.losses(z, targets, small), z)
    (total if scaler is None else scaler.scale(total)).backward()
    grads = [p.grad for p in network.parameters()]
    if scaler is not None:
        scale = torch.full((), scaler.get_scale(), device=DEVICE)
        grads = [g / scale for g in grads]
    return grads, z


def check_scalars(criterion: RepMTL) -> None:
    last = criterion.last
    for name in ("total", "tsr", "csa", "regularizer", "ratio"):
        value = getattr(last, name)
        assert value.dtype == torch.float32 and value.shape == (), name


@pytest.mark.cell("`RepMTL`, float32 heads under bfloat16 autocast")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast(network: Network, batch, backend: str):
    check_autocast(network, batch, torch.bfloat16, backend, None)


@pytest.mark.cell("`RepMTL(scaler=)`, float32 heads under float16 autocast")
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_autocast_with_a_scaler(network: Network, batch, backend: str):
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    check_autocast(network, batch, torch.float16, backend, scaler)


def check_autocast(network, batch, dtype, backend, scaler) -> None:
    plain = RepMTL(0.5, 0.5, backend="eager")
    exact, _ = train(network, batch, plain)
    criterion = RepMTL(0.5, 0.5, backend=backend, scaler=scaler)
    grads, z = train(network, batch, criterion, dtype, scaler=scaler)
    assert z.dtype == dtype
    assert all(g.dtype == torch.float32 for g in grads)
    check_scalars(criterion)
    last = criterion.last
    assert all(loss.dtype == torch.float32 for loss in last.losses.values())
    if dtype == torch.float16:
        assert list(last.underflow) == list(last.losses)
        assert all(share.dtype == torch.float32 for share in last.underflow.values())
    else:
        assert last.underflow is None
    assert relative_error(grads, [g.double() for g in exact]) < TOLERANCE[dtype]
    # The reference computes in the dtype of the saliencies, the others in float32.
    close = 0.02 if backend == "reference" else 5e-3
    assert abs(last.tsr - plain.last.tsr) < close and abs(last.csa - plain.last.csa) < close


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_saliencies_have_the_dtype_of_the_representation(network: Network, batch, dtype):
    x, targets = batch
    for inside in (False, True):
        with torch.autocast(DEVICE, dtype=dtype, enabled=inside):
            z = network.encoder(x)
        with torch.autocast(DEVICE, dtype=dtype):
            saliencies = task_saliencies(network.losses(z, targets), z)
        assert z.dtype == (dtype if inside else torch.float32)
        assert all(s.dtype == z.dtype for s in saliencies)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_losses_are_those_of_the_saliencies_in_float64(network, batch, backend, dtype):
    """Under autocast, only the saliencies are rounded; means and similarities are float32."""
    x, targets = batch
    with torch.autocast(DEVICE, dtype=dtype):
        z = network.encoder(x)
        losses = network.losses(z, targets)
        criterion = RepMTL(0.5, 0.5, backend=backend)
        criterion(losses, z)
        exact = [s.detach().double() for s in task_saliencies(losses, z)]
    assert abs(criterion.last.tsr - reference.tsr_loss(exact)) < 3e-4
    assert abs(criterion.last.csa - reference.csa_loss(exact)) < 3e-4


@pytest.mark.cell("`RepMTL`, bfloat16 heads without autocast")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_heads(network: Network, batch, backend: str):
    exact, _ = train(network, batch, RepMTL(0.5, 0.5, backend="eager"))
    exact = [g.double() for g in exact]
    network = network.bfloat16()
    # Some CPUs also sum in bfloat16, and the heads alone are then further off.
    literal = train_bfloat16(copy.deepcopy(network), batch, RepMTL(0.5, 0.5, backend="reference"))
    limit = max(TOLERANCE[torch.bfloat16], 1.1 * relative_error(literal, exact))
    grads = train_bfloat16(network, batch, RepMTL(0.5, 0.5, backend=backend))
    assert all(g.dtype == torch.bfloat16 for g in grads)
    assert relative_error(grads, exact) < limit < 0.2


def train_bfloat16(network: Network, batch, criterion: RepMTL) -> list[Tensor]:
    """Return the gradients of one step in which all but the criterion is in bfloat16."""
    x, targets = batch
    z = network.encoder(x.bfloat16())
    losses = [loss.bfloat16() for loss in network.losses(z, targets.bfloat16())]
    total = criterion(losses, z)
    total.backward()
    check_scalars(criterion)
    assert z.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert all(loss.dtype == torch.bfloat16 for loss in criterion.last.losses.values())
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize("log_losses", [False, True])
def test_losses_of_16_bits_are_summed_in_float32(log_losses: bool):
    """In bfloat16 the second loss would be lost, with or without the regulariser."""
    z = torch.ones(2, 3, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    losses = [n * z.square().mean() for n in (256, 0.5)]
    criterion = RepMTL(0.5, 0.5, start=1, log_losses=log_losses)
    values = torch.tensor([256.0, 0.5], device=DEVICE)
    for mode in (True, False):
        total = criterion.train(mode)(losses, z)
        assert total.dtype == criterion.last.total.dtype == torch.float32
        torch.testing.assert_close(total, values.log().sum() if log_losses else values.sum())


@pytest.mark.parametrize("double", ["losses", "representation"])
def test_float64_stays(double: str):
    z = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    z = z.double() if double == "representation" else z
    losses = [(z * (t + 1)).sin().sum() for t in range(2)]
    losses = [x.double() if double == "losses" else x.float() for x in losses]
    criterion = RepMTL(0.5, 0.5, backend="eager")
    assert criterion(losses, z).dtype == torch.float64
    expected = torch.float64 if double == "representation" else torch.float32
    assert criterion.last.tsr.dtype == criterion.last.csa.dtype == expected


# --- GradScaler ---


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_scaler_prevents_underflow(network: Network, batch, backend: str):
    """Without the scaler the saliencies are subnormal, and the scaled gradient overflows."""
    exact, _ = train(network, batch, plain := RepMTL(0.5, 0.5, backend="eager"), small=1e-3)
    results = {}
    for name in ("scaler", "none"):
        scaler = torch.amp.GradScaler(DEVICE)
        criterion = RepMTL(0.5, 0.5, backend=backend, scaler=scaler if name == "scaler" else None)
        grads, _ = train(network, batch, criterion, torch.float16, scaler=scaler, small=1e-3)
        results[name] = relative_error(grads, [g.double() for g in exact]), criterion.last
    error, last = results["scaler"]
    assert error < TOLERANCE[torch.float16]
    torch.testing.assert_close(last.total, plain.last.total, rtol=1e-3, atol=0)
    torch.testing.assert_close(last.ratio, plain.last.ratio, rtol=0.02, atol=0)
    assert max(last.underflow.values()) < 0.2
    error, last = results["none"]
    assert not error < 0.5
    assert min(last.underflow.values()) > 0.9


OPTIONS = {
    "lambdas": {"lambda_tsr": 0.5, "lambda_csa": 0.5},
    "strength": {"strength": 0.2, "every": 1, "clip": 1.5},
    "weights": {"lambda_tsr": 0.5, "lambda_csa": 0.5, "task_weights": [1, 2, 0.5]},
    "log": {"lambda_tsr": 0.5, "lambda_csa": 0.5, "log_losses": True, "tsr_floor": 0.1},
    "softmax": {
        "lambda_tsr": 9.0,
        "normalizer": "softmax",
        "over": "space",
        "tsr_temperature": 1e-3,
    },
    "eps": {"lambda_tsr": 0.5, "lambda_csa": 0.5, "eps": 1e-4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scaler_changes_nothing_in_float32(network: Network, batch, name: str):
    """There are two steps, because the second uses observations of the first."""
    scaler = torch.amp.GradScaler(DEVICE)
    with_scaler = RepMTL(**OPTIONS[name], scaler=scaler, backend="eager")
    without = RepMTL(**OPTIONS[name], backend="eager")
    for _ in range(2):
        grads, _ = train(network, batch, with_scaler, scaler=scaler)
        expected, _ = train(network, batch, without)
        assert relative_error(grads, [g.double() for g in expected]) < 1e-5
        for value in ("total", "tsr", "csa", "regularizer", "ratio"):
            scaled, exact = getattr(with_scaler.last, value), getattr(without.last, value)
            torch.testing.assert_close(scaled, exact, rtol=1e-5, atol=0)


def test_the_regularizer_counts_in_the_tests_of_options(network: Network, batch):
    """The comparison above would fail if the scale were not divided out."""
    plain, _ = train(network, batch, RepMTL(0, 0))
    for options in OPTIONS.values():
        grads, _ = train(network, batch, RepMTL(**options, backend="eager"))
        assert relative_error(grads, [g.double() for g in plain]) > 1e-4


def test_scaler_that_is_disabled(network: Network, batch):
    scaler = torch.amp.GradScaler(DEVICE, enabled=False)
    grads, _ = train(network, batch, RepMTL(0.5, 0.5, scaler=scaler))
    expected, _ = train(network, batch, RepMTL(0.5, 0.5))
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


def test_scaled_saliencies_that_overflow_skip_the_step(network: Network, batch):
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**30)
    criterion = RepMTL(strength=0.1, scaler=scaler)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = copy.deepcopy(network.state_dict())
    x, targets = batch
    with torch.autocast(DEVICE, dtype=torch.float16):
        z = network.encoder(x)
        total = criterion(network.losses(z, targets), z)
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    assert total.isnan() and scaler.get_scale() == 2.0**29
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    # The call counts, there is no observation, and the call named no step.
    assert criterion.get_extra_state().tolist() == [1, 0, 0, 0, 0, NO_STEP]


# --- underflow ---


@pytest.mark.parametrize("keyed", [False, True])
def test_underflow_by_hand(keyed: bool):
    """One task has 3 of 8 elements that are zero or subnormal, the other has none."""
    z = torch.randn(2, 4, device=DEVICE, dtype=torch.float16).requires_grad_()
    tiny = torch.finfo(torch.float16).tiny
    factors = torch.tensor([0, tiny / 2, -tiny / 4, tiny, -tiny, 1, 2, -3], device=DEVICE)
    losses = [(z * f.half().view(2, 4)).sum() for f in (factors, factors.sign() + 0.5)]
    criterion = RepMTL(0.5, 0.5)
    with pytest.warns(UserWarning, match="means over the channels are zero but for rounding"):
        criterion({"a": losses[0], "b": losses[1]} if keyed else [losses[0], None, losses[1]], z)
    shares = criterion.last.underflow
    assert {t: s.item() for t, s in shares.items()} == (
        {"a": 0.375, "b": 0.0} if keyed else {0: 0.375, 2: 0.0}
    )


def test_underflow_behind_a_float32_representation(network: Network, batch):
    """Under float16 autocast, heads lose small gradients before the cast back to float32."""
    x, targets = batch
    z = network.encoder(x)
    criterion = RepMTL(0.5, 0.5)
    with torch.autocast(DEVICE, dtype=torch.float16):
        criterion(network.losses(z, targets, 1e-6), z)
    assert z.dtype == torch.float32 and min(criterion.last.underflow.values()) > 0.9
    criterion(network.losses(z, targets, 1e-6), z)
    assert criterion.last.underflow is None


def test_underflow_is_not_read_on_the_host(network: Network, batch):
    """Tensors on the meta device have no values."""
    x, targets = (value.to("meta").half() for value in batch)
    network = network.to("meta").half()
    z = network.encoder(x)
    criterion = RepMTL(strength=0.1, backend="eager")
    criterion(network.losses(z, targets), z).backward()
    assert all(share.is_meta for share in criterion.last.underflow.values())


@pytest.mark.parametrize("scaler", [65536.0, "auto", torch.amp.GradScaler])
def test_message_for_a_bad_scaler(scaler):
    with pytest.raises(TypeError, match="scaler: expected a torch.amp.GradScaler or None, got"):
        RepMTL(scaler=scaler)
