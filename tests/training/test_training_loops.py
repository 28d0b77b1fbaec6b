"""The criterion in loops that people write: calls of one step, replicas, dry runs, first calls."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from repmtl_kernels import RepMTL, SecondDerivativeError, rep_mtl_loss, second_order

LAMBDAS = {"lambda_tsr": 0.9, "lambda_csa": 0.7}


def losses_of(z: Tensor) -> list[Tensor]:
    return [(z**3).mean(), z.sin().mean()]


def call(criterion: RepMTL, seed: int = 0, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 3, 5, generator=generator).to(DEVICE).requires_grad_()
    total = criterion(losses_of(z), z, **options)
    total.backward()
    return total.detach()


def weight(criterion: RepMTL) -> float:
    last = criterion.last
    return (last.regularizer / (0.5 * (last.tsr + last.csa))).item()


# --- several calls of one step ---


@pytest.mark.parametrize("passes", (1, 2, 5))
@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({"every": 2}, [1, 0, 1, 0, 1, 0]),
        ({"every": 3}, [1, 0, 0, 1, 0, 0]),
        ({"start": 2}, [0, 0, 1, 1, 1, 1]),
        ({"start": 1, "every": 2}, [0, 1, 0, 1, 0, 1]),
    ),
    ids=str,
)
def test_calls_of_one_step_are_one(options: dict, expected: list, passes: int) -> None:
    criterion = RepMTL(**LAMBDAS, **options)
    for step, applied in enumerate(expected):
        for _ in range(passes):
            entered = criterion.second_order(step=step)
            call(criterion, step=step)
            assert criterion.last.applied is bool(applied)
            assert isinstance(entered, type(second_order())) is bool(applied)
    assert criterion.get_extra_state()[0] == len(expected)


def test_ramp_goes_by_steps() -> None:
    criterion = RepMTL(**LAMBDAS, ramp=4)
    for step in range(5):
        found = []
        for _ in range(3):
            call(criterion, step=step)
            found.append((criterion.last.regularizer / criterion.last.tsr).item())
        assert found == found[:1] * 3
        share = min(1.0, (step + 1) / 4)
        last = criterion.last
        expected = share * (0.9 * last.tsr + 0.7 * last.csa)
        torch.testing.assert_close(last.regularizer, expected)


def test_one_weight_and_one_measurement_a_step() -> None:
    criterion, found = RepMTL(strength=0.3), []
    for step in range(3):
        for half in range(4):
            call(criterion, seed=10 * step + half, step=step)
            found.append(weight(criterion))
    for step in range(3):
        assert found[4 * step : 4 * step + 4] == pytest.approx([found[4 * step]] * 4, rel=1e-6)
    assert max(found[::4]) > 1.01 * min(found[::4])
    alone = RepMTL(strength=0.3)
    for step in range(3):
        call(alone, seed=10 * step)
        assert weight(alone) == pytest.approx(found[4 * step], rel=1e-6)


def test_resumed_in_the_middle_of_a_step() -> None:
    def run(criterion: RepMTL, first: int, last: int) -> list[tuple]:
        found = []
        for i in range(first, last):
            call(criterion, seed=i, step=i // 3)
            found.append((criterion.last.applied, criterion.last.total.item()))
        return found

    whole = run(RepMTL(every=2, strength=0.3, clip=1.0), 0, 12)
    for cut in (1, 2, 3, 4, 8):
        first, resumed = (RepMTL(every=2, strength=0.3, clip=1.0) for _ in range(2))
        assert run(first, 0, cut) == whole[:cut]
        resumed.load_state_dict(first.state_dict())
        assert run(resumed, cut, 12) == whole[cut:]


def test_step_numbers_are_the_users() -> None:
    """Only whether one is that of the call before counts; without one every call is a step."""
    criterion, found = RepMTL(every=2), []
    for step in (7, 7, 3, 3, None, None, 100, 100, 7):
        call(criterion, step=step)
        found.append(criterion.last.applied)
    assert found == [True, True, False, False, True, False, True, True, False]
    call(criterion, step=np.int64(7))
    assert criterion.get_extra_state()[0] == 6  # that of the call before
    for bad, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="step: expected"):
            call(criterion, step=bad)


def test_lbfgs_closure() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(3, 4).to(DEVICE)
    x = torch.randn(5, 3, device=DEVICE)
    criterion = RepMTL(**LAMBDAS, every=2)
    optimizer = torch.optim.LBFGS(encoder.parameters(), max_iter=4)
    applied = []
    for step in range(4):

        def closure(step=step) -> Tensor:
            optimizer.zero_grad()
            z = encoder(x)
            total = criterion(losses_of(z), z, step=step)
            total.backward()
            applied.append((step, criterion.last.applied))
            return total

        optimizer.step(closure)
    assert len(applied) > 8
    assert all(on is (step % 2 == 0) for step, on in applied)


# --- replicas ---


def test_replicas_share_their_state() -> None:
    """One forward of ``nn.DataParallel`` is one call, whatever its threads do."""

    def run(order: list[int]) -> tuple[list, list]:
        criterion = RepMTL(start=1, every=2, strength=0.3, clip=1.0)
        applied, totals = [], []
        for step in range(6):
            replicas = [criterion._replicate_for_data_parallel() for _ in range(3)]
            threads = [
                threading.Thread(target=call, args=(replicas[i], 3 * step + i)) for i in order
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len({replica.last.applied for replica in replicas}) == 1
            applied.append(criterion.last.applied)
            totals.append([replica.last.total.item() for replica in replicas])
        assert criterion.last is replicas[0].last
        state = criterion.get_extra_state()
        assert state[0] == 6 and state[1] > 0
        assert applied == [False, True] * 3
        return totals, state.tolist()

    expected = run([0, 1, 2])
    for order in ([2, 1, 0], [1, 0, 2], [0, 1, 2]):
        assert run(order) == expected


def test_a_forward_pass_that_fails_is_no_call() -> None:
    criterion = RepMTL(start=1)
    for _ in range(2):
        replica = criterion._replicate_for_data_parallel()
        with pytest.raises(TypeError):
            replica(3, None)
        del replica
    replicas = [criterion._replicate_for_data_parallel() for _ in range(2)]
    call(replicas[1])
    call(replicas[0])
    assert criterion.get_extra_state()[0] == 1


def test_replicas_that_are_given_the_step() -> None:
    criterion, applied = RepMTL(every=2), []
    for step in range(4):
        for _ in range(2):
            for replica in [criterion._replicate_for_data_parallel() for _ in range(2)]:
                call(replica, step=step)
        applied.append(criterion.last.applied)
    assert applied == [True, False] * 2


def test_copies_go_their_own_way() -> None:
    criterion = RepMTL(every=2, strength=0.3, clip=2.0)
    call(criterion)
    state = criterion.get_extra_state()
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied.get_extra_state(), state)
        call(copied)
        assert not copied.last.applied and criterion.last.applied
        assert torch.equal(criterion.get_extra_state(), state)


# --- dry runs ---


def training_step(criterion: RepMTL, encoder: nn.Module, x: Tensor, step: int | None = None):
    z = encoder(x)
    with criterion.second_order(step):
        losses = [z.square().mean(), (z.sin() * z).mean()]
    total = criterion(losses, z, step=step)
    total.backward()
    return total


OPTIONS = (
    {},
    {"strength": 0.3, "clip": 2.0},
    {"every": 2},
    {"start": 1},
    {**LAMBDAS, "eps": 1e-6, "normalizer": "softmax"},
    {"scaler": torch.amp.GradScaler(DEVICE)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "default")
@pytest.mark.parametrize("dry", ("meta", "fake"))
@pytest.mark.parametrize("backend", ("auto", "eager", "reference"))
def test_a_dry_run_leaves_no_trace(options: dict, dry: str, backend: str) -> None:
    torch.manual_seed(0)
    encoder = nn.Conv2d(3, 6, 3).to(DEVICE)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    found = []
    for dry_runs in (0, 1, 3):
        criterion = RepMTL(**options, backend=backend)
        state = criterion.get_extra_state()
        for i in range(dry_runs):
            if dry == "meta":
                total = training_step(
                    criterion, nn.Conv2d(3, 6, 3, device="meta"), x.to("meta"), step=i
                )
                assert total.is_meta and criterion.last.total.is_meta
            else:
                with FakeTensorMode(allow_non_fake_inputs=False):
                    fake = nn.Conv2d(3, 6, 3, device=DEVICE)
                    total = training_step(criterion, fake, torch.randn(4, 3, 8, 8, device=DEVICE))
                assert total.shape == () and total.dtype == torch.float32
            assert torch.equal(criterion.get_extra_state(), state)
        found.append([training_step(criterion, encoder, x).item() for _ in range(3)])
        assert criterion.get_extra_state()[0] == 3
    assert found[0] == found[1] == found[2]


def test_a_dry_run_in_the_middle() -> None:
    totals = []
    for dry in (False, True):
        criterion = RepMTL(every=2, strength=0.3, clip=2.0)
        found = []
        for seed in range(4):
            found.append(call(criterion, seed).item())
            if dry:
                training_step(criterion, nn.Conv2d(3, 6, 3, device="meta"), torch.randn(
                    4, 3, 8, 8, device="meta"
                ))  # fmt: skip
        totals.append(found)
    assert totals[0] == totals[1]


def test_counting_flops_is_an_ordinary_step() -> None:
    criterion, encoder = RepMTL(**LAMBDAS, every=2), nn.Conv2d(3, 6, 3).to(DEVICE)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        training_step(criterion, encoder, x)
    assert criterion.last.applied and counter.get_total_flops() > 0
    training_step(criterion, encoder, x)
    assert not criterion.last.applied


@pytest.mark.parametrize("backend", ("eager", "auto", "reference"))
def test_losses_of_fake_tensors(backend: str) -> None:
    with FakeTensorMode():
        s = [torch.randn(4, 3, 5, 6, device=DEVICE, requires_grad=True) for _ in range(2)]
        found = rep_mtl_loss(s, backend=backend)
        assert found.total.shape == () and found.total.dtype == torch.float32
        grads = torch.autograd.grad(found.total, s)
        assert [g.shape for g in grads] == [x.shape for x in s]


# --- the first call ---


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).mT


def ctc(y: Tensor) -> Tensor:
    log_p = y.flatten(2).permute(2, 0, 1).log_softmax(-1)
    size = len(y)
    return F.ctc_loss(
        log_p, torch.ones(size, 2).long(), torch.full((size,), len(log_p)), torch.full((size,), 2)
    )


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.detach() * (1 - x.detach().tanh() ** 2)


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return RaisesTwice.apply(grad)


class RaisesAnything(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.numpy() * (1 - np.tanh(x.detach().numpy()) ** 2))


class RefusesTwice(torch.autograd.Function):
    """As roi_align's backward: its second derivative is for the head's parameters alone."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return RaisesTwice.apply(grad) * 2


class RaisesTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad):
        return grad.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("not twice")


# Operations between z and a loss, on `(B, 4, 6, 6)`.
NOT_TWICE = {
    "hardsigmoid": F.hardsigmoid,
    "cdist": lambda y: torch.cdist(tokens(y), tokens(y) + 1),
    "ctc_loss": ctc,
    "multi_margin_loss": lambda y: F.multi_margin_loss(y.flatten(1), torch.zeros(len(y)).long()),
    "multilabel_margin_loss": lambda y: F.multilabel_margin_loss(
        y.flatten(1), torch.zeros(y.flatten(1).shape).long()
    ),
    "segment_reduce": lambda y: torch.segment_reduce(
        y.flatten(), "sum", lengths=torch.tensor([y.numel()])
    ),
    "embedding_bag": lambda y: F.embedding_bag(
        torch.arange(4)[None], tokens(y).flatten(0, 1), mode="mean"
    ),
    "hardswish's neighbour, a custom Function": Detached.apply,
    "a custom Function that raises": Raises.apply,
    "fractional_max_pool2d": lambda y: F.fractional_max_pool2d(y, 2, output_size=3),
    "pdist": lambda y: torch.pdist(y.flatten(1)),
}


def is_not_twice(operation) -> bool:
    """Some gain a second derivative with newer versions of PyTorch."""
    y = torch.randn(4, 4, 6, 6, requires_grad=True)
    (first,) = torch.autograd.grad(operation(y * 1).square().mean(), y, create_graph=True)
    if not first.requires_grad:
        return True
    try:
        torch.autograd.grad(first.square().sum(), y, allow_unused=True)
    except (RuntimeError, ValueError):
        return True
    return operation is Detached.apply


