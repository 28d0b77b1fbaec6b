"""The stage contract: every backend's six functions against the eager ones in float64."""

import importlib
import math

import pytest
import torch
from cases import BACKEND_DTYPES, DEVICE, TSR_FORMS, TSR_IDS, Case

from repmtl_kernels import backends
from repmtl_kernels._saliency import canonical_tasks
from repmtl_kernels.backends import _peaks

CASES = [
    Case(2, 3, 40, (4, 5)),
    Case(3, 2, 8, (5, 6), "channels_last"),
    Case(9, 2, 17, ()),
    Case(2, 2, 9, (3, 4), "crop"),
]


def _views(case: Case, dtype: torch.dtype, scale: float = 1.0):
    tensors = [t.detach() for t in case.make(dtype, scale=scale)]
    return canonical_tasks(tensors, False, case.channel_dim)


def _exact(views):
    return [v.double() for v in views]


def _close(found, exact, dtype, factor: float = 1.0):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-2)
    assert torch.isfinite(found).all()
    error = (found.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert error <= factor * tolerance, error


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_statistics(backend: str, dtype: torch.dtype, scale: float, case: Case):
    if dtype == torch.float16 and scale != 1.0:
        pytest.skip("not in the range of float16")
    stages = backends.load(backend)
    views = _views(case, dtype, scale)
    found = stages.statistics(views, positions=True, channels=True)
    exact = backends.load("eager").statistics(_exact(views), positions=True, channels=True)
    # Sums are kept in float32 at least, whatever the dtype.
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    _close(found.positions, exact.positions, precise)
    _close(found.channels, exact.channels, precise)
    largest = torch.stack([v.double().abs().amax((1, 2)) for v in (x.flatten(2) for x in views)])
    scaled = found.scale.double() * largest
    assert ((scaled >= 0.5) & (scaled < 2)).all()
    assert (torch.frexp(found.scale).mantissa == 0.5).all()  # powers of two
    alone = stages.statistics(views, positions=True, channels=False)
    assert alone.channels is None and alone.scale is None
    torch.testing.assert_close(alone.positions, found.positions)
    alone = stages.statistics(views, positions=False, channels=True)
    assert alone.positions is None
    torch.testing.assert_close(alone.channels, found.channels)
    assert torch.equal(alone.scale, found.scale)


@pytest.mark.parametrize("form", TSR_FORMS, ids=TSR_IDS)
@pytest.mark.parametrize(
    "shape", [(3, 2, 70), (1, 2, 5), (17, 3, 4), (2, 2, 1), (2, 2, 5000)], ids=str
)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_entropy(backend: str, shape: tuple, form: dict):
    x = torch.randn(shape, device=DEVICE)
    x[..., 0] = 0
    for eps in (0.0, 0.3):
        stage = backends.load(backend).entropy
        found = stage(x, eps=eps, with_grad=True, **form)
        exact = backends.load("eager").entropy(x.double(), eps=eps, with_grad=True, **form)
        torch.testing.assert_close(found.value.double(), exact.value, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(
            found.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max().item()
        )
        assert stage(x, eps=eps, with_grad=False, **form).grad is None


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize(
    "shape", [(3, 4, 40), (1, 2, 7), (9, 3, 5), (2, 70, 33), (17, 2, 100)], ids=str
)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_contrast(backend: str, shape: tuple, eps: float):
    a = torch.randn(shape, device=DEVICE) * torch.logspace(-12, 3, shape[1], device=DEVICE)[:, None]
    a[:, 0] = 0
    stages, eager = backends.load(backend), backends.load("eager")
    anchors = stages.anchors(a, eps=eps, with_grad=True)
    found = stages.contrast(anchors, temperature=0.3, with_grad=True)
    exact_anchors = eager.anchors(a.double(), eps=eps, with_grad=True)
    exact = eager.contrast(exact_anchors, temperature=0.3, with_grad=True)
    torch.testing.assert_close(found.logsumexp.double(), exact.logsumexp, rtol=3e-6, atol=3e-6)
    factor = exact_anchors.factor
    pairs = {
        "unit": (anchors.unit, exact_anchors.unit),
        "pull": (anchors.pull, exact_anchors.pull),
        "grad": (found.grad, exact.grad),
    }
    for name, (of_all, exact_of_all) in pairs.items():
        for b in range(shape[1]):  # samples have scales of their own
            f, e = of_all[:, b].double(), exact_of_all[:, b]
            assert (f - e).norm() <= 2e-5 * e.norm() + 1e-9 * factor[b], (name, b)
    torch.testing.assert_close(anchors.factor.double(), factor, rtol=1e-5, atol=0)
    without = stages.anchors(a, eps=eps, with_grad=False)
    assert without.pull is None and torch.equal(without.unit, anchors.unit)
    without = stages.contrast(without, temperature=0.3, with_grad=False)
    assert without.grad is None
    assert torch.equal(without.logsumexp, found.logsumexp)


@pytest.mark.parametrize("gathered", [False, True], ids=["task by task", "sample by sample"])
@pytest.mark.parametrize("shape", [(3, 7, 40), (2, 70, 17), (1, 9, 8)], ids=str)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_contrast_of_some_samples_with_all(
    backend: str, shape: tuple, gathered: bool, monkeypatch: pytest.MonkeyPatch
):
    """Each part of the batch has the rows of the result for the whole batch."""
    monkeypatch.setattr(
        importlib.import_module("repmtl_kernels.backends.eager"), "CONTRAST_BLOCK", 60
    )
    stages = backends.load(backend)
    a = torch.randn(shape, device=DEVICE)
    whole = stages.anchors(a, eps=0.0, with_grad=True)
    exact = stages.contrast(whole, temperature=0.3, with_grad=True)
    unit = whole.unit.transpose(0, 1).contiguous().transpose(0, 1) if gathered else whole.unit
    r = torch.einsum("tbc,vkc->btkv", unit, unit).square().sum((1, 3)).fill_diagonal_(-math.inf)
    all_columns = _peaks.peaks(r, 0, 0.3)
    for first, last in ((0, 1), (1, 5), (5, shape[1])):
        part = stages.anchors(a[:, first:last], eps=0.0, with_grad=True)
        told = []

        def join(columns: torch.Tensor, told=told) -> torch.Tensor:
            told.append(columns.clone())
            return all_columns

        everyone = backends.Everyone(unit, first, join)
        found = stages.contrast(part, temperature=0.3, with_grad=True, everyone=everyone)
        assert len(told) == 1
        own = _peaks.peaks(r[first:last], 0, 0.3)
        torch.testing.assert_close(told[0], own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logsumexp, exact.logsumexp[first:last])
        torch.testing.assert_close(found.grad, exact.grad[:, first:last], rtol=1e-4, atol=1e-5)
        stages.contrast(part, temperature=0.3, with_grad=False, everyone=everyone)
        assert len(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_contrast_of_many_samples_in_parts(backend: str, monkeypatch: pytest.MonkeyPatch):
    stages = backends.load(backend)
    if backend == "triton":
        # By import_module: as an attribute of its package, `contrast` is the stage, not the module.
        module = importlib.import_module("repmtl_kernels.backends.triton.contrast")
        monkeypatch.setattr(module, "BUFFER", 1)
    # Similarities from 0 to 1 at a low temperature; the largest come last.
    batch = 1030
    angle = torch.linspace(0, 1.5, batch, device=DEVICE)
    a = torch.stack((angle.cos(), angle.sin(), 0.1 * angle), -1)[None]
    anchors = stages.anchors(a, eps=0.0, with_grad=True)
    found = stages.contrast(anchors, temperature=0.02, with_grad=True)
    eager = backends.load("eager")
    exact = eager.anchors(a.double(), eps=0.0, with_grad=True)
    exact = eager.contrast(exact, temperature=0.02, with_grad=True)
    torch.testing.assert_close(found.logsumexp.double(), exact.logsumexp, rtol=3e-6, atol=0)
    assert (found.grad.double() - exact.grad).norm() <= 3e-5 * exact.grad.norm()


@pytest.mark.parametrize("eps", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_gram(backend: str, dtype: torch.dtype, case: Case, eps: float):
    views = _views(case, dtype)
    eager = backends.load("eager")
    statistics = eager.statistics(_exact(views), positions=False, channels=True)
    anchors = eager.anchors(statistics.channels, eps=eps, with_grad=False).unit
    stage = backends.load(backend).gram
    precise = anchors.dtype if dtype == torch.float64 else torch.float32
    scale, unit = statistics.scale.to(precise), anchors.to(precise)
    found = stage(views, scale, unit, eps=eps, with_grad=True)
    exact = eager.gram(_exact(views), statistics.scale, anchors, eps=eps, with_grad=True)
    for name in ("similarity", "inverse", "slope", "projection"):
        f, e = getattr(found, name), getattr(exact, name)
        assert f.shape == e.shape and f.dtype == precise
        if e.norm() > 0:
            # Anchors multiply 16-bit saliencies in two 16-bit parts.
            _close(f, e, torch.float32 if dtype.itemsize == 2 else dtype, factor=15)
        else:
            assert (f == 0).all()
    assert found.matrix.shape == exact.matrix.shape and found.matrix.dtype == dtype
    # The matrix is the backend's own multiple of the exact one: compare directions.
    f, e = found.matrix.double(), exact.matrix
    _close(f / f.norm(), e / e.norm(), dtype)
    without = stage(views, scale, unit, eps=eps, with_grad=False)
    assert without.matrix is None and without.projection is None
    torch.testing.assert_close(without.similarity, found.similarity, rtol=1e-6, atol=0)
