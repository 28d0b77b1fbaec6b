"""Heads without a second derivative, or without means: found, named, and nothing else touched."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from cases import DEVICE
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding_bag, multi_margin_loss, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from repmtl_kernels import convert_second_order, second_order
from repmtl_kernels._heads import preflight
from repmtl_kernels._heads.preflight import SecondDerivativeError, check
from repmtl_kernels._training.tasks import Task

B, N, D = 2, 5, 8
FUSED = "ScaledDotProduct"


class Cube(torch.autograd.Function):
    """x^3 with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Cube.backward(ctx, grad)


class OwnKernel(Cube):
    """As with a kernel of its own: the gradient is right and has no graph."""

    @staticmethod
    def backward(ctx, grad):
        return Cube.backward(ctx, grad).detach()


class SyncBatchNorm(Once):
    """Named like PyTorch's, which needs a process group."""


class CudnnRnn(Once):
    """Named like PyTorch's, which needs a GPU."""


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def bags(x: Tensor) -> Tensor:
    """Bags of one row each: ``x``, by an operation without a second derivative."""
    rows = x.flatten(0, 1)
    return embedding_bag(torch.arange(len(rows), device=x.device)[:, None], rows).view_as(x)


def margins(x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    first = torch.zeros(len(rows), dtype=torch.long, device=x.device)
    return x * multi_margin_loss(rows, first, reduction="none").view(*x.shape[:2], 1)


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()


class Attention(nn.Module):
    def forward(self, x):
        q = x[:, None]
        return scaled_dot_product_attention(q, q, q)[:, 0]


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


class Ignores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.bias * 2


def between(module: nn.Module) -> nn.Module:
    """The module inside a head: its name is ``trunk.1``."""
    trunk = nn.Sequential(nn.Linear(D, D), module)
    return nn.Sequential(nn.ModuleDict({"trunk": trunk})["trunk"], nn.Linear(D, 3))


def compiled(module):
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="aot_eager")
    return module


def tokens(**options) -> Tensor:
    return torch.randn(B, N, D, device=DEVICE, **options)


# module, its class in the message, what is found there, remedy
FAULTY = {
    "compiled module": (
        lambda: compiled(nn.Sequential(nn.Linear(D, D), nn.Tanh())),
        "'0.1' (Sequential)",
        "torch.compile region",
        "Compile the encoder alone",
    ),
    "compiled in place": (
        lambda: compiled_in_place(Tanh()),
        "'0.1' (Tanh)",
        "torch.compile region",
        "Compile the encoder alone",
    ),
    "compiled function": (
        lambda: Apply(compiled(lambda x: x.tanh() * x)),
        "'0.1' (Apply)",
        "torch.compile region",
        "torch.func.grad",
    ),
    "attention": (Attention, "'0.1' (Attention)", FUSED, "sdpa_kernel(SDPBackend.MATH)"),
    "multihead attention": (
        lambda: SelfAttention(need_weights=False),
        "'0.1.attention' (MultiheadAttention)",
        FUSED,
        "sdpa_kernel(SDPBackend.MATH)",
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval(),
        "'0.1.self_attn' (MultiheadAttention)",
        FUSED,
        "sdpa_kernel(SDPBackend.MATH)",
    ),
    "re-entrant checkpoint": (
        lambda: Checkpointed(True),
        "'0.1' (Checkpointed)",
        "re-entrant checkpointing",
        "use_reentrant=False",
    ),
    "synchronised batch norm": (
        lambda: Apply(SyncBatchNorm.apply),
        "'0.1' (Apply)",
        "SyncBatchNorm",
        "GroupNorm",
    ),
    "cuDNN": (lambda: Apply(CudnnRnn.apply), "'0.1' (Apply)", "CudnnRnn", "enabled=False"),
    "once differentiable": (
        lambda: Apply(Once.apply),
        "'0.1' (Apply)",
        "autograd.Function Once",
        "once_differentiable",
    ),
    "own kernel": (
        lambda: Apply(OwnKernel.apply),
        "'0.1' (Apply)",
        "OwnKernel gives a gradient without a graph",
        "differentiable operations",
    ),
    "no derivative": (
        lambda: Apply(bags),
        "'0.1' (Apply)",
        "operation EmbeddingBag has no derivative",
        "differentiate twice",
    ),
    "no derivative of a loss": (
        lambda: Apply(margins),
        "'0.1' (Apply)",
        "operation MultiMarginLoss has no derivative",
        "differentiate twice",
    ),
    "zero derivative": (
        lambda: Apply(torch.round),
        "'0.1' (Apply)",
        "Round is zero everywhere",
        "differentiate twice",
    ),
    "detached": (lambda: Apply(Tensor.detach), "'0.1' (Apply)", "does not depend", ".detach()"),
    "argmax": (
        lambda: Apply(lambda x: x.argmax(-1, keepdim=True).expand(B, N, D).float()),
        "'0.1' (Apply)",
        "does not depend",
        "argmax",
    ),
    "no_grad": (NoGrad, "'0.1' (NoGrad)", "does not depend", "no_grad"),
    "ignored": (Ignores, "'0.1' (Ignores)", "does not depend", "not used"),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def fails_in_training(head: nn.Module) -> bool:
    """What the check spares the user: an exception, or a second derivative that is missing."""
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


# Heads whose saliency has no mean over the channels or over the positions, and others: of tokens
# (B, N, D) and of maps.
MEANS = {
    "LayerNorm": (lambda: [nn.LayerNorm(D), nn.Linear(D, 3)], (N, D), "channels .*lambda_tsr=0"),
    "pooled LayerNorm": (lambda: [nn.LayerNorm(D), nn.Linear(D, 3)], (D,), "channels .*TSR"),
    "softmax": (lambda: [nn.Softmax(-1)], (N, D), "channels .*TSR"),
    "InstanceNorm": (
        lambda: [nn.Conv2d(D, D, 1), nn.InstanceNorm2d(D), nn.ReLU(), nn.Conv2d(D, 3, 1)],
        (D, 7, 9),
        "positions .*CSA's anchors .*lambda_csa=0",
    ),
    "linear": (lambda: [nn.Linear(D, 3)], (N, D), None),
    "LayerNorm further on": (
        lambda: [nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, 3)],
        (N, D),
        None,
    ),
    "one position": (lambda: [nn.Linear(D, 3)], (D,), None),
    "a large map": (lambda: [nn.Conv2d(D, 3, 1)], (D, 120, 160), None),
    "BatchNorm": (lambda: [nn.BatchNorm2d(D), nn.Conv2d(D, 3, 1)], (D, 7, 9), None),
    "GroupNorm": (lambda: [nn.GroupNorm(1, D), nn.Conv2d(D, 3, 1)], (D, 7, 9), None),
}


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEANS)
def test_means_that_are_nothing_but_rounding(name: str, dtype: torch.dtype, scale: float):
    make, shape, expected = MEANS[name]
    torch.manual_seed(0)
    layers = nn.Sequential(*make()).to(DEVICE, dtype)
    z = (torch.randn(B, *shape, device=DEVICE) + 3).to(dtype)
    heads = {"easy": nn.Flatten(), "hard": lambda z: scale * layers(z)}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check(heads, z, channel_dim=1 if len(shape) == 3 else -1)
    messages = [str(one.message) for one in found]
    assert len(messages) == (expected is not None), messages
    if expected is not None:
        assert re.match(rf"heads\['hard'\]: .* over the {expected}", messages[0]), messages
        assert found[0].filename == __file__


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