@pytest.mark.parametrize("start", (0, 3))
@pytest.mark.parametrize("name", NOT_TWICE)
def test_the_first_call_finds_any_operation(name: str, start: int) -> None:
    torch.manual_seed(0)
    operation = NOT_TWICE[name]
    if not is_not_twice(operation):
        pytest.skip("this PyTorch can differentiate it twice")
    encoder, head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
    z = encoder(torch.randn(4, 3, 8, 8))
    losses = {"plain": head(z).square().mean(), "bad": operation(head(z)).square().mean()}
    for criterion in (RepMTL(start=start), RepMTL(**LAMBDAS, start=start, every=2)):
        with pytest.raises(SecondDerivativeError, match=r"losses\['bad'\]: .*Use|Write") as raised:
            criterion(losses, z)
        assert "plain" not in str(raised.value)
        assert criterion.get_extra_state()[0] == 0


def test_the_first_call_finds_what_only_parameters_would_meet() -> None:
    """The saliency is piecewise constant in z, but not in the weights behind the operation."""
    torch.manual_seed(0)
    z, layer = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8)), nn.Linear(4 * 36, 3)
    for loss in (lambda y: (1 - y).clamp(min=0).mean(), lambda y: y.mean()):
        losses = {"plain": z.square().mean(), "bad": loss(layer(RefusesTwice.apply(z).flatten(1)))}
        with pytest.raises(SecondDerivativeError, match=r"losses\['bad'\]: .*RaisesTwice|Refuses"):
            RepMTL(start=2)(losses, z)
        with pytest.raises(SecondDerivativeError, match="Refuses|RaisesTwice"):
            RepMTL.check(lambda z, loss=loss: loss(layer(RefusesTwice.apply(z).flatten(1))), z)


