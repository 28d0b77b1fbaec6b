"""Inner products of the tasks' saliencies, on every backend."""

import pytest
import torch
from cases import BACKEND_DTYPES, BACKENDS, CASES, DEVICE, Case, doubles, supports
from masked_cases import mask_of
from torch import Tensor
from torch.func import grad, vmap

from repmtl_kernels import reference, saliency_affinity

EVERY_BACKEND = ["reference", *BACKENDS]
# The error of an inner product, relative to the product of the norms.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
CASE = Case(3, 4, 10, (3, 5))


def naive(saliencies: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """The products one by one, in float64; saliencies (B, C, *spatial), mask (B, *spatial)."""
    if mask is not None:
        saliencies = [s.where(mask.unsqueeze(1), 0) for s in saliencies]
    flat = [s.double().flatten(1) for s in saliencies]
    return torch.stack([torch.stack([(x * y).sum(1) for y in flat], 1) for x in flat], 1)


def canonical(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    tasks = list(tensors[0]) if case.layout == "stacked" else tensors
    return [s.movedim(case.channel_dim, 1) for s in tasks]


def error(result: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the product of the norms."""
    norms = exact.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None]
    return ((result - exact).abs() / scale.where(scale != 0, 1)).max().item()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32), *BACKEND_DTYPES])
def test_values(backend: str, dtype: torch.dtype, case: Case):
    tensors = case.make(dtype)
    result = case.run(saliency_affinity, tensors, backend=backend)
    assert result.dtype == torch.float64 and result.shape == (case.batch, case.tasks, case.tasks)
    assert torch.equal(result, result.mT) or backend == "reference"
    assert error(result, naive(canonical(case, tensors))) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["prefix", "random", "empty"])
@pytest.mark.parametrize("case", [CASE, CASES[13], CASES[15], CASES[-1]], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_masks(backend: str, dtype: torch.dtype, case: Case, kind: str):
    """Values in the padding are not used, and the gradient there is 0."""
    tensors, mask = case.make(dtype), mask_of(case, kind)
    with torch.no_grad():
        for s in canonical(case, tensors):
            s.masked_fill_(~mask.unsqueeze(1), float("nan"))
    result = case.run(saliency_affinity, tensors, backend=backend, positions=mask)
    exact = naive(canonical(case, tensors), mask)
    assert error(result, exact) < TOLERANCE[dtype]
    grads = torch.autograd.grad(result.sum(), tensors)
    for g in canonical(case, list(grads)):
        assert g.isfinite().all() and not g.masked_select(~mask.unsqueeze(1)).any()


@pytest.mark.parametrize("scales", [(1e-30, 1e-30), (1e30, 1e30), (1e-30, 1e30), (1e-38, 3e-12)])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_scales(backend: str, scales: tuple[float, float]):
    """Each task at a scale of its own, and a sample far from the others."""
    tensors = [s.detach() * scales[t % 2] for t, s in enumerate(CASE.make(torch.float32))]
    for s in tensors:
        s[1] *= 1e-3
    result = saliency_affinity(tensors, backend=backend)
    assert error(result, naive(tensors)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_peaks(backend: str):
    """One element far larger than the rest: products of the rest are not lost beside it."""
    tensors = [s.detach() for s in Case(2, 2, 64, (40, 30)).make(torch.float32)]
    tensors[0][0, 3, 7, 5] = 1e25
    tensors[1][0, 3, 7, 5] = 0
    result = saliency_affinity(tensors, backend=backend)
    assert error(result, naive(tensors)) < TOLERANCE[torch.float32]
    assert error(result[1:], naive(tensors)[1:]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_zeros_and_what_is_not_finite(backend: str):
    """Zero stays zero. NaN and infinity show in their own task's rows, and in no other sample."""
    tensors = [s.detach() for s in CASE.make(torch.float32)]
    tensors[0][0] = 0
    tensors[1][2, 0, 0, 0] = float("nan")
    tensors[2][3, 0, 0, 0] = float("inf")
    result = saliency_affinity(tensors, backend=backend)
    assert not result[0, 0].any() and result[0].isfinite().all() and result[1].isfinite().all()
    assert result[2, 1].isnan().all() and result[2, 0, 0].isfinite()
    assert result[3, 2, 2] == float("inf") and result[3, :2, :2].isfinite().all()
    assert not result[3, 2].isfinite().any()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_same_bits_again(backend: str):
    tensors = Case(3, 2, 70, (33, 40)).make(torch.float32)
    first = saliency_affinity(tensors, backend=backend)
    assert torch.equal(first, saliency_affinity(tensors, backend=backend))


@pytest.mark.parametrize("case", [CASE, CASES[15], CASES[-1]], ids=str)
@pytest.mark.parametrize("backend", [b for b in EVERY_BACKEND if supports(b, torch.float64)])
def test_gradcheck(backend: str, case: Case):
    tensors = [s.detach().double().requires_grad_() for s in case.make(torch.float64)]

    def function(*s):
        return case.run(saliency_affinity, list(s), backend=backend)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_gradients(backend: str, dtype: torch.dtype):
    """Also at scales whose products have no float32, and of one task alone."""
    tensors = [
        (s.detach() * 2.0**-12).requires_grad_(t == 1) for t, s in enumerate(CASE.make(dtype))
    ]
    upstream = torch.randn(4, 3, 3, dtype=torch.float64, device=DEVICE)
    result = saliency_affinity(tensors, backend=backend)
    (actual,) = torch.autograd.grad(result, tensors[1], upstream)
    exact = doubles(tensors)
    (expected,) = torch.autograd.grad(naive(exact), exact[1], upstream)
    assert actual.dtype == dtype
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator(backend: str):
    tensors = CASE.make(torch.float32)
    for stacked, operands in ((False, tensors), (True, [torch.stack(tensors).detach()])):
        operands = [s.detach().requires_grad_() for s in operands]
        arguments = (operands, None, stacked, 1, backend)
        torch.library.opcheck(torch.ops.repmtl.saliency_affinity.default, arguments)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_transforms(backend: str):
    """Under vmap over a further dimension, func.grad, and a compiled region."""
    tensors = [torch.randn(2, 4, 10, 3, 5, device=DEVICE) for _ in range(3)]
    mask = mask_of(CASE, "random")

    def function(*s):
        return saliency_affinity(list(s), positions=mask, backend=backend)

    one_by_one = torch.stack([function(*(s[i] for s in tensors)) for i in range(2)])
    torch.testing.assert_close(vmap(function)(*tensors), one_by_one)
    first = [s[0].requires_grad_() for s in tensors]
    (expected,) = torch.autograd.grad(function(*first).square().sum(), first[:1])
    actual = grad(lambda *s: function(*s).square().sum())(*(s.detach() for s in first))
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*first), function(*first))


def test_errors():
    s = torch.randn(3, 4, 5)
    with pytest.raises(TypeError, match="saliencies: expected a sequence"):
        saliency_affinity(7)
    with pytest.raises(ValueError, match="positions: expected shape"):
        saliency_affinity([s, s], positions=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend: expected"):
        saliency_affinity([s, s], backend="fast")
    with pytest.raises(ValueError, match="channel_dim: expected"):
        reference.saliency_affinity([s, s], channel_dim=0)
