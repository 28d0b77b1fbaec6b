"""The checks on the first call of a criterion: second derivatives, and means that are zero."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from small_network import LAMBDAS, Network, applied, losses_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from repmtl_kernels import RepMTL, SecondDerivativeError
from repmtl_kernels._heads import preflight


def test_heads_without_a_second_derivative_are_explained_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    check_losses = preflight.check_losses
    monkeypatch.setattr(
        preflight,
        "check_losses",
        lambda new, *rest: walks.append([t.key for t in new]) or check_losses(new, *rest),
    )
    criterion = RepMTL(start=1, every=1)
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
def test_heads_without_means_are_reported_once(norm: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 6, 5, requires_grad=True)  # (B, N, D) or (B, C, N)
    channel_dim = 1 if norm == "instance" else -1
    layer = {"layer": nn.LayerNorm(5), "instance": nn.InstanceNorm1d(6), "none": nn.Tanh()}[norm]
    head = nn.Sequential(layer, nn.Linear(5, 3), nn.Tanh())
    losses = {"plain": (z**3).mean(), "normed": head(z).square().mean()}
    option = {"layer": "lambda_tsr", "instance": "lambda_csa", "none": ""}[norm]

    def warnings_of(criterion: RepMTL) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            criterion(losses, z)
        assert all(warning.filename == __file__ for warning in caught)
        return [str(warning.message) for warning in caught]

    criterion = RepMTL(start=1, channel_dim=channel_dim)
    assert warnings_of(criterion) == []  # the regulariser is off
    messages = warnings_of(criterion)
    assert len(messages) == bool(option)
    if option:
        assert messages[0].startswith("losses['normed']: the saliency's means"), messages
        assert messages[0].endswith(f"or set {option}=0")
        assert warnings_of(RepMTL(channel_dim=channel_dim, **{option: 0})) == []
    assert warnings_of(criterion) == []


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
    """Like roi_align, it has a constant derivative whose own backward raises."""

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


# Operations between z and a loss, on tensors of shape `(B, 4, 6, 6)`.
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
    """Return whether the operation has no second derivative in this version of PyTorch."""
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


def test_the_first_call_finds_operations_before_parameters() -> None:
    """The saliency does not depend on z, but on the weights of the layer after the operation."""
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
    """A node with two results; DistributedDataParallel puts such a node into the graph."""

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


@pytest.mark.parametrize(
    "operation",
    (F.relu, F.gelu, F.hardswish, F.softplus, torch.abs, torch.sort, F.max_pool2d, torch.round),
    ids=lambda f: f.__name__,
)
def test_the_first_call_accepts_operations_with_a_second_derivative(operation) -> None:
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