def test_the_first_call_names_errors_of_the_first_derivative_under_a_graph() -> None:
    z = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8))
    losses = [z.square().mean(), RaisesAnything.apply(z).square().mean()]
    with pytest.raises(SecondDerivativeError, match=r"losses\[1\]: .*RaisesAnything"):
        RepMTL(start=9)(losses, z)


def test_the_first_call_of_each_task_counts() -> None:
    criterion = RepMTL(start=9)
    for present in (True, False):
        z = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8))
        losses = [z.square().mean(), F.hardsigmoid(z).square().mean()]
        if present:
            criterion([losses[0], None], z)
        else:
            with pytest.raises(SecondDerivativeError, match=r"losses\[1\]: .*[Hh]ardsigmoid"):
                criterion(losses, z)


class Both(torch.autograd.Function):
    """Two results, as DistributedDataParallel passes them on."""

    @staticmethod
    def forward(ctx, a, b):
        return a.clone(), b.clone()

    @staticmethod
    def backward(ctx, da, db):
        return da, db


def test_a_result_that_counts_linearly_is_no_fault() -> None:
    torch.manual_seed(0)
    z = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8))
    a, b = Both.apply(nn.Conv2d(4, 2, 1)(z), nn.Conv2d(4, 2, 1)(z))
    assert RepMTL()([(1 - a).clamp(min=0).mean() + b.square().mean(), z.tanh().mean()], z)


