"""The first training call: losses whose graph has no second derivative."""

from __future__ import annotations

import functools
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import DEVICE
from faulty_heads import FAULTY, Attention, B, D, between, tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repmtl_kernels import RepMTL
from repmtl_kernels._heads import preflight
from repmtl_kernels._heads.preflight import SecondDerivativeError
from repmtl_kernels._training.tasks import Task

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def check_losses(
    losses: dict, representations: list[tuple[str, Tensor]], applied: bool = True
) -> bool:
    """One representation for each loss, with its name."""
    tasks = [
        Task(key, row, loss, loss, places=[place])
        for row, ((key, loss), place) in enumerate(
            zip(losses.items(), representations, strict=True)
        )
    ]
    return preflight.check_losses(tasks, tasks, applied)


KNOWN = [
    "compiled module",
    "attention",
    "transformer layer",
    "re-entrant checkpoint",
    "synchronised batch norm",
    "cuDNN",
    "once differentiable",
]


@pytest.mark.parametrize("name", KNOWN)
def test_explain_names_task_operation_and_remedy(name: str):
    make, _, operation, remedy = FAULTY[name]
    head = between(make()).to(DEVICE)
    z = tokens().requires_grad_() * 1
    losses = {"easy": z.square().mean(), "hard": head(z).square().mean()}
    with pytest.raises(SecondDerivativeError) as raised:
        check_losses(losses, [("representation", z)] * 2)
    message = str(raised.value)
    assert message.startswith("losses['hard']: "), message
    assert operation in message and remedy in message and "RepMTL.check(heads, z)" in message


def test_explain_looks_only_between_representation_and_loss():
    encoder = torch.compile(nn.Linear(D, D), backend="aot_eager").to(DEVICE)
    features = encoder(tokens())  # leads to the encoder alone
    z = encoder(tokens())
    head = between(nn.Tanh()).to(DEVICE)
    losses = {0: (head(z).sum(-1, keepdim=True) * features).mean(), 1: z.mean()}
    check_losses(losses, [("representation", z)] * 2)
    leaf = tokens(requires_grad=True)
    other = tokens(requires_grad=True)
    check_losses({0: leaf.mean(), 1: other.square().mean()}, [("a", leaf), ("b", other)])
    attended = Attention()(other).mean()
    with pytest.raises(SecondDerivativeError, match=r"losses\[1\].*between b and"):
        check_losses({0: leaf.mean(), 1: attended}, [("a", leaf), ("b", other)])
    check_losses({1: attended}, [("a", leaf)])  # not between these two


def test_explain_does_not_follow_the_other_results_of_an_operation():
    first, second = tokens(requires_grad=True).tanh().unbind(0)
    check_losses({0: Attention()(second[None]).mean() + first.mean()}, [("z", first)])
    with pytest.raises(SecondDerivativeError):
        check_losses({0: Attention()(first[None]).mean() + second.mean()}, [("z", first)])


def test_explain_visits_each_operation_once():
    """2^400 paths to the representation, and as many elsewhere."""
    z = tokens(requires_grad=True) * 1
    value, other = z, tokens(requires_grad=True)
    for _ in range(400):
        value = value + value.tanh()
        other = other + other.tanh()
    check_losses({0: value.mean(), 1: (value * other).sum()}, [("z", z)] * 2)


def test_explain_leaves_a_region_with_representation_and_loss_to_the_criterion():
    layer = nn.Linear(D, D).to(DEVICE)

    @functools.partial(torch.compile, backend="aot_eager")
    def both(x):
        z = layer(x)
        return z, z.square().mean()

    z, loss = both(tokens())
    check_losses({0: loss}, [("representation", z)])


@ranks.needs_gloo
@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters"])
def test_explain_data_parallel_results_that_are_copies(option: str, tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(D, D)
            self.head = nn.Sequential(nn.Tanh(), nn.Linear(D, 1))

        def forward(self, x):
            z = self.encoder(x)
            loss = self.head(z).square().mean()
            check_losses({0: loss}, [("representation", z)])
            return z, loss

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        z, loss = DistributedDataParallel(Model(), **{option: True})(torch.randn(B, D))
        with pytest.raises(SecondDerivativeError, match=r"losses\[0\].*inside the wrapped module"):
            check_losses({0: loss}, [("representation", z)])
        with pytest.raises(SecondDerivativeError, match="inside the wrapped module"):
            check_losses({0: loss * 2}, [("representation", z)])
        check_losses({0: z.square().mean()}, [("representation", z)])  # heads outside
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "shape, options, warned",
    [
        ((D,), {"over": "space"}, True),
        ((D, 1, 1), {"over": "space"}, True),
        ((D, 1, 2), {"over": "space"}, False),
        ((D,), {"over": "space", "lambda_tsr": 0.0}, False),
        ((D,), {"over": "tasks"}, False),
    ],
)
def test_one_position_leaves_tsr_over_positions_nothing(shape, options, warned):
    z = torch.randn(B, *shape, device=DEVICE, requires_grad=True)
    criterion = RepMTL(**{"lambda_tsr": 0.5, "lambda_csa": 0.5, **options})
    for call in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            criterion([z.square().mean(), z.sin().mean()], z)
        messages = [
            str(w.message) for w in caught if "the representation has one" in str(w.message)
        ]
        assert len(messages) == (warned and call == 0), call
        assert all(m.startswith("over: 'space' compares") for m in messages)


@pytest.mark.parametrize("hidden", [False, True])
def test_nan_behind_a_finite_loss_is_named(hidden: bool):
    z = torch.randn(B, D, device=DEVICE, requires_grad=True)
    labels = torch.randn(B, D, device=DEVICE)
    labels[0] = torch.nan
    off = (z - (labels if hidden else labels.nan_to_num())).square()
    losses = {"a": z.sin().mean(), "b": torch.where(labels.isnan(), 0, off).mean()}
    criterion = RepMTL(0.5, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = criterion(losses, z)
    messages = [str(w.message) for w in caught if "but its gradient" in str(w.message)]
    assert losses["b"].isfinite() and total.isnan() == hidden
    assert len(messages) == hidden
    assert all(m.startswith("losses['b']: finite, but") and "nan_to_num" in m for m in messages)
