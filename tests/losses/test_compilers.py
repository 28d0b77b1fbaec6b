"""torch.compile, function transforms and the registered operators."""

import contextlib
import io
import shutil

import pytest
import torch
from cases import BACKENDS as ALL_BACKENDS
from cases import DEVICE, LOSSES, Case, Loss, relative_error, supports
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacrev, jvp, vmap

from repmtl_kernels import RepMTL, RepMTLLoss, csa_loss, rep_mtl_loss, tsr_loss
from repmtl_kernels._ground.record import Saved
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions
from repmtl_kernels.backends.availability import refusal
from repmtl_kernels.backends.native import library as native_library

CASE = Case(2, 3, 12, (3, 3))


def _grads(function, tensors):
    return torch.autograd.grad(function(*tensors), tensors)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# A compiler sees one operator whatever the backend: for it, native is eager once more.
BACKENDS = [name for name in ALL_BACKENDS if name != "native"]
# For the table of docs/compatibility.md, once on each.
EVERY_BACKEND = ["reference", *ALL_BACKENDS]
BOTH = next(loss for loss in LOSSES if loss.name == "rep_mtl_loss")
BACKENDS_AND_LOSSES = [(b, loss) for b in BACKENDS for loss in LOSSES]
BACKENDS_AND_LOSSES += [(b, BOTH) for b in EVERY_BACKEND if b not in BACKENDS]