def test_an_operator_without_a_derivative_of_its_backward_is_found() -> None:
    library = torch.library.Library("repmtl_test_loops", "FRAGMENT")
    library.define("backward(Tensor g, Tensor x) -> Tensor")
    own_kernel = lambda g, x: torch.from_numpy(g.detach().numpy() * np.cos(x.detach().numpy()))  # noqa: E731
    library.impl("backward", own_kernel, "CPU")

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return torch.ops.repmtl_test_loops.backward(grad, *ctx.saved_tensors)

    z = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8))
    with pytest.raises(SecondDerivativeError, match=r"losses\[0\]: .*Own"):
        RepMTL()([Own.apply(z).square().mean(), z.tanh().mean()], z)


@pytest.mark.parametrize("export", (False, True), ids=("compile", "export"))
@pytest.mark.parametrize("options", ({}, {"log_losses": True, "log_offset": 0.1}), ids=str)
def test_evaluation_compiles(options: dict, export: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.criterion = nn.Linear(3, 4), RepMTL(**options)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            return self.criterion([z.square().mean(), z.sin().square().mean()], z)

    model, x = Model().eval(), torch.randn(5, 3)
    if export:
        found = torch.export.export(model, (x,), strict=True).module()(x)
    else:
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize(
    "operation",
    (F.relu, F.gelu, F.hardswish, F.softplus, torch.abs, torch.sort, F.max_pool2d, torch.round),
    ids=lambda f: f.__name__,
)
def test_the_first_call_takes_what_has_one(operation) -> None:
    torch.manual_seed(0)
    z = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8))
    y = operation(z, 2) if operation is F.max_pool2d else operation(z)
    y = y[0] if isinstance(y, tuple) else y
    losses = [(y * z.mean()).square().mean(), z.square().mean(), (y.mean() * z).mean()]
    RepMTL()(losses, z).backward()


def test_a_loss_whose_graph_is_gone_says_so() -> None:
    z = nn.Conv2d(3, 4, 3)(torch.randn(4, 3, 8, 8))
    losses = losses_of(z)
    sum(losses).backward()
    with pytest.raises(RuntimeError, match="second time") as raised:
        RepMTL()(losses, z)
    assert not isinstance(raised.value, SecondDerivativeError)


def test_the_first_call_leaves_gradients_and_hooks_alone() -> None:
    torch.manual_seed(0)
    encoder, head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
    for p in (*encoder.parameters(), *head.parameters()):
        p.register_hook(lambda grad: pytest.fail("a parameter's gradient was computed"))
    z = encoder(torch.randn(4, 3, 8, 8))
    z.register_hook(lambda grad: pytest.fail("a gradient passed z"))
    z.retain_grad()
    RepMTL(start=1)([head(z).square().mean(), head(z).tanh().mean()], z)
    assert z.grad is None


# --- messages ---


@pytest.mark.parametrize(
    "make",
    (
        lambda h, z: torch.zeros((), requires_grad=True),
        lambda h, z: torch.zeros(()),
        lambda h, z: h.weight.square().sum() * 0,
        lambda h, z: h(z.detach()).square().mean() * 0,
        lambda h, z: torch.zeros((), requires_grad=True) * 1,
    ),
    ids=("leaf", "constant", "penalty", "detached", "not a leaf"),
)
def test_a_task_without_labels_is_told_of_none(make) -> None:
    z, head = nn.Conv2d(3, 4, 1)(torch.randn(4, 3, 5, 5)), nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match=r"losses\[1\]: .*labels.* pass None") as raised:
        RepMTL()([head(z).square().mean(), make(head, z)], z)
    assert "representation" in str(raised.value) or "graph" in str(raised.value)


