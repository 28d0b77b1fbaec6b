"""First derivatives by finite differences, incoming gradients of every kind, and no second one."""

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    FLOOR_FORMS,
    FLOOR_IDS,
    LOSSES,
    TSR_FORMS,
    TSR_IDS,
    Case,
    Loss,
    supports,
)

from repmtl_kernels import csa_loss, reference, rep_mtl_loss, tsr_loss

SMALL = [
    Case(2, 3, 3, (2, 2)),
    Case(2, 2, 5, (3,)),
    Case(3, 2, 4),
    Case(2, 2, 2, (2, 2), "stacked"),
]
EXACT = [name for name in BACKENDS if supports(name, torch.float64)]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", [*EXACT, "reference"])
def test_gradcheck(backend: str, loss: Loss, case: Case):
    tensors = case.make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *s: case.run(loss.public, list(s), backend=backend), tensors
    )


@pytest.mark.parametrize("form", TSR_FORMS + FLOOR_FORMS, ids=TSR_IDS + FLOOR_IDS)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("backend", [*EXACT, "reference"])
def test_gradcheck_of_every_distribution(backend: str, eps: float, form: dict):
    tensors = Case(3, 2, 3, (2, 2)).make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *s: tsr_loss(s, backend=backend, eps=eps, **form), tensors
    )


@pytest.mark.parametrize("eps", [0.1, 5.0, 100.0])
@pytest.mark.parametrize("backend", [*EXACT, "reference"])
def test_gradcheck_of_csa_with_eps(backend: str, eps: float):
    tensors = Case(2, 3, 3, (2, 2)).make(torch.float64)
    assert torch.autograd.gradcheck(lambda *s: csa_loss(s, backend=backend, eps=eps), tensors)


@pytest.mark.parametrize("form", TSR_FORMS + FLOOR_FORMS, ids=TSR_IDS + FLOOR_IDS)
def test_reference_supports_second_derivatives_of_tsr(form: dict):
    tensors = Case(2, 2, 2, (2,)).make(torch.float64)
    assert torch.autograd.gradgradcheck(lambda *s: reference.tsr_loss(s, **form), tensors)
    assert torch.autograd.gradgradcheck(
        lambda *s: tsr_loss(s, backend="reference", **form), tensors
    )


