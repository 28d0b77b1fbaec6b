"""RepMTL.check: heads without a second derivative, by module, operation and remedy."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass

import pytest
import torch
from cases import DEVICE
from faulty_heads import (
    FAULTY,
    Apply,
    Attention,
    B,
    Checkpointed,
    Cube,
    D,
    N,
    OwnKernel,
    SelfAttention,
    Tanh,
    between,
    compiled,
    tokens,
)
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from repmtl_kernels import convert_second_order, second_order
from repmtl_kernels._heads.preflight import SecondDerivativeError, check

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def fails_in_training(head: nn.Module) -> bool:
    """Return whether a step raises, or has no second derivative, as it would without the check."""
    z = tokens().requires_grad_()
    try:
        (saliency,) = torch.autograd.grad(head(z).tanh().sum(), z, create_graph=True)
        (saliency**2).sum().backward()
    except (RuntimeError, TypeError):
        return True
    return False


@pytest.mark.parametrize("name", FAULTY)
def test_names_module_operation_and_remedy(name: str):
    make, module, operation, remedy = FAULTY[name]
    head = between(make()).to(DEVICE)
    if name not in ("own kernel", "zero derivative"):  # those are wrong without a word
        assert fails_in_training(head)
    with pytest.raises(SecondDerivativeError) as raised:
        check({"easy": nn.Linear(D, 2).to(DEVICE), "hard": head}, tokens())
    message = str(raised.value)
    assert message.startswith(f"heads['hard'], module {module}: "), message
    assert operation in message and remedy in message, message
    assert isinstance(raised.value, RuntimeError)


FINE = {
    "linear": lambda: nn.Linear(D, D),
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(N, 4, 3, padding=2, dilation=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, N, 1)
    ),
    "checkpoint": lambda: Checkpointed(False),
    "differentiable function": lambda: Apply(Cube.apply),
    "straight through": lambda: Apply(lambda x: x + (x.round() - x).detach()),
    "softmax": lambda: nn.Softmax(-1),
    "norm": lambda: nn.LayerNorm(D),
    "argmax on the side": lambda: Apply(lambda x: x * x.argmax(-1, keepdim=True)),
    "inside, in place": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True)),
    "compiled without autograd": lambda: torch.compile(nn.Linear(D, D), backend="eager"),
    "attention that gives its weights": lambda: SelfAttention(need_weights=True),
    "complex": lambda: Apply(torch.fft.rfft),
}


@pytest.mark.parametrize("name", FINE)
def test_accepts(name: str):
    head = FINE[name]().to(DEVICE)
    without_means = name in ("softmax", "norm")  # over the channels
    with pytest.warns(UserWarning, match="TSR") if without_means else contextlib.nullcontext():
        assert check(head, tokens(), channel_dim=-1) is None


def test_attention_is_fine_under_the_remedy():
    heads = [between(FAULTY[n][0]()).to(DEVICE) for n in ("attention", "transformer layer")]
    with sdpa_kernel(SDPBackend.MATH):
        check(heads, tokens())


@pytest.mark.parametrize("write", [nn.ReLU(inplace=True), Apply(lambda x: x.flatten(1).sigmoid_())])
def test_writing_to_the_representation(write: nn.Module):
    z = tokens()
    before = z.clone()
    head = nn.Sequential(nn.Identity(), write, nn.Flatten(), nn.Linear(N * D, 1)).to(DEVICE)
    message = f"module '1' ({type(write).__name__}): the representation is written in place"
    with pytest.raises(SecondDerivativeError, match=re.escape(message)):
        check(head, z)
    torch.testing.assert_close(z, before, rtol=0, atol=0)


def test_every_kind_of_result():
    @dataclass
    class Result:
        scores: Tensor
        extra: dict

    layer = nn.Linear(D, D).to(DEVICE)
    good = [
        lambda z: Result(layer(z), {}),
        lambda z: {"labels": z.argmax(-1), "nested": [(layer(z), None, 3)]},
        lambda z: layer(z).square().mean(),
    ]
    check(good, tokens())
    with pytest.raises(SecondDerivativeError, match=r"^heads\[1\]: .*does not depend"):
        check([good[0], lambda z: {"labels": z.argmax(-1)}], tokens())


def test_modules_inside_functions():
    model = nn.ModuleDict({"decoder": between(Attention())}).to(DEVICE)
    kept = {"depth": model["decoder"]}

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model["decoder"]

        def depth(self, z):
            return self.inner(z)

    def two(scale, z):
        return scale * model["decoder"](z)

    for head, module in (
        (lambda z: model["decoder"](z).mean(), "model.decoder.0.1"),
        (lambda z: kept["depth"](z), "kept['depth'].0.1"),
        (functools.partial(two, 2.0), "model.decoder.0.1"),
        (Owner().depth, "inner.0.1"),
    ):
        with pytest.raises(SecondDerivativeError, match=r"\(Attention\)") as raised:
            check(head, tokens())
        assert repr(module) in str(raised.value) or f'"{module}"' in str(raised.value)


def test_a_head_that_is_compiled():
    head = compiled(nn.Sequential(nn.Linear(D, D), nn.Tanh())).to(DEVICE)
    with pytest.raises(SecondDerivativeError, match=r"^heads\[0\], module Sequential: a torch"):
        check([head], tokens())


def test_a_fault_below_results_that_could_cancel():
    """With equal weights, a result and its negative would have no gradient."""
    head = nn.Sequential(Apply(OwnKernel.apply), Apply(lambda x: torch.cat([x, -x])))
    with pytest.raises(SecondDerivativeError, match="OwnKernel gives a gradient without a graph"):
        check(head, tokens())


def test_what_is_compiled_stays_compiled():
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return aot_eager(graph, inputs)

    head = Tanh()
    head.compile(backend=counting)
    for _ in range(2):
        with pytest.raises(SecondDerivativeError, match=r"'0' \(Tanh\)"):
            check(nn.Sequential(head), tokens())
    head(tokens(requires_grad=True) * 1)
    assert len(compilations) == 1


def test_a_check_on_the_meta_device():
    heads = [nn.Linear(D, 2, device="meta"), nn.Sequential(nn.Tanh(), nn.Linear(D, 2)).to("meta")]
    check(heads, tokens().to("meta"))


def test_one_representation_per_head():
    heads = nn.ModuleDict({"a": nn.Linear(D, 2), "b": nn.Linear(3, 2)}).to(DEVICE)
    narrow = torch.randn(B, N, 3, device=DEVICE)
    check(heads, {"b": narrow, "a": tokens()})
    check(nn.ModuleList(heads.values()), [tokens(), narrow])


class CheckpointedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(N, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.relu = nn.ReLU()

    def body(self, x):
        return self.relu(self.norm(self.convolution(x)))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class Unsteady(CheckpointedNorm):
    """Runs otherwise each time."""

    runs = 0

    def body(self, x):
        self.runs += 1
        return super().body(x) if self.runs % 2 else self.convolution(x)


def test_checkpointing_that_does_not_repeat():
    with pytest.raises(SecondDerivativeError) as raised:
        check([Unsteady().to(DEVICE)], tokens())
    message = str(raised.value)
    assert message.startswith("heads[0]") and "Write that backward" not in message
    assert "checkpointing" in message and "inside the checkpointed function" in message


def test_checkpointing_under_second_order():
    head = CheckpointedNorm().to(DEVICE)
    check(head, tokens())
    with second_order(), pytest.warns(UserWarning, match="enter the context inside the function"):
        check([head], tokens())
    # Both ways that it names.
    check([convert_second_order(CheckpointedNorm().to(DEVICE))], tokens())
    head.body = second_order()(head.body)
    with second_order():
        check([head], tokens())


def test_skip_connections_into_a_compiled_encoder():
    """Operations that are not between the representation and the result do not count."""
    encoder = torch.compile(nn.Sequential(nn.Linear(D, D), nn.Tanh()), backend="aot_eager")
    features = encoder.to(DEVICE)(tokens())
    layer = nn.Linear(D, D).to(DEVICE)
    check(lambda z: layer(z) * features, layer(features))


def test_bad_arguments():
    layer = nn.Linear(D, D).to(DEVICE)
    z = tokens()
    for heads, value, error, message in (
        ([], z, ValueError, "heads: expected at least one, got an empty list"),
        ([layer, 3], z, TypeError, "heads[1]: expected a module or a function of the repr"),
        (layer, None, TypeError, "z: expected a Tensor, or one for each head"),
        ([layer], {"a": z}, TypeError, "z: expected a Tensor, or one for each head"),
        ([layer], [z, z], ValueError, "z: expected 1, one for each head; got 2"),
        ({"a": layer}, {"b": z}, ValueError, "z: expected the keys of heads, ['a']; got ['b']"),
        ([layer], [3], TypeError, "z[0]: expected a Tensor, got int"),
        (layer, z.long(), TypeError, "z: expected a floating-point Tensor, got torch.int64"),
        ({"a": layer}, {"a": z[0, 0]}, ValueError, "z['a']: each task must be (B, C, *spatial)"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            check(heads, value)
    with pytest.raises(ValueError, match="^channel_dim: expected a dimension"):
        check(layer, z, channel_dim=3)