def test_copies_of_a_prepared_model_are_told() -> None:
    """Accelerate's mixed precision returns float32 copies of a model's results."""
    encoder, head = nn.Conv2d(3, 4, 1).bfloat16(), nn.Conv2d(4, 3, 1).bfloat16()
    z = encoder(torch.randn(4, 3, 5, 5).bfloat16())
    prediction = head(z)
    with pytest.raises(ValueError, match="copy in torch.float32.*Accelerate.*one by one"):
        RepMTL()([prediction.float().square().mean()] * 2, z.float())
    z = z.float()  # heads that are prepared on their own get the copy
    assert RepMTL()([head(z.bfloat16()).float().square().mean() for _ in range(2)], z).isfinite()


# --- padding ---


def padded_step(width: int, dtype: torch.dtype, **options) -> tuple[Tensor, list[Tensor], RepMTL]:
    """Sequences of 8, 5, 6 and 3 tokens, padded to a width; padding has garbage in it."""
    torch.manual_seed(0)
    encoder = nn.Linear(5, 8).to(DEVICE, dtype)
    heads = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(3)
    ).to(DEVICE, dtype)
    x = torch.randn(4, 8, 5).to(DEVICE, dtype)
    there = torch.arange(width) < torch.tensor([8, 5, 6, 3])[:, None]
    there = there.to(DEVICE)
    padding = torch.full((4, width - 8, 5), 3.0, dtype=dtype, device=DEVICE)
    z = encoder(torch.cat([x, padding], 1))
    mask = there[:, :, None].to(dtype)
    losses = [((head(z) - t).square() * mask).sum() / mask.sum() for t, head in enumerate(heads)]
    criterion = RepMTL(channel_dim=-1, **options)
    total = criterion(losses, z, positions=there)
    parameters = [*encoder.parameters(), *heads.parameters()]
    return total.detach(), torch.autograd.grad(total, parameters, materialize_grads=True), criterion


@pytest.mark.parametrize(
    "options",
    (
        LAMBDAS,
        {"strength": 0.3, "clip": 2.0},
        {**LAMBDAS, "over": "space", "normalizer": "softmax", "tsr_temperature": 0.01},
        {**LAMBDAS, "tsr_floor": 0.1, "lambda_csa": 0.0},
    ),
    ids=("plain", "strength", "space", "floor"),
)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_padding_wider_changes_nothing(options: dict, dtype: torch.dtype) -> None:
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    total, grads, criterion = padded_step(8, dtype, **options)
    for width in (9, 16, 40):
        other, other_grads, wider = padded_step(width, dtype, **options)
        torch.testing.assert_close(other, total, rtol=rtol, atol=0)
        for name in ("tsr", "csa", "regularizer", "ratio"):
            if (found := getattr(wider.last, name)) is not None:
                expected = getattr(criterion.last, name)
                # The ratio is float32 in any case.
                loose = max(rtol, 1e-6) if name == "ratio" else rtol
                torch.testing.assert_close(found, expected, rtol=10 * loose, atol=0)
        for g, h in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(
                h, g, rtol=1e3 * rtol, atol=1e3 * rtol * g.abs().max().item()
            )


def test_bad_positions() -> None:
    z = torch.randn(4, 3, 5, device=DEVICE, requires_grad=True)
    whole = torch.ones(4, 5, dtype=torch.bool, device=DEVICE)
    for bad, error in (
        (whole.float(), TypeError), (whole[:, :4], ValueError), (whole[None], ValueError),
        ([whole], TypeError), (3, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="positions: expected"):
            RepMTL(**LAMBDAS)(losses_of(z), z, positions=bad)
