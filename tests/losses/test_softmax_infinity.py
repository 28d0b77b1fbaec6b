"""A mean of -inf in a softmax: probability 0, on every backend."""

import math

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    DEVICE,
    GRAD_TOLERANCE,
    Case,
    relative_error,
    value_and_grads,
)
from masked_cases import (
    EVERY_BACKEND,
)

from repmtl_kernels import (
    reference,
    tsr_loss,
)
from repmtl_kernels.backends import choice


@pytest.mark.parametrize("over", ["tasks", "space"])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_minus_infinity_in_a_softmax(backend: str, dtype: torch.dtype, over: str):
    """A probability of exactly 0, for the reference and all others."""
    case = Case(3, 2, 4, (3, 5))
    tensors = [t.detach() for t in case.make(dtype)]
    tensors[1][0, 2, 0, 1] = tensors[1][1, :, 2] = tensors[0][0, 1, 0, 0] = -math.inf
    form = {"over": over, "normalizer": "softmax", "temperature": 0.3}
    doubled = [t.double().requires_grad_() for t in tensors]
    exact, exact_grads = value_and_grads(reference.tsr_loss, case, doubled, **form)
    tensors = [t.requires_grad_() for t in tensors]
    actual, grads = value_and_grads(tsr_loss, case, tensors, backend=backend, **form)
    assert exact.isfinite() and all(g.isfinite().all() for g in (*grads, *exact_grads))
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=1e-6)
    assert relative_error(grads, exact_grads) <= max(1e-5, GRAD_TOLERANCE[dtype])
    assert (grads[1][0, :, 0, 1] == 0).all()


@pytest.mark.parametrize("over", ["tasks", "space"])
@pytest.mark.parametrize("kind", ["nan", "inf", "nothing but -inf"])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_what_has_no_softmax_gives_nan(backend: str, kind: str, over: str):
    tensors = [t.detach() for t in Case(2, 2, 4, (3,)).make(torch.float32)]
    if kind == "nothing but -inf":
        for t in tensors:
            t[0] = -math.inf
    else:
        tensors[1][0, 0, 0] = float(kind)
        tensors[1][0, 0, 1] = -math.inf
    actual = tsr_loss(tensors, over=over, normalizer="softmax", backend=backend)
    assert actual.isnan()


@pytest.mark.parametrize("shape", [(3, 2, 70), (2, 3, 4), (17, 2, 5), (2, 2, 5000)], ids=str)
@pytest.mark.parametrize("over", ["tasks", "space"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_stage_takes_minus_infinity(backend: str, over: str, shape: tuple):
    """Whole distributions but for one of their values, as a mask makes them, and single ones."""
    x = torch.randn(shape, dtype=torch.float64)
    x = x.masked_fill(torch.rand(shape) < 0.5, -math.inf)
    x[0, :, 0] = 0
    x[:, 0] = -math.inf
    (x[0] if over == "tasks" else x[..., 0])[..., :] = 0
    x = x.to(DEVICE)
    exact_x = x.clone().requires_grad_()
    p = torch.softmax(exact_x / 0.5, 0 if over == "tasks" else 2)
    exact = -(p * p.where(p != 0, 1).log()).sum(0 if over == "tasks" else 2).mean()
    (exact_grad,) = torch.autograd.grad(exact, exact_x)
    options = {"over": over, "normalizer": "softmax", "temperature": 0.5, "eps": 0.0}
    stage = choice.load(backend).entropy
    actual = stage(x.float(), with_grad=True, **options)
    torch.testing.assert_close(actual.value.double(), exact.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(actual.grad.double(), exact_grad, rtol=1e-4, atol=1e-8)
    assert (actual.grad[x == -math.inf] == 0).all()
    assert torch.equal(stage(x.float(), with_grad=False, **options).value, actual.value)
