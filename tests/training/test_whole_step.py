"""Compile the second-order step as documented, and the encoder alone."""

from __future__ import annotations

import copy
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, DEVICE, allowed, relative_error
from torch import nn
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

from repmtl_kernels import RepMTL, rep_mtl_loss

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


# The documented code uses these names; each test sets them.
encoder = heads = loss_functions = None


def task_loss(z, buffers, parameters, task, target):
    prediction = functional_call(heads[task], (parameters, buffers), z)
    return loss_functions[task](prediction, target)


def objective(parameters, buffers, x, targets):
    z = functional_call(encoder, (parameters["encoder"], buffers["encoder"]), x)
    losses, saliencies = {}, []
    for task in heads:
        saliency, losses[task] = grad_and_value(task_loss)(
            z, buffers[task], parameters[task], task, targets[task]
        )
        saliencies.append(saliency)
    regularizer = rep_mtl_loss(saliencies, lambda_tsr=0.01, lambda_csa=0.01)
    return sum(losses.values()) + regularizer.total, (losses, regularizer)


def step(parameters, buffers, x, targets):
    return grad_and_value(objective, has_aux=True)(parameters, buffers, x, targets)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


class Tokens(nn.Module):
    """A transformer layer on images, which moves the channels to the end and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, z):
        return self.layer(z.flatten(2).mT).mT.unflatten(2, z.shape[2:])


def convolutions(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=2, dilation=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, outputs, 1),
    )


def transformer(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(Tokens(width), nn.Conv2d(width, outputs, 1))


def few_kernels(width: int, outputs: int) -> nn.Module:
    """Return a small head, because a C++ compiler takes seconds for each kernel."""
    return convolutions(width, outputs) if outputs > 1 else nn.Conv2d(width, outputs, 1)


def model_and_data(make, dtype: torch.dtype, width: int = 6):
    encoder = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
    heads = {"segmentation": make(width, 4), "depth": make(width, 1)}
    model = nn.ModuleDict({"encoder": encoder, **heads}).to(DEVICE, dtype)
    losses = {"segmentation": nn.functional.cross_entropy, "depth": nn.functional.mse_loss}
    x = torch.randn(3, 3, 6, 7, device=DEVICE, dtype=dtype)
    # Targets are probabilities: the loss of class numbers is not deterministic on CUDA.
    classes = torch.randint(4, (3, 4, 5), device=DEVICE)
    targets = {
        "segmentation": nn.functional.one_hot(classes, 4).movedim(-1, 1).to(dtype),
        "depth": torch.randn(3, 1, 4, 5, device=DEVICE, dtype=dtype),
    }
    return model, losses, x, targets


def eager_step(model: nn.ModuleDict, losses, x, targets, criterion: RepMTL):
    z = model["encoder"](x)
    model.zero_grad()
    total = criterion({t: losses[t](model[t](z), targets[t]) for t in losses}, z)
    total.backward()
    return total.detach()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("make", [convolutions, transformer])
def test_whole_step(make, dtype: torch.dtype, monkeypatch):
    compare_whole_step("aot_eager", make, dtype, monkeypatch)


@pytest.mark.cell("`torch.compile` of a whole training step, as in [compile.md](compile.md)")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_whole_step_on_every_backend(backend: str, monkeypatch):
    monkeypatch.setenv("REPMTL_BACKEND", backend)
    compare_whole_step("aot_eager", few_kernels, torch.float32, monkeypatch)


@needs_compiler
@pytest.mark.slow
def test_whole_step_with_inductor(monkeypatch):
    compare_whole_step("inductor", few_kernels, torch.float64, monkeypatch)


def compare_whole_step(compiler: str, make, dtype: torch.dtype, monkeypatch) -> None:
    model, losses, x, targets = model_and_data(make, dtype)
    expected = copy.deepcopy(model)
    modules = dict(model.items())
    for name, value in (
        ("encoder", modules["encoder"]),
        ("heads", {t: modules[t] for t in losses}),
        ("loss_functions", losses),
    ):
        monkeypatch.setitem(globals(), name, value)
    criterion = RepMTL(lambda_tsr=0.01, lambda_csa=0.01)
    tolerance = TOLERANCE[dtype]
    judge = copy.deepcopy(model).double()  # judges both, as TSR's gradient is of order 1 / |x|
    in_float64 = {t: y.double() for t, y in targets.items()}
    exactly = RepMTL(lambda_tsr=0.01, lambda_csa=0.01, backend="reference")

    parameters = {name: dict(m.named_parameters()) for name, m in modules.items()}
    buffers = {name: dict(m.named_buffers()) for name, m in modules.items()}
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for other in (expected, judge):  # so that errors of the first step do not add up
            other.load_state_dict(model.state_dict())
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            grads, (total, (task_losses, regularizer)) = compiled(parameters, buffers, x, targets)
        for name in modules:
            for key, parameter in parameters[name].items():
                parameter.grad = grads[name][key]
        with sdpa_kernel(SDPBackend.MATH):
            exact = eager_step(expected, losses, x, targets, criterion)

        torch.testing.assert_close(total, exact, rtol=tolerance, atol=0)
        last = criterion.last
        torch.testing.assert_close(task_losses, last.losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(regularizer.tsr, last.tsr, rtol=tolerance, atol=0)
        torch.testing.assert_close(regularizer.csa, last.csa, rtol=tolerance, atol=0)
        with sdpa_kernel(SDPBackend.MATH):
            eager_step(judge, losses, x.double(), in_float64, exactly)
        got, plain, exact = ([p.grad for p in m.parameters()] for m in (model, expected, judge))
        assert all(g is not None for g in got)
        size = max(g.norm() for g in exact)
        for g, p, e in zip(got, plain, exact, strict=True):
            # The gradient of a bias before batch norm consists of rounding errors.
            unit = max(e.norm(), 1e-3 * size)
            plain_error = ((p - e).norm() / unit).item()
            assert (g - e).norm() <= unit * allowed(tolerance, plain_error)
        assert relative_error(got, exact) < tolerance
        optimizer.step()
    # Running statistics are updated in place, once a step.
    state, exact_state = dict(model.named_buffers()), dict(expected.named_buffers())
    for name in exact_state:
        torch.testing.assert_close(
            state[name], exact_state[name], rtol=tolerance, atol=tolerance, msg=name
        )
    if make is convolutions:
        assert modules["depth"][1].num_batches_tracked == 2


def test_the_regularizer_counts(monkeypatch):
    """The comparison above would fail if a step left the second order out."""
    model, losses, x, targets = model_and_data(convolutions, torch.float64)
    grads = []
    for strength in (0.0, 0.01):
        copied = copy.deepcopy(model)
        eager_step(copied, losses, x, targets, RepMTL(strength, strength))
        grads.append([p.grad for p in copied.parameters()])
    assert relative_error(*grads) > 1e3 * TOLERANCE[torch.float64]


def test_documentation_shows_the_code_of_this_test():
    text = (ROOT / "docs" / "compile.md").read_text()
    for function in (task_loss, objective, step):
        assert inspect.getsource(function).strip() in text


@pytest.mark.parametrize(
    ("compiler", "make"),
    [
        ("aot_eager", convolutions),
        ("aot_eager", transformer),
        pytest.param("inductor", convolutions, marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_compiled_encoder_with_eager_heads(compiler: str, make):
    model, losses, x, targets = model_and_data(make, torch.float64)
    expected = copy.deepcopy(model)
    criterion = RepMTL(0.01, 0.01)
    modules = dict(model.items())
    modules["encoder"] = torch.compile(model["encoder"], fullgraph=True, backend=compiler)
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            total = eager_step(nn.ModuleDict(modules), losses, x, targets, criterion)
            exact = eager_step(expected, losses, x, targets, criterion)
            torch.testing.assert_close(total, exact, rtol=1e-9, atol=0)
            grads = [p.grad for p in model.parameters()]
            exact_grads = [p.grad for p in expected.parameters()]
            assert relative_error(grads, exact_grads) < 1e-9