@pytest.mark.cell("`torch.compile(fullgraph=True)`")
@pytest.mark.parametrize(
    ("backend", "loss"), BACKENDS_AND_LOSSES, ids=lambda x: getattr(x, "name", x)
)
def test_compile_full_graph(backend: str, loss: Loss):
    def function(*s):
        return loss.public([x * 2 for x in s], backend=backend) * 3

    tensors = CASE.make(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    for actual, expected in zip(_grads(compiled, tensors), _grads(function, tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("where", ["call", "backward", "region"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_changes_nothing_of_a_compiled_loss(backend: str, where: str):
    """Around the compiled call, around its backward, or inside the region."""

    def autocast(here: str):
        return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=here == where)

    def function(*s):
        with autocast("region"):
            return csa_loss(list(s), backend=backend)

    tensors = CASE.make(torch.float32)
    # aot_eager calls the backward's operators one by one, under the autocast that is around them.
    compiler = "inductor" if (backend, where) == ("reference", "backward") else "aot_eager"
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    with autocast("call"):
        actual = compiled(*tensors)
    with autocast("backward"):
        grads = torch.autograd.grad(actual, tensors)
    expected = csa_loss(tensors, backend=backend)
    torch.testing.assert_close(actual, expected)
    assert relative_error(grads, torch.autograd.grad(expected, tensors)) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    def function(*s):
        return rep_mtl_loss([x.tanh() for x in s]).total

    tensors = CASE.make(torch.float32)
    compiled = torch.compile(function, fullgraph=True)
    for actual, expected in zip(_grads(compiled, tensors), _grads(function, tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.cell("the same, any batch and image size, forward and backward in three compilations")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_compile_with_dynamic_shapes(backend: str):
    """One compilation of constant sizes, one for the batch and one for the image; then no more."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(*s):
        return rep_mtl_loss(list(s), backend=backend).total

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    sizes = [(3, 3, 3), (2, 3, 3), (2, 2, 4), (3, 2, 5), (4, 3, 2), (2, 5, 4)]  # N < C and N > C
    counts = []
    for batch, *image in sizes:
        shape = (batch, 7, *image)
        tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]
        actual, expected = compiled(*tensors), loss(*tensors)
        torch.testing.assert_close(actual, expected)
        grads, expected_grads = (torch.autograd.grad(x, tensors) for x in (actual, expected))
        torch.testing.assert_close(grads, expected_grads)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3, 3, 3]


@pytest.mark.cell("`torch.func.grad`")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_func_grad(backend: str, loss: Loss):
    tensors = CASE.make(torch.float32)
    expected = torch.autograd.grad(loss.public(tensors, backend=backend), tensors)
    actual = torch.func.grad(lambda *s: loss.public(s, backend=backend), argnums=(0, 1))(*tensors)
    for f, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.cell("`torch.compile` of two nested `torch.func.grad`: the second-order step")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
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
    actual = torch.compile(torch.func.grad(regularizer), fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(actual, expected)
    z.requires_grad_()
    (plain,) = torch.autograd.grad(regularizer(z), z)
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize("graph", [True, False], ids=["requires grad", "detached"])
def test_func_grad_of_leaves_inside_compile(graph: bool):
    """The compiler traces a second derivative for inputs that require a gradient."""
    (s,) = Case(2, 3, 12, (3, 3), "stacked").make(torch.float32)
    compiled = torch.compile(torch.func.grad(tsr_loss), fullgraph=True, backend="aot_eager")
    if graph:
        ours = "inputs of torch.func.grad .*torch.no_grad"
        if torch.__version__.startswith("2.11."):  # hides a message behind one of its own
            ours = "PyNode has already been deallocated"
        with pytest.raises(Exception, match=ours):
            compiled(s)
        with torch.no_grad():
            actual = compiled(s)
    else:
        actual = compiled(s.detach())
    torch.testing.assert_close(actual, torch.func.grad(tsr_loss)(s).detach())


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


def refused_but_by_the_reference(refused, backend: str, error, match: str):
    return contextlib.nullcontext() if backend == "reference" else refused(error, match)


@pytest.mark.cell("second derivative with respect to the saliencies")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_second_derivative_by_function_transforms_is_refused(backend: str, refused):
    tensors = CASE.make(torch.float32)

    def inner(s):
        return grad(lambda s: tsr_loss([s, tensors[1]], backend=backend))(s).sum()

    with refused_but_by_the_reference(refused, backend, RuntimeError, "repmtl_kernels.reference"):
        assert grad(inner)(tensors[0]).abs().max() > 0


@pytest.mark.cell("`torch.func.jvp`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_forward_mode_is_refused(backend: str, refused):
    (s,) = Case(2, 3, 12, (3, 3), "stacked").make(torch.float32)
    s = s.detach()

    def loss(s):
        return rep_mtl_loss(s, backend=backend).total

    with refused_but_by_the_reference(refused, backend, NotImplementedError, "reverse mode only"):
        _, tangent = jvp(loss, (s,), (s.sign(),))
        expected = (grad(loss)(s) * s.sign()).sum()
        torch.testing.assert_close(tangent, expected, check_dtype=False)


@pytest.mark.cell("`torch.autograd.grad(is_grads_batched=True)`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_batched_gradients_are_refused(backend: str, refused):
    tensors = CASE.make(torch.float32)
    total = rep_mtl_loss(tensors, backend=backend).total
    single = torch.autograd.grad(total, tensors, retain_graph=True)
    seeds = torch.tensor([1.0, -2.0], device=DEVICE)
    with refused_but_by_the_reference(refused, backend, RuntimeError, "is_grads_batched"):
        actual = torch.autograd.grad(total, tensors, seeds, is_grads_batched=True)
        for f, s in zip(actual, single, strict=True):
            torch.testing.assert_close(f, torch.stack([s, -2 * s]))


# --- vmap ---

SEEDS = 2


def per_seed(backend: str, **options):
    def loss(a, b):
        return rep_mtl_loss([a, b], backend=backend, **options).total

    return loss


def saliencies_of_seeds() -> tuple[torch.Tensor, torch.Tensor]:
    """Mapped over another dimension in each."""
    a, b = (torch.randn(SEEDS, 3, 6, 2, 2, device=DEVICE) for _ in range(2))
    return a, b.movedim(0, 2)


@pytest.mark.cell("`torch.vmap` over seeds")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap_is_the_loop(backend: str):
    a, b = saliencies_of_seeds()
    loss = per_seed(backend)
    loop = torch.stack([loss(a[i], b[:, :, i]) for i in range(SEEDS)])
    torch.testing.assert_close(vmap(loss, (0, 2))(a, b), loop)
    shared = torch.stack([loss(a[i], a[0]) for i in range(SEEDS)])
    torch.testing.assert_close(vmap(loss, (0, None))(a, a[0]), shared)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap_over_masks(backend: str):
    a, b = saliencies_of_seeds()[0][:2]
    masks = torch.rand(SEEDS, 2, 3, device=DEVICE) < 0.6

    def loss(mask):
        return rep_mtl_loss([a, b], backend=backend, present=mask).csa

    torch.testing.assert_close(vmap(loss)(masks), torch.stack([loss(mask) for mask in masks]))


@pytest.mark.cell("`torch.vmap` of `torch.func.grad`, and the other way round")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap_and_grad(backend: str):
    a, b = saliencies_of_seeds()
    derivative = grad(per_seed(backend), argnums=(0, 1))
    each = [derivative(a[i], b[:, :, i]) for i in range(SEEDS)]
    loop = [torch.stack(g) for g in zip(*each, strict=True)]
    torch.testing.assert_close(list(vmap(derivative, (0, 2))(a, b)), loop)

    def whole(a, b):
        return vmap(per_seed(backend), (0, 2))(a, b).sum()

    actual = grad(whole, argnums=(0, 1))(a, b)
    torch.testing.assert_close([actual[0], actual[1].movedim(2, 0)], loop)
    a.requires_grad_()
    (plain,) = torch.autograd.grad(whole(a, b), a)
    torch.testing.assert_close(plain, loop[0])


@pytest.mark.cell("`torch.func.jacrev`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_jacobian(backend: str):
    (s,) = Case(2, 3, 12, (3, 3), "stacked").make(torch.float32)

    def parts(s):
        return torch.stack(rep_mtl_loss(s, backend=backend)[1:])

    expected = [torch.autograd.grad(part, s, retain_graph=True)[0] for part in parts(s)]
    torch.testing.assert_close(jacrev(parts)(s.detach()), torch.stack(expected))


@pytest.mark.cell("`torch.compile` of `torch.vmap` of `torch.func.grad`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap_inside_compile(backend: str):
    mapped = vmap(grad(per_seed(backend)), (0, 2))
    a, b = saliencies_of_seeds()
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), mapped(a, b))


def test_the_second_order_step_over_seeds():
    """An ensemble of heads in one call: saliencies, the losses on them, and their gradient."""
    heads = torch.randn(SEEDS, 2, 6, 12, device=DEVICE)
    z = torch.randn(4, 12, 5, device=DEVICE)

    def regularizer(heads):
        def saliency(w):
            return grad(lambda z: torch.einsum("oc,bcn->bon", w, z).tanh().sum())(z)

        return rep_mtl_loss([saliency(w) for w in heads], backend="eager").total

    actual = vmap(grad(regularizer))(heads)
    loop = torch.stack([grad(regularizer)(h) for h in heads])
    torch.testing.assert_close(actual, loop)


# --- torch.export ---


class Objective(torch.nn.Module):
    """Parameters before the loss, so that what is exported can be trained."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.loss = RepMTLLoss(lambda_tsr=0.7, lambda_csa=1.3, backend=backend)
        self.weight = torch.nn.Parameter(torch.randn(6, 6, device=DEVICE))

    def forward(self, a, b, present=None):
        mixed = torch.einsum("oc,bchw->bohw", self.weight, a).tanh()
        return self.loss([mixed, b], present).total


@pytest.mark.cell("`torch.export` of a module with `RepMTLLoss`: any size, saved, trained")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_export(backend: str):
    refusal.cache_clear()  # what is asked while PyTorch records must not be recorded
    native_library.status.cache_clear()
    module = Objective(backend)
    sizes = [(3, 4, 5), (5, 2, 3)]
    a, b = (torch.randn(3, 6, 4, 5, device=DEVICE) for _ in range(2))
    dims = dict(zip((0, 2, 3), map(torch.export.Dim, ("B", "H", "W")), strict=True))
    exported = torch.export.export(module, (a, b), dynamic_shapes={"a": dims, "b": dims})
    file = io.BytesIO()
    torch.export.save(exported.run_decompositions(), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, *image in sizes:
        a, b = (torch.randn(batch, 6, *image, device=DEVICE) for _ in range(2))
        actual, expected = loaded(a, b), module(a, b)
        torch.testing.assert_close(actual, expected)
        found_grad = torch.autograd.grad(actual, loaded.weight)
        torch.testing.assert_close(found_grad, torch.autograd.grad(expected, module.weight))
    if backend != "reference":
        targets = [str(node.target) for node in exported.graph.nodes]
        assert [t for t in targets if t.startswith("repmtl")] == ["repmtl.losses.default"]


def test_export_with_a_mask():
    module = Objective("eager")
    a, b = (torch.randn(3, 6, 4, 4, device=DEVICE) for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)
    exported = torch.export.export(module, (a, b, mask)).module()
    other = ~mask
    assert not torch.equal(module(a, b, mask), module(a, b, other))
    torch.testing.assert_close(exported(a, b, other), module(a, b, other))


class Step(torch.nn.Module):
    """With the saliencies inside."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Conv1d(6, 2, 1, device=DEVICE) for _ in range(2))
        self.criterion = RepMTL(0.1, 0.1, backend=backend)

    def forward(self, z):
        return self.criterion([head(z).square().mean() for head in self.heads], z)


@pytest.mark.cell("`torch.export` of `RepMTL` in training")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_export_of_saliencies_is_refused(backend: str, refused):
    step = Step(backend)
    z = torch.randn(3, 6, 4, device=DEVICE, requires_grad=True)
    with refused(ValueError, r"torch.export loses gradients .* eval\(\) mode .* RepMTLLoss"):
        torch.export.export(step, (z,))
    step.eval()
    torch.testing.assert_close(torch.export.export(step, (z,)).module()(z), step(z))


# --- the operators ---


def _config(backend: str, **changes) -> Config:
    return Config(backend, False, 1, True, TsrOptions(), CsaOptions())._replace(**changes)


CONFIGS = {
    "both": {},
    "total": {"lambdas": Lambdas(0.7, 1.3)},
    "tsr": {"csa": None},
    "floor": {"csa": None, "tsr": TsrOptions(floor=0.1)},
    "csa": {"tsr": None},
    "stacked": {"stacked": True},
    "without gradient": {"with_grad": False},
    "recompute": {"csa": CsaOptions(memory="recompute")},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend: str, name: str):
    config = _config(backend, **CONFIGS[name])
    dtype = torch.float64 if supports(backend, torch.float64) else torch.float32
    operands = [t.detach() for t in CASE.make(dtype)]
    if config.stacked:
        operands = [torch.stack(operands)]
    torch.library.opcheck(torch.ops.repmtl.losses.default, (operands, None, None, *config.flat()))
    if not config.with_grad:
        return
    _, _, _, *saved = torch.ops.repmtl.losses(operands, None, None, *config.flat())
    assert len(saved) == len(Saved._fields)
    one = torch.ones((), dtype=dtype, device=DEVICE)
    wanted = [True] if config.stacked else [False, True]
    grads = [(None, one if config.tsr else None, one if config.csa else None)]
    if config.tsr and config.csa:
        grads += [(None, None, one), (None, one, None)]
    if config.lambdas:
        grads += [(one, None, None), (one, one, None)]
    for of_losses in grads:
        torch.library.opcheck(
            torch.ops.repmtl.losses_backward.default,
            (*of_losses, None, operands, saved, wanted, *config.flat()),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_takes_the_mask(backend: str):
    operands = [t.detach() for t in CASE.make(torch.float32)]
    present = torch.tensor([[True, False, True], [True, True, False]], device=DEVICE)
    given = operands, present, None, *_config(backend).flat()
    torch.library.opcheck(torch.ops.repmtl.losses.default, given)
