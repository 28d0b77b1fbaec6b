"""Scales, zeros and NaN: exact without eps, over the whole range of float32."""

import sys

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    DEVICE,
    GRAD_TOLERANCE,
    LOSSES,
    LUCK,
    Case,
    Loss,
    allowed,
    doubles,
    relative_error,
    value_and_grads,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from repmtl_kernels import csa_loss, reference, rep_mtl_loss, tsr_loss
from repmtl_kernels.backends.eager import contrast as eager_contrast

SHAPES = [Case(2, 3, 24, (4, 4)), Case(3, 3, 9, (5, 4))]  # N side, C side


def _normalized_grads(loss: Loss, tensors, backend: str, scale: float):
    value = loss.public(tensors, backend=backend)
    return value, [g.double() * scale for g in torch.autograd.grad(value, tensors)]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e-7, 1e7, 1e20, 1e30])
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_do_not_depend_on_the_scale(backend: str, loss: Loss, case: Case, scale: float):
    unit = loss.literal(case.make(torch.float64))
    unit_grads = torch.autograd.grad(loss.literal(tensors := case.make(torch.float64)), tensors)
    value, grads = _normalized_grads(loss, case.make(torch.float32, scale=scale), backend, scale)
    assert abs(value.item() - unit.item()) < 2e-6
    assert relative_error(grads, unit_grads) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_has_the_range_of_float32(backend: str, scale: float):
    case = SHAPES[0]
    tensors = case.make(torch.bfloat16, scale=scale)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = [g * scale for g in torch.autograd.grad(reference.csa_loss(doubles), doubles)]
    _, grads = _normalized_grads(LOSSES[1], tensors, backend, scale)
    assert relative_error(grads, exact) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_saliencies_that_are_subnormal(backend: str):
    """Their products are all zero in float16: 1e-6 squared is below its smallest number."""
    tensors = SHAPES[0].make(torch.float16, scale=1e-6)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.csa_loss(doubles)
    assert abs(csa_loss(tensors, backend=backend).item() - exact.item()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_sums_over_many_positions(backend: str):
    """An element of the Gram matrix is larger than float16 has numbers."""
    case = Case(1, 2, 4, (100_000,))
    tensors = [
        (0.7 + 0.3 * t.detach().sigmoid()).requires_grad_() for t in case.make(torch.float16)
    ]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    products = doubles[0].detach() @ doubles[0].detach().mT
    assert products.amax((1, 2)).min() > torch.finfo(torch.float16).max
    assert doubles[0].max() < 1  # else they are halved first
    exact = [g * 1e4 for g in torch.autograd.grad(reference.csa_loss(doubles), doubles)]
    # A gradient of 1e-6 would itself be lost in float16.
    grads = torch.autograd.grad(csa_loss(tensors, backend=backend) * 1e4, tensors)
    assert relative_error(grads, exact) < 1e-2


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tasks_of_very_different_scales(backend: str, loss: Loss):
    tensors = [
        (t.detach() * s).requires_grad_()
        for t, s in zip(SHAPES[0].make(torch.float32), (1.0, 1e-12), strict=True)
    ]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = loss.literal(doubles)
    exact_grads = torch.autograd.grad(exact, doubles)
    value = loss.public(tensors, backend=backend)
    grads = torch.autograd.grad(value, tensors)
    assert abs(value.item() - exact.item()) < 2e-6
    for grad, exact_grad in zip(grads, exact_grads, strict=True):  # each task on its own scale
        assert relative_error([grad], [exact_grad]) < 2e-5


@pytest.mark.parametrize("samples", [[0], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tasks", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_zero_saliencies(backend, dtype, loss: Loss, tasks: list[int], samples: list[int]):
    """Similarity, entropy and gradient of what is exactly zero are 0, and nothing is NaN."""
    tensors = SHAPES[0].make(dtype)
    with torch.no_grad():
        for t in tasks:
            tensors[t][samples] = 0
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = loss.literal(doubles)
    exact_grads = torch.autograd.grad(exact, doubles)
    value = loss.public(tensors, backend=backend)
    grads = torch.autograd.grad(value, tensors)
    assert abs(value.item() - exact.item()) < (1e-2 if dtype.itemsize == 2 else 2e-6)
    for t, (grad, exact_grad) in enumerate(zip(grads, exact_grads, strict=True)):
        assert torch.isfinite(grad).all() and torch.isfinite(exact_grad).all()
        if t in tasks and loss.name == "csa_loss" and tasks == [0, 1]:
            assert (grad[samples] == 0).all()
        # Relative to the gradient, or to the larger terms that cancel in it.
        bound, terms = (1e-2, 1e-2) if dtype.itemsize == 2 else (1e-5, 1e-3)
        assert (grad.double() - exact_grad).norm() <= bound * max(terms, exact_grad.norm())


@pytest.mark.parametrize("normalizer", ["abs", "softmax"])
@pytest.mark.parametrize("over", ["tasks", "space"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_in_every_distribution(backend: str, over: str, normalizer: str):
    tensors = [torch.zeros(2, 3, 4, 4, device=DEVICE, requires_grad=True) for _ in range(2)]
    value = tsr_loss(tensors, over=over, normalizer=normalizer, backend=backend)
    grads = torch.autograd.grad(value, tensors)
    uniform = torch.tensor(2.0 if over == "tasks" else 16.0).log()
    expected = 0.0 if normalizer == "abs" else uniform.item()
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert all(g.abs().max() < 1e-7 for g in grads)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_nan_is_not_hidden(backend, dtype, loss: Loss, case: Case, where: str):
    tensors = case.make(dtype)
    with torch.no_grad():
        tensors[-1].view(-1)[0 if where == "first" else -1] = float("nan")
    value = loss.public(tensors, backend=backend)
    assert torch.isnan(value)
    grads = torch.autograd.grad(value, tensors)
    assert torch.isnan(grads[-1]).any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_gives_nan(backend: str, loss: Loss):
    tensors = SHAPES[0].make(torch.float32)
    with torch.no_grad():
        tensors[0].view(-1)[5] = float("inf")
    assert torch.isnan(loss.public(tensors, backend=backend))


@settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tasks=st.integers(1, 4),
    batch=st.integers(2, 5),
    channels=st.integers(1, 40),
    positions=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_scale(backend, tasks, batch, channels, positions, exponent, spread, seed):
    """Value and gradient of the fused loss, each task within `spread` decades of 10^exponent."""
    case = Case(tasks, batch, channels, (positions,))
    scales = [10.0 ** max(-30, exponent - spread * t / max(1, tasks - 1)) for t in range(tasks)]
    unit = _with_means_of_their_own_size(case.make(torch.float64, seed=seed), seed)
    rounded = [(t * s).float().requires_grad_() for t, s in zip(unit, scales, strict=True)]
    doubles = [t.detach().double().requires_grad_() for t in rounded]
    options = {"lambda_tsr": 1.0, "lambda_csa": 1.0}
    exact = rep_mtl_loss(doubles, backend="reference", **options)
    actual = rep_mtl_loss(rounded, backend=backend, **options)
    assert abs(actual.total.item() - exact.total.item()) < 2e-6 * max(1.0, abs(exact.total.item()))
    # The floor is rounding's share of the terms that cancel, which are of order 1 / |S_bt|.
    for part, floor in (("tsr", 1e-6), ("total", 3e-6)):
        grads = torch.autograd.grad(getattr(actual, part), rounded, retain_graph=True)
        exact_grads = torch.autograd.grad(getattr(exact, part), doubles, retain_graph=True)
        for grad, exact_grad, s in zip(grads, exact_grads, doubles, strict=True):
            size = s.detach().norm(dim=(1, 2), keepdim=True)
            error = ((grad.double() - exact_grad) * size).norm()
            assert error <= 1e-5 * (exact_grad * size).norm() + floor, part


def _with_means_of_their_own_size(saliencies: list[Tensor], seed: int) -> list[Tensor]:
    """Means over the channels from 0.4 to 2.7, of one sign for a task and sample.

    The entropy of values u with the sum U has the second derivatives -1 / (u U) where u is small. A
    mean that nearly cancels has a rounding error of about 1e-7 |S|, so that of its gradient is
    1e-7 |S| / u in units of 1 / U: without a bound, and below 1e-7 |S| even the sign is chance.
    One sign, since the anchor of one channel is a mean too.
    """
    generator = torch.Generator().manual_seed(seed)
    actual = []
    for s in saliencies:
        shape = (len(s), 1, s.shape[2])
        means = torch.empty(shape, dtype=s.dtype).uniform_(-1, 1, generator=generator).exp()
        signs = torch.randint(0, 2, (len(s), 1, 1), generator=generator) * 2 - 1
        actual.append(s.detach() - s.detach().mean(1, keepdim=True) + (means * signs).to(DEVICE))
    return actual


@pytest.mark.parametrize("over", ["tasks", "space"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_means_that_nearly_cancel(backend: str, over: str):
    """Means down to 1e-7 of the saliencies, without an error of their own.

    Sums of integers below 2^24 are exact in any order. The entropy adds no more error than for
    other means.
    """
    tasks, batch, channels, positions = 3, 2, 24, 35
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(
        -(2**17), 2**17, (tasks, batch, channels, positions), generator=generator
    )
    sums = 2 ** torch.randint(0, 13, (tasks, batch, positions), generator=generator)
    sums *= torch.randint(0, 2, sums.shape, generator=generator) * 2 - 1
    values[:, :, -1] += sums - values.sum(2)
    assert values.abs().sum(2).max() < 2**24
    tensors = [v.to(DEVICE, torch.float32).requires_grad_() for v in values]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.tsr_loss(doubles, over=over)
    value = tsr_loss(tensors, over=over, backend=backend)
    assert abs(value.item() - exact.item()) < 2e-6
    # In units of 1 / U every position counts alike, however small its means are.
    totals = (sums / channels).abs().sum(0 if over == "tasks" else 2, keepdim=True)
    unit = (totals * channels * totals.numel()).to(DEVICE).unsqueeze(2)
    grads = torch.stack(torch.autograd.grad(value, tensors)).double() * unit
    exact_grads = torch.stack(torch.autograd.grad(exact, doubles)) * unit
    assert (grads - exact_grads).abs().max() < 5e-6


LOW_TEMPERATURES = [1e-2, 1e-3, 1e-5, 1e-7, 1e-30]


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether products of anchors are in memory all at once, or those of a few samples."""
    if request.param == "blocks":
        monkeypatch.setattr(eager_contrast, "products_at_a_time", lambda anchors: 1)
        if "triton" in BACKENDS:
            monkeypatch.setattr("repmtl_kernels.backends.triton.contrast.BUFFER", 1)


@pytest.mark.parametrize("temperature", LOW_TEMPERATURES)
@pytest.mark.parametrize(
    "case",
    [
        Case(9, 2, 6, (5,)),
        Case(1, 3, 40, (2, 2)),
        Case(2, 5, 12, (4, 5)),
        Case(3, 9, 24, (3,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_temperatures(backend: str, blocks, case: Case, temperature: float):
    """Both softmaxes of a pair of samples come from one rounding of its similarity."""
    exact, exact_grads = value_and_grads(
        reference.csa_loss, case, case.make(torch.float64), temperature=temperature
    )
    tensors = case.make(torch.float32)
    _, plain = value_and_grads(reference.csa_loss, case, tensors, temperature=temperature)
    value, grads = value_and_grads(
        csa_loss, case, tensors, temperature=temperature, backend=backend
    )
    assert abs(value.item() - exact.item()) <= 2e-6 * max(1.0, abs(exact.item()), 1 / temperature)
    plain_error = relative_error(plain, exact_grads)
    limit = allowed(GRAD_TOLERANCE[torch.float32], LUCK * plain_error)
    assert relative_error(grads, exact_grads) <= limit


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_that_are_equally_similar(backend: str, blocks, temperature: float):
    """Each has half of the softmax at any temperature: log 2 is not lost beside 1e7."""
    anchors = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])
    tensors = [anchors[:, :, None].to(DEVICE).requires_grad_()]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    value = csa_loss(tensors, temperature=temperature, backend=backend)
    exact = reference.csa_loss(doubles, temperature=temperature)
    grads, exact_grads = torch.autograd.grad(value, tensors), torch.autograd.grad(exact, doubles)
    assert relative_error(grads, exact_grads) < 4e-6


@pytest.mark.parametrize("case", [Case(t, 2, 18) for t in (16, 33, 65)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_many_pairs_of_tasks(backend: str, case: Case):
    """Equal tasks: what the sum of T^2 equal squares rounds off is all to one side."""
    for seed in range(1 if backend == "triton" else 5):  # interpreted, each takes 10 seconds
        generator = torch.Generator().manual_seed(seed)
        one = torch.rand(case.batch, case.channels, 1, generator=generator).to(DEVICE)
        tensors = [one.clone().requires_grad_() for _ in range(case.tasks)]
        exact, exact_grads = value_and_grads(reference.csa_loss, case, doubles(tensors))
        value, grads = value_and_grads(csa_loss, case, tensors, backend=backend)
        assert abs(value.item() - exact.item()) <= 2e-6
        scale = max(1.0, sum(g.norm() for g in exact_grads).item())
        assert max((g - e).norm() for g, e in zip(grads, exact_grads, strict=True)) <= 4e-6 * scale


@pytest.mark.parametrize("eps", [1e-38, 1e-39, 1e-45, 1e-50, sys.float_info.min, 5e-324])
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_eps_that_float32_holds_as_zero_or_subnormal(backend, loss: Loss, case: Case, eps: float):
    """As near to no eps as it is: what is exactly zero has similarity, entropy and gradient 0."""
    tensors = case.make(torch.float32)
    with torch.no_grad():
        tensors[0][0], tensors[1][:2], tensors[-1][:2] = 0, 0, 0
    value, grads = value_and_grads(loss.public, case, tensors, backend=backend, eps=eps)
    without, without_grads = value_and_grads(loss.public, case, tensors, backend=backend)
    assert value.item() == pytest.approx(without.item(), abs=1e-6)
    torch.testing.assert_close(grads, without_grads)


@pytest.mark.parametrize("scale", [1e-10, 1e-25, 1e-30, 1e15])
@pytest.mark.parametrize("exponent", [-3, 0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_of_the_size_of_the_norms(backend: str, scale: float, exponent: int):
    """Down to 1e-63, far below what float32 holds."""
    case = SHAPES[0]
    eps = scale**2 * 10.0**exponent
    exact, exact_grads = value_and_grads(
        reference.csa_loss, case, doubles(case.make(torch.float32, scale=scale)), eps=eps
    )
    value, grads = value_and_grads(
        csa_loss, case, case.make(torch.float32, scale=scale), backend=backend, eps=eps
    )
    assert abs(value.item() - exact.item()) < 2e-6
    assert relative_error(grads, exact_grads) < 1e-5