def test_reference_supports_second_derivatives_of_csa():
    tensors = Case(2, 2, 2, (3,)).make(torch.float64)
    assert torch.autograd.gradgradcheck(lambda *s: reference.csa_loss(s), tensors)
    assert torch.autograd.gradgradcheck(
        lambda *s: rep_mtl_loss(s, backend="reference").total, tensors
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused_by_name(backend: str, loss: Loss):
    tensors = Case(2, 2, 3, (2, 2)).make(torch.float32)
    value = loss.public(tensors, backend=backend)
    grads = torch.autograd.grad(value, tensors, create_graph=True)  # asking for a graph is fine
    with pytest.raises(RuntimeError, match="repmtl_kernels.reference"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_of_any_strides(backend: str, loss: Loss):
    """The scalar's gradient arrives scaled, expanded, or as an element of a strided tensor."""
    tensors = Case(2, 3, 12, (3, 3)).make(torch.float32)
    (plain,) = torch.autograd.grad(loss.public(tensors, backend=backend), tensors[:1])
    weights = torch.arange(8.0, device=DEVICE)[::2]
    ways = {
        "expanded": (lambda v: v.expand(4, 2).sum(), 8.0),
        "strided": (lambda v: (v.repeat(4) * weights).sum(), 12.0),
        "negative": (lambda v: -2.5 * v, -2.5),
        "zero": (lambda v: 0.0 * v, 0.0),
        "double": (lambda v: (v.double() * 3.0).sum(), 3.0),
    }
    for name, (use, factor) in ways.items():
        (grad,) = torch.autograd.grad(use(loss.public(tensors, backend=backend)), tensors[:1])
        torch.testing.assert_close(grad, factor * plain, rtol=1e-5, atol=1e-7, msg=name)
    value = loss.public(tensors, backend=backend)
    incoming = torch.full((2, 3), 0.5, device=DEVICE).T[1, 1].expand(())
    (grad,) = torch.autograd.grad(value, tensors[:1], grad_outputs=incoming)
    torch.testing.assert_close(grad, 0.5 * plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed(backend: str, loss: Loss):
    tensors = Case(3, 2, 12, (3, 3)).make(torch.float32)
    full = torch.autograd.grad(loss.public(tensors, backend=backend), tensors)
    for needed in ([0], [2], [0, 1]):
        some = [t if i in needed else t.detach() for i, t in enumerate(tensors)]
        value = loss.public(some, backend=backend)
        grads = torch.autograd.grad(value, [some[i] for i in needed])
        for i, grad in zip(needed, grads, strict=True):
            assert torch.equal(grad, full[i])


@pytest.mark.parametrize(
    "weights",
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 0), (2, 0, 3), (0, 2, 3), (2, 3, 5)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_sum_of_the_three_results(backend: str, weights: tuple[int, ...]):
    """The total and its parts are results of one call, and each may have a gradient."""
    tensors = Case(2, 3, 12, (2, 3)).make(torch.float32)

    def gradients(saliencies, backend):
        losses = rep_mtl_loss(saliencies, lambda_tsr=0.7, lambda_csa=1.3, backend=backend)
        value = sum(w * loss for w, loss in zip(weights, losses, strict=True) if w)
        return torch.stack(torch.autograd.grad(value, saliencies))

    doubles = [s.detach().double().requires_grad_() for s in tensors]
    exact = gradients(doubles, "reference")
    error = (gradients(tensors, backend).double() - exact).norm()
    assert error <= 1e-5 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_losses_on_one_representation(backend: str):
    """Gradients accumulate in Z, graphs are kept, and no loss writes what the other one reads."""
    z = torch.randn(2, 8, 3, 3, device=DEVICE, requires_grad=True)
    weights = [torch.randn(8, 8, device=DEVICE) for _ in range(2)]

    def saliencies():
        return [torch.einsum("oc,bchw->bohw", w, z).tanh() for w in weights]

    expected = torch.zeros_like(z)
    for loss in (tsr_loss, csa_loss):
        expected += torch.autograd.grad(loss(saliencies(), backend="reference"), z)[0]
    shared = saliencies()
    tsr_loss(shared, backend=backend).backward(retain_graph=True)
    csa_loss(shared, backend=backend).backward(retain_graph=True)
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-6)
    z.grad = None
    losses = rep_mtl_loss(shared, lambda_tsr=1.0, lambda_csa=1.0, backend=backend)
    losses.total.backward(retain_graph=True)
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-6)
    z.grad = None
    losses.tsr.backward(retain_graph=True)
    losses.csa.backward()
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stacked"])
def test_gradient_of_tsr_alone_is_expanded_along_the_channels(backend: str, layout: str):
    case = Case(2, 2, 12, (3, 4), layout)
    tensors = case.make(torch.float32)
    grads = torch.autograd.grad(case.run(tsr_loss, tensors, backend=backend), tensors)
    for grad in grads:
        assert grad.stride(-3) == 0
        assert grad.untyped_storage().nbytes() <= 4 * 2 * 2 * 12  # (T, B, N) at the most


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_has_the_layout_of_the_saliency(backend: str):
    tensors = Case(2, 2, 12, (3, 4), "channels_last").make(torch.float32)
    for grad in torch.autograd.grad(csa_loss(tensors, backend=backend), tensors):
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_the_same_tensor_for_two_tasks():
    """Its gradient is the sum of both."""
    for backend in BACKENDS:
        (s,) = Case(1, 2, 12, (3, 4)).make(torch.float32)
        (once,) = torch.autograd.grad(csa_loss([s, s], backend=backend), s)
        (exact,) = torch.autograd.grad(csa_loss([s, s], backend="reference"), s)
        torch.testing.assert_close(once, exact, rtol=1e-4, atol=1e-6)