class Noisy(nn.Module):
    """Uses the random state, running statistics and an own buffer."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(N)
        self.dropout = nn.Dropout(0.5)
        self.last = last
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.last(self.dropout(self.norm(x)) + torch.randn_like(x))


@pytest.mark.parametrize("faulty", [False, True])
def test_leaves_everything_as_it_was(faulty: bool):
    head = Noisy(Apply(OwnKernel.apply) if faulty else nn.Linear(D, D)).to(DEVICE)
    head.dropout.eval()
    parameters = list(head.parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 7.0)
        p.register_hook(lambda grad: pytest.fail("a parameter's gradient was computed"))
    buffers = dict(head.named_buffers())
    copies = {name: b.clone() for name, b in buffers.items()}
    versions = {name: b._version for name, b in buffers.items()}
    grads = [p.grad for p in parameters]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in head.modules()]
    state = torch.random.get_rng_state()
    device_state = torch.cuda.get_rng_state() if DEVICE == "cuda" else None
    z = tokens(requires_grad=True) * 1
    torch.random.set_rng_state(state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state)

    with torch.no_grad():  # as in a script: gradients are switched on inside
        if faulty:
            with pytest.raises(SecondDerivativeError, match="'last'"):
                check(head, z)
        else:
            check(head, z)
        assert not torch.is_grad_enabled()

    assert torch.equal(torch.random.get_rng_state(), state)
    if device_state is not None:
        assert torch.equal(torch.cuda.get_rng_state(), device_state)
    for name, b in head.named_buffers():
        assert b is buffers[name] and b._version == versions[name]
        torch.testing.assert_close(b, copies[name], rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))
    assert all((p.grad == 7).all() for p in parameters)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in head.modules()]
    assert head.training and not head.dropout.training
    assert z.grad_fn is not None and z._version == 0


def test_a_head_that_raises_leaves_everything_as_it_was():
    head = Noisy(nn.Linear(D + 1, D)).to(DEVICE)
    before = {name: b.clone() for name, b in head.named_buffers()}
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        check(head, tokens().clone())
    assert not isinstance(raised.value, SecondDerivativeError)
    for name, b in head.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)
    torch.random.set_rng_state(state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("faulty", [False, True])
def test_a_scripted_head(faulty: bool):
    """Its buffers can be set one by one, and it takes no hooks."""

    class Bags(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bags(x)

    last = Bags() if faulty else nn.Tanh()
    inner = torch.jit.script(nn.Sequential(nn.BatchNorm1d(N), last).to(DEVICE))
    head = nn.Sequential(nn.Linear(D, D), inner, nn.BatchNorm1d(N)).to(DEVICE)
    before = {name: b.clone() for name, b in head.named_buffers()}
    if faulty:
        with pytest.raises(SecondDerivativeError, match="EmbeddingBag has no derivative"):
            check(head, tokens())
    else:
        check(head, tokens())
    assert len(before) == 6
    for name, b in head.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)
    assert inner.training


def test_buffers_that_a_head_makes_or_replaces_go_back():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), device=DEVICE))

        def forward(self, x):
            self.calls = self.calls + 1
            self.register_buffer("made", x.detach())
            return x.tanh()

    head = Counts()
    calls = head.calls
    check(head, tokens())
    assert list(head._buffers) == ["calls"] and head.calls is calls and calls == 0


def test_under_inference_mode():
    head = Noisy(nn.Linear(D, D)).to(DEVICE)
    before = {name: b.clone() for name, b in head.named_buffers()}
    with torch.inference_mode():
        check(head, tokens())
    for name, b in head.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)


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
    """What is not between the representation and the result does not count."""
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


# --- explain: the graph of a training step ---


def explain(losses: dict, representations: list[tuple[str, Tensor]], applied: bool = True) -> bool:
    """One representation for each loss, with its name."""
    tasks = [
        Task(key, row, loss, loss, places=[place])
        for row, ((key, loss), place) in enumerate(
            zip(losses.items(), representations, strict=True)
        )
    ]
    return preflight.explain(tasks, tasks, applied)


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
        explain(losses, [("representation", z)] * 2)
    message = str(raised.value)
    assert message.startswith("losses['hard']: "), message
    assert operation in message and remedy in message and "RepMTL.check(heads, z)" in message


def test_explain_looks_only_between_representation_and_loss():
    encoder = torch.compile(nn.Linear(D, D), backend="aot_eager").to(DEVICE)
    features = encoder(tokens())  # leads to the encoder alone
    z = encoder(tokens())
    head = between(nn.Tanh()).to(DEVICE)
    losses = {0: (head(z).sum(-1, keepdim=True) * features).mean(), 1: z.mean()}
    explain(losses, [("representation", z)] * 2)
    leaf = tokens(requires_grad=True)
    other = tokens(requires_grad=True)
    explain({0: leaf.mean(), 1: other.square().mean()}, [("a", leaf), ("b", other)])
    attended = Attention()(other).mean()
    with pytest.raises(SecondDerivativeError, match=r"losses\[1\].*between b and"):
        explain({0: leaf.mean(), 1: attended}, [("a", leaf), ("b", other)])
    explain({1: attended}, [("a", leaf)])  # not between these two


def test_explain_does_not_follow_the_other_results_of_an_operation():
    first, second = tokens(requires_grad=True).tanh().unbind(0)
    explain({0: Attention()(second[None]).mean() + first.mean()}, [("z", first)])
    with pytest.raises(SecondDerivativeError):
        explain({0: Attention()(first[None]).mean() + second.mean()}, [("z", first)])


def test_explain_visits_each_operation_once():
    """2^400 paths to the representation, and as many elsewhere."""
    z = tokens(requires_grad=True) * 1
    value, other = z, tokens(requires_grad=True)
    for _ in range(400):
        value = value + value.tanh()
        other = other + other.tanh()
    explain({0: value.mean(), 1: (value * other).sum()}, [("z", z)] * 2)


def test_explain_leaves_a_region_with_representation_and_loss_to_the_criterion():
    layer = nn.Linear(D, D).to(DEVICE)

    @functools.partial(torch.compile, backend="aot_eager")
    def both(x):
        z = layer(x)
        return z, z.square().mean()

    z, loss = both(tokens())
    explain({0: loss}, [("representation", z)])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
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
            explain({0: loss}, [("representation", z)])
            return z, loss

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        z, loss = DistributedDataParallel(Model(), **{option: True})(torch.randn(B, D))
        with pytest.raises(SecondDerivativeError, match=r"losses\[0\].*inside the wrapped module"):
            explain({0: loss}, [("representation", z)])
        with pytest.raises(SecondDerivativeError, match="inside the wrapped module"):
            explain({0: loss * 2}, [("representation", z)])
        explain({0: z.square().mean()}, [("representation", z)])  # heads outside
    finally:
        dist.destroy_process_group()
