"""torch.compile, function transforms and the registered operators."""

import shutil

import pytest
import torch
from cases import BACKENDS as ALL_BACKENDS
from cases import DEVICE, LOSSES, Case, Loss, supports

from repmtl_kernels import RepMTL, rep_mtl_loss, tsr_loss
from repmtl_kernels._autograd import Config, Saved

CASE = Case(2, 3, 12, (3, 3))


def _grads(function, tensors):
    return torch.autograd.grad(function(*tensors), tensors)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# A compiler sees one operator whatever the backend: for it, native is eager once more.
BACKENDS = [name for name in ALL_BACKENDS if name != "native"]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_full_graph(backend: str, loss: Loss):
    def function(*s):
        return loss.public([x * 2 for x in s], backend=backend) * 3

    tensors = CASE.make(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    for found, expected in zip(_grads(compiled, tensors), _grads(function, tensors), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    def function(*s):
        return rep_mtl_loss([x.tanh() for x in s]).total

    tensors = CASE.make(torch.float32)
    compiled = torch.compile(function, fullgraph=True)
    for found, expected in zip(_grads(compiled, tensors), _grads(function, tensors), strict=True):
        torch.testing.assert_close(found, expected)


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        lambda *s: rep_mtl_loss(list(s)).total, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in ((3, 12, 3, 3), (4, 12, 2, 5), (5, 7, 4, 4)):
        tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]
        expected = rep_mtl_loss(tensors).total
        torch.testing.assert_close(compiled(*tensors), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad(backend: str, loss: Loss):
    tensors = CASE.make(torch.float32)
    expected = torch.autograd.grad(loss.public(tensors, backend=backend), tensors)
    found = torch.func.grad(lambda *s: loss.public(s, backend=backend), argnums=(0, 1))(*tensors)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_inside_compile(backend: str):
    """The whole second-order step: saliencies by func.grad, the loss on them, its gradient."""
    torch.manual_seed(0)
    heads = [torch.randn(6, 12, device=DEVICE) for _ in range(2)]
    z = torch.randn(3, 12, 4, device=DEVICE)

    def regularizer(z):
        def saliency(w):
            return torch.func.grad(lambda z: torch.einsum("oc,bcn->bon", w, z).tanh().sum())(z)

        return rep_mtl_loss([saliency(w) for w in heads], backend=backend).total

    expected = torch.func.grad(regularizer)(z)
    found = torch.compile(torch.func.grad(regularizer), fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(found, expected)
    z.requires_grad_()
    (plain,) = torch.autograd.grad(regularizer(z), z)
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize("graph", [True, False], ids=["requires grad", "detached"])
def test_func_grad_of_leaves_inside_compile(graph: bool):
    """The compiler traces a second derivative for inputs that require a gradient."""
    (s,) = Case(2, 3, 12, (3, 3), "stacked").make(torch.float32)
    compiled = torch.compile(torch.func.grad(tsr_loss), fullgraph=True, backend="aot_eager")
    if graph:
        with pytest.raises(Exception, match="inputs of torch.func.grad .*torch.no_grad"):
            compiled(s)
        with torch.no_grad():
            found = compiled(s)
    else:
        found = compiled(s.detach())
    torch.testing.assert_close(found, torch.func.grad(tsr_loss)(s).detach())


def test_criterion_that_is_compiled():
    """Its backward pass is not observed there, and nothing else is different."""
    torch.manual_seed(0)
    heads = [torch.nn.Conv1d(12, 3, 1, device=DEVICE) for _ in range(2)]
    z = torch.randn(3, 12, 4, device=DEVICE, requires_grad=True)

    def step(criterion):
        total = criterion([head(z).square().mean() for head in heads], z)
        return total, torch.autograd.grad(total, z)[0]

    plain = RepMTL(0.5, 0.5)
    compiled = torch.compile(RepMTL(0.5, 0.5), backend="aot_eager")
    torch.testing.assert_close(step(compiled), step(plain))
    validation = torch.compile(plain.eval(), backend="aot_eager", fullgraph=True)
    losses = [head(z).square().mean() for head in heads]
    torch.testing.assert_close(validation(losses, z), sum(losses))


def test_second_derivative_by_function_transforms_is_refused():
    tensors = CASE.make(torch.float32)

    def inner(s):
        return torch.func.grad(lambda s: tsr_loss([s, tensors[1]]))(s).sum()

    with pytest.raises(RuntimeError, match="repmtl_kernels.reference"):
        torch.func.grad(inner)(tensors[0])


def _config(backend: str, **changes) -> Config:
    config = Config(
        backend, True, True, False, 1, "tasks", "abs", 1.0, 0.0, 0.5, 0.0, True, "", False
    )
    return config._replace(**changes)


CONFIGS = {
    "both": {},
    "tsr": {"csa": False},
    "floor": {"csa": False, "tsr_floor": 0.1},
    "csa": {"tsr": False},
    "stacked": {"stacked": True},
    "without gradient": {"with_grad": False},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend: str, name: str):
    config = _config(backend, **CONFIGS[name])
    dtype = torch.float64 if supports(backend, torch.float64) else torch.float32
    operands = [t.detach() for t in CASE.make(dtype)]
    if config.stacked:
        operands = [torch.stack(operands)]
    torch.library.opcheck(torch.ops.repmtl.losses.default, (operands, None, *config))
    if not config.with_grad:
        return
    _, _, *saved = torch.ops.repmtl.losses(operands, None, *config)
    assert len(saved) == len(Saved._fields)
    one = torch.ones((), dtype=dtype, device=DEVICE)
    wanted = [True] if config.stacked else [False, True]
    grads = [(one if config.tsr else None, one if config.csa else None)]
    if config.tsr and config.csa:
        grads += [(None, one), (one, None)]
    for grad_tsr, grad_csa in grads:
        torch.library.opcheck(
            torch.ops.repmtl.losses_backward.default,
            (grad_tsr, grad_csa, operands, saved, wanted, *config),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_takes_the_mask(backend: str):
    operands = [t.detach() for t in CASE.make(torch.float32)]
    present = torch.tensor([[True, False, True], [True, True, False]], device=DEVICE)
    torch.library.opcheck(torch.ops.repmtl.losses.default, (operands, present, *_config(backend)))
