"""Values and gradients of every backend against the reference in float64."""

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    CASES,
    DEVICE,
    FLOOR_FORMS,
    FLOOR_IDS,
    LOSSES,
    TSR_FORMS,
    TSR_IDS,
    Case,
    Loss,
    judge,
    supports,
    value_and_grads,
)

from repmtl_kernels import csa_loss, reference, rep_mtl_loss, tsr_loss

TSR, CSA, FUSED, FLOOR = LOSSES


@pytest.mark.decisive
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_every_case(backend: str, dtype: torch.dtype, case: Case):
    judge(FUSED, case, dtype, backend)


@pytest.mark.parametrize("loss", [TSR, CSA, FLOOR], ids=lambda loss: loss.name)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_every_case_of_one_loss(backend: str, dtype: torch.dtype, case: Case, loss: Loss):
    judge(loss, case, dtype, backend)


@pytest.mark.parametrize("form", TSR_FORMS + FLOOR_FORMS, ids=TSR_IDS + FLOOR_IDS)
@pytest.mark.parametrize(
    "case", [Case(3, 2, 8, (5, 6)), Case(2, 3, 5), Case(2, 2, 3, (30, 41))], ids=str
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_distributions(backend: str, dtype: torch.dtype, case: Case, form: dict):
    judge(TSR, case, dtype, backend, **form)


@pytest.mark.parametrize("eps", [1e-8, 1e-2, 1e3])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_eps_is_the_usual_guard(backend: str, dtype: torch.dtype, loss: Loss, eps: float):
    judge(loss, Case(3, 3, 12, (3, 4)), dtype, backend, eps=eps)


@pytest.mark.decisive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # Tiles of 128: N side, C side.
        pytest.param(Case(1, 2, 360, (8, 43)), torch.bfloat16, marks=pytest.mark.gpu),
        (Case(1, 2, 610, (26, 25)), torch.bfloat16),
        (Case(1, 2, 610, (26, 25)), torch.float16),  # a gradient of 5e-7
        # Tiles of 64 whose rows start at any address: N side, C side.
        (Case(1, 2, 209, (13, 15)), torch.float32),
        (Case(1, 2, 195, (11, 19)), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_tiles(backend: str, case: Case, dtype: torch.dtype):
    judge(LOSSES[1], case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_fused_loss(backend: str):
    case = Case(3, 4, 10, (3, 4))
    dtype = torch.float64 if supports(backend, torch.float64) else torch.float32
    tensors = case.make(dtype)
    actual = rep_mtl_loss(tensors, lambda_tsr=0.7, lambda_csa=1.3, backend=backend)
    torch.testing.assert_close(actual.tsr, reference.tsr_loss(tensors).to(actual.tsr.dtype))
    torch.testing.assert_close(actual.csa, reference.csa_loss(tensors).to(actual.csa.dtype))
    torch.testing.assert_close(actual.total, 0.7 * actual.tsr + 1.3 * actual.csa)
    for part, literal in ((actual.tsr, reference.tsr_loss), (actual.csa, reference.csa_loss)):
        grads = torch.autograd.grad(part, tensors, retain_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad(literal(tensors), tensors))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_present_averages_over_the_tasks_that_are_there(backend: str):
    case = Case(3, 4, 10, (3, 4))
    tensors = case.make(torch.float32)
    present = torch.tensor(
        [[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool, device=tensors[0].device
    )
    with torch.no_grad():  # a task without a label has no saliency there; sample 3 has none at all
        for t, s in enumerate(tensors):
            s[~present[t]] = 0
    actual, grads = value_and_grads(
        LOSSES[1].public, case, tensors, backend=backend, present=present
    )
    doubled = [t.detach().double().requires_grad_() for t in tensors]
    exact, exact_grads = value_and_grads(reference.csa_loss, case, doubled, present=present)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)
    for g, e in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-6)
    everywhere = LOSSES[1].public(tensors, backend=backend)
    assert abs(everywhere - actual) > 1e-3  # the mask matters


def test_present_by_hand():
    """Two samples, two tasks, one missing label: eq. 9 with the mean over one task."""
    s = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    s[1, 1] = 0
    present = torch.tensor([[True, True], [True, False]])
    affinity = [[m / m.norm() if m.norm() else m for m in x @ x.mT] for x in s]
    a = s.mean(-1)
    anchors = [sum(torch.outer(a[t, b], a[t, b]) for t in range(2)) for b in range(2)]
    anchors = [m / m.norm() for m in anchors]
    r = (anchors[0] * anchors[1]).sum()
    similarity = [[(anchors[b] * affinity[t][b]).sum() for b in range(2)] for t in range(2)]
    first = -(similarity[0][0] + similarity[1][0]) / 2 / 0.5 + r / 0.5
    second = -similarity[0][1] / 0.5 + r / 0.5
    expected = (first + second) / 2
    torch.testing.assert_close(reference.csa_loss(list(s), present=present), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_gives_the_same_value(backend: str):
    tensors = Case(2, 3, 20, (4, 5)).make(torch.float32)
    with_graph = rep_mtl_loss(tensors, backend=backend).total
    with torch.no_grad():
        without = rep_mtl_loss(tensors, backend=backend).total
    assert not without.requires_grad
    assert torch.equal(without, with_graph.detach())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_changes_nothing(backend: str, loss: Loss, backward: bool):
    tensors = Case(2, 3, 20, (4, 5)).make(torch.float32)
    expected = loss.public(tensors, backend=backend)
    expected_grads = torch.autograd.grad(expected, tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = loss.public(tensors, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=backward):
        grads = torch.autograd.grad(actual, tensors)
    assert torch.equal(actual, expected)
    assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [(True, False), (False, True), (True, True)], ids=str)
def test_autocast_changes_no_second_derivative(dtype: torch.dtype, where: tuple[bool, bool]):
    """Around the first backward pass, around the second, around both."""
    case = Case(2, 3, 20, (4, 5))

    def second(first_inside: bool, second_inside: bool) -> list[torch.Tensor]:
        tensors = case.make(dtype)
        value = case.run(csa_loss, tensors, backend="reference")
        with torch.autocast(DEVICE, dtype=torch.float16, enabled=first_inside):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
        with torch.autocast(DEVICE, dtype=torch.float16, enabled=second_inside):
            size = sum(g.float().square().sum() for g in grads)
            return [*grads, *torch.autograd.grad(size, tensors)]

    for actual, expected in zip(second(*where), second(False, False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacrev"])
def test_autocast_changes_no_transform(backend: str, transform: str):
    s = torch.randn(2, 3, 8, 5, device=DEVICE)

    def loss(s: torch.Tensor) -> torch.Tensor:
        return csa_loss(s, backend=backend)

    run = {
        "grad": lambda: torch.func.grad(loss)(s),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(torch.stack((s, 2 * s + 1))),
        "jacrev": lambda: torch.func.jacrev(loss)(s),
    }[transform]
    expected = run()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_default_device_changes_nothing(backend: str):
    tensors = Case(2, 3, 20, (4, 5)).make(torch.float32)
    expected = rep_mtl_loss(tensors, backend=backend).total
    with torch.device("meta"):
        actual = rep_mtl_loss(tensors, backend=backend).total
        grads = torch.autograd.grad(actual, tensors)
    assert torch.equal(actual, expected)
    for g, e in zip(grads, torch.autograd.grad(expected, tensors), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend: str, loss: Loss):
    case = Case(2, 5, 70, (6, 7))
    results = []
    for _ in range(3):
        value, grads = value_and_grads(loss.public, case, case.make(torch.float32), backend=backend)
        results.append((value, *grads))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_saved_tensors_are_not_written(backend: str):
    tensors = Case(2, 3, 20, (4, 5), "mixed").make(torch.float32)
    before = [t.detach().clone() for t in tensors]
    total = rep_mtl_loss(tensors, backend=backend).total
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    second = torch.autograd.grad(total, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t.detach(), b) for t, b in zip(tensors, before, strict=True))


# Gradients of the last two are differences of almost equal terms: they show a product that cuts off
# more than the others.
SALIENCIES = {
    "normal": lambda x: x,
    "bfloat16": lambda x: x.bfloat16().float(),
    "positive": lambda x: (x - x.min()) / (x.max() - x.min()),
    "constant": lambda x: x.mean(-1, keepdim=True) + 0.01 * x,
}


@pytest.mark.decisive
@pytest.mark.parametrize("kind", SALIENCIES)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 96, (7, 7)),
        Case(3, 2, 128, (8, 8)),
        Case(3, 2, 128, (8, 8), "channels_last"),
        Case(2, 2, 48, (8, 12)),
        Case(2, 2, 48, (8, 12), "channels_last"),
        # On Hopper tf32 has tiles of 128: N side, C side.
        pytest.param(Case(1, 2, 352, (8, 43)), marks=pytest.mark.gpu),
        pytest.param(Case(1, 2, 336, (18, 20)), marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_reduced_precision_of_float32_products(
    backend: str, precision: str, case: Case, kind: str, monkeypatch
):
    """tf32x3 is as good as float32; tf32 within its 10 bits."""
    monkeypatch.setenv("REPMTL_FP32_PRECISION", precision)
    tensors = [SALIENCIES[kind](t.detach()).requires_grad_() for t in case.make(torch.float32)]
    exact, exact_grads = value_and_grads(
        reference.csa_loss, case, [t.detach().double().requires_grad_() for t in tensors]
    )
    value, grads = value_and_grads(LOSSES[1].public, case, tensors, backend=backend)
    bound = 1e-5 if precision == "tf32x3" else 1e-3
    assert abs(value.item() - exact.item()) < bound / 5
    for g, e in zip(grads, exact_grads, strict=True):
        assert (g.double() - e).norm() <= bound * e.norm()


def test_precision_of_float32_products_is_that_of_pytorch():
    pytest.importorskip("triton")
    from repmtl_kernels.backends.triton.common import fp32_precision

    matmul = torch.backends.cuda.matmul
    for old, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(old)
        assert fp32_precision() == expected
    torch.set_float32_matmul_precision("highest")
    try:
        for new in ("tf32", "ieee"):
            matmul.fp32_precision = new
            assert fp32_precision() == new
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        assert fp32_precision() == "tf32"
    finally:
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = "ieee"


def test_tsr_of_the_paper_by_hand():
    """Eq. 4 to 6 by hand: P = (1/4, 3/4) at one position, (1, 0) at the other."""
    first = torch.tensor([[[1.0, 2.0], [1.0, 4.0]]])  # (B, C, N): means 1 and 3
    second = torch.tensor([[[-3.0, 0.0], [-3.0, 0.0]]])  # means -3 and 0
    entropy = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    for backend in ("reference", *BACKENDS):
        if backend == "triton":
            first, second = first.to("cuda" if torch.cuda.is_available() else "cpu"), second
            second = second.to(first.device)
        actual = tsr_loss([first, second], backend=backend)
        torch.testing.assert_close(actual.cpu(), entropy / 2)


def test_floor_by_hand():
    """(1, 3) and (3, 0) with a floor of 0.4 of the mean 7/4: (1.7, 3.7) and (3.7, 0.7)."""
    share = torch.tensor([[1.7, 3.7], [3.7, 0.7]])
    share = share / share.sum(1, keepdim=True)
    entropy = -(share * share.log()).sum(1).mean()
    for backend in ("reference", *BACKENDS):
        first = torch.tensor([[[1.0, 2.0], [1.0, 4.0]]], device=DEVICE)
        second = torch.tensor([[[-3.0, 0.0], [-3.0, 0.0]]], device=DEVICE, requires_grad=True)
        actual = tsr_loss([first, second], floor=0.4, backend=backend)
        torch.testing.assert_close(actual.detach().cpu(), entropy)
        (grad,) = torch.autograd.grad(actual, second)
        assert (grad[..., 1] == 0).all() and (grad[..., 0] != 0).all()  # that of |x| at 0 is 0


def test_floor_bounds_the_gradient():
    """Without, a position of next to no saliency has all of it."""
    saliencies = [torch.ones(1, 1, 50, device=DEVICE) for _ in range(2)]
    saliencies[0][..., 0], saliencies[1][..., 0] = 1e-6, 2e-6
    for backend in BACKENDS:
        largest = []
        for floor in (0.0, 0.1):
            given = [s.clone().requires_grad_() for s in saliencies]
            grads = torch.autograd.grad(tsr_loss(given, floor=floor, backend=backend), given)
            largest.append(max(g.abs().max().item() for g in grads))
        assert largest[0] > 1e3 and largest[1] < 0.1
