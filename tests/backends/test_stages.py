"""The stage contract: every backend's eight functions against the eager ones in float64."""

import math

import pytest
import torch
from cases import BACKEND_DTYPES, DEVICE, TSR_FORMS, TSR_IDS, Case

from repmtl_kernels._ground.saliency import canonical_tasks
from repmtl_kernels.backends import choice, contract, peaks
from repmtl_kernels.backends.eager import contrast as eager_contrast

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


def _close(result, exact, dtype, factor: float = 1.0):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-2)
    assert torch.isfinite(result).all()
    error = (result.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert error <= factor * tolerance, error


def _at(*scales: float) -> list[tuple[str, torch.dtype, float]]:
    """Return each backend and dtype at the scales that are in the dtype's range."""
    return [(b, d, s) for b, d in BACKEND_DTYPES for s in scales if d != torch.float16 or s == 1.0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype", "scale"), _at(1e-30, 1.0, 1e30))
def test_statistics(backend: str, dtype: torch.dtype, scale: float, case: Case):
    stages = choice.load(backend)
    views = _views(case, dtype, scale)
    result = stages.statistics(views, positions=True, channels=True)
    exact = choice.load("eager").statistics(_exact(views), positions=True, channels=True)
    # Sums are kept in float32 at least, whatever the dtype.
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    _close(result.positions, exact.positions, precise)
    _close(result.channels, exact.channels, precise)
    largest = torch.stack([v.double().abs().amax((1, 2)) for v in (x.flatten(2) for x in views)])
    scaled = result.scale.double() * largest
    assert ((scaled >= 0.5) & (scaled < 2)).all()
    assert (torch.frexp(result.scale).mantissa == 0.5).all()  # powers of two
    alone = stages.statistics(views, positions=True, channels=False)
    assert alone.channels is None and alone.scale is None
    torch.testing.assert_close(alone.positions, result.positions)
    alone = stages.statistics(views, positions=False, channels=True)
    assert alone.positions is None
    torch.testing.assert_close(alone.channels, result.channels)
    assert torch.equal(alone.scale, result.scale)


def _shifted(view: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the same numbers with the same strides, ``offset`` elements behind aligned memory."""
    size = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    memory = view.new_full((size + offset,), math.nan)[offset:]
    return memory.as_strided(view.shape, view.stride(), offset).copy_(view)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(40, 2, 6, (3, 4)),
        Case(11, 3, 8, (4, 4), "mixed"),
        Case(7, 2, 40, (8,), "tokens"),
        Case(3, 70, 16, ()),
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_affinity(backend: str, dtype: torch.dtype, case: Case, offset: int):
    """Many tasks, strides of each task's own, any alignment."""
    views = [_shifted(v, offset) for v in _views(case, dtype)]
    for mask in (None, _mask_of(case)):
        result = choice.load(backend).affinity(views, mask=mask)
        exact = torch.stack(_exact(views)).flatten(3)
        if mask is not None:
            exact = exact.where(mask[:, None], 0)
        norms = exact.flatten(2).norm(dim=2)
        exact = torch.einsum("tbcn,ubcn->btu", exact, exact)
        allowed = 1e-6 * torch.einsum("tb,ub->btu", norms, norms)
        assert result.dtype == torch.float64 and torch.equal(result, result.mT)
        assert ((result - exact).abs() <= allowed).all()


@pytest.mark.parametrize("temperature", [0.5, 1e-30])
@pytest.mark.parametrize("kind", ["all", "some", "none of a sample"])
@pytest.mark.parametrize("shape", [(3, 2), (1, 7), (17, 300), (2, 3000)], ids=str)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_values(backend: str, shape: tuple, kind: str, temperature: float):
    """CSA, its derivative and the total, from parts of any size."""
    similarity = torch.rand(shape, device=DEVICE)
    logsumexp = (2 + torch.rand(shape[1], device=DEVICE)) / temperature  # nothing cancels
    present = None
    if kind != "all":
        present = torch.rand(shape[1], shape[0], device=DEVICE).T < 0.5
        present[:, 0] = kind == "some"
    tsr, lambdas = torch.tensor(0.8, device=DEVICE), (0.7, 1.3)
    options = {"temperature": temperature, "lambdas": lambdas}
    stage, exact_stage = choice.load(backend).values, choice.load("eager").values
    result = stage(similarity, logsumexp, present, tsr=tsr, **options)
    given = similarity.double(), logsumexp.double(), present
    exact = exact_stage(*given, tsr=tsr.double(), **options)
    for one, other in zip(result, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=0)
    without = stage(similarity, logsumexp, present, temperature=temperature)
    assert without.total is None and torch.equal(without.csa, result.csa)


@pytest.mark.parametrize("form", TSR_FORMS, ids=TSR_IDS)
@pytest.mark.parametrize(
    "shape", [(3, 2, 70), (1, 2, 5), (17, 3, 4), (2, 2, 1), (2, 2, 5000)], ids=str
)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_entropy(backend: str, shape: tuple, form: dict):
    x = torch.randn(shape, device=DEVICE)
    x[..., 0] = 0
    for eps in (0.0, 0.3):
        stage = choice.load(backend).entropy
        result = stage(x, eps=eps, with_grad=True, **form)
        exact = choice.load("eager").entropy(x.double(), eps=eps, with_grad=True, **form)
        torch.testing.assert_close(result.value.double(), exact.value, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(
            result.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max().item()
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
    stages, eager = choice.load(backend), choice.load("eager")
    anchors = stages.anchors(a, eps=eps, with_grad=True)
    result = stages.contrast(anchors, temperature=0.3, with_grad=True)
    exact_anchors = eager.anchors(a.double(), eps=eps, with_grad=True)
    exact = eager.contrast(exact_anchors, temperature=0.3, with_grad=True)
    torch.testing.assert_close(result.logsumexp.double(), exact.logsumexp, rtol=3e-6, atol=3e-6)
    factor = exact_anchors.factor
    pairs = {
        "unit": (anchors.unit, exact_anchors.unit),
        "radial": (anchors.radial, exact_anchors.radial),
        "grad": (result.grad, exact.grad),
    }
    for name, (of_all, exact_of_all) in pairs.items():
        for b in range(shape[1]):  # samples have scales of their own
            f, e = of_all[:, b].double(), exact_of_all[:, b]
            assert (f - e).norm() <= 2e-5 * e.norm() + 1e-9 * factor[b], (name, b)
    torch.testing.assert_close(anchors.factor.double(), factor, rtol=1e-5, atol=0)
    without = stages.anchors(a, eps=eps, with_grad=False)
    assert without.radial is None and torch.equal(without.unit, anchors.unit)
    without = stages.contrast(without, temperature=0.3, with_grad=False)
    assert without.grad is None
    assert torch.equal(without.logsumexp, result.logsumexp)


@pytest.mark.parametrize("gathered", [False, True], ids=["task by task", "sample by sample"])
@pytest.mark.parametrize("shape", [(3, 7, 40), (2, 70, 17), (1, 9, 8)], ids=str)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_contrast_of_some_samples_with_all(
    backend: str, shape: tuple, gathered: bool, monkeypatch: pytest.MonkeyPatch
):
    """Each part of the batch has the rows of the result for the whole batch."""
    monkeypatch.setattr(eager_contrast, "products_at_a_time", lambda anchors: 60)
    stages = choice.load(backend)
    a = torch.randn(shape, device=DEVICE)
    complete = stages.anchors(a, eps=0.0, with_grad=True)
    exact = stages.contrast(complete, temperature=0.3, with_grad=True)
    unit = complete.unit.transpose(0, 1).contiguous().transpose(0, 1) if gathered else complete.unit
    r = torch.einsum("tbc,vkc->btkv", unit, unit).square().sum((1, 3)).fill_diagonal_(-math.inf)
    all_columns = peaks.peaks(r, 0, 0.3)
    for first, last in ((0, 1), (1, 5), (5, shape[1])):
        part = stages.anchors(a[:, first:last], eps=0.0, with_grad=True)
        joined = []

        def join(columns: torch.Tensor, joined=joined) -> torch.Tensor:
            joined.append(columns.clone())
            return all_columns

        all_samples = contract.AllSamples(unit, first, join)
        result = stages.contrast(part, temperature=0.3, with_grad=True, all_samples=all_samples)
        assert len(joined) == 1
        own = peaks.peaks(r[first:last], 0, 0.3)
        torch.testing.assert_close(joined[0], own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.logsumexp, exact.logsumexp[first:last])
        torch.testing.assert_close(result.grad, exact.grad[:, first:last], rtol=1e-4, atol=1e-5)
        stages.contrast(part, temperature=0.3, with_grad=False, all_samples=all_samples)
        assert len(joined) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_contrast_of_many_samples_in_parts(backend: str, monkeypatch: pytest.MonkeyPatch):
    stages = choice.load(backend)
    if backend == "triton":
        # Three launches: six of 17 rows of tiles at a time.
        monkeypatch.setattr("repmtl_kernels.backends.triton.contrast.BUFFER", 6 * 17 * 64**2)
    # Similarities from 0 to 1 at a low temperature; the largest come last.
    batch = 1030
    angle = torch.linspace(0, 1.5, batch, device=DEVICE)
    a = torch.stack((angle.cos(), angle.sin(), 0.1 * angle), -1)[None]
    anchors = stages.anchors(a, eps=0.0, with_grad=True)
    result = stages.contrast(anchors, temperature=0.02, with_grad=True)
    eager = choice.load("eager")
    exact = eager.anchors(a.double(), eps=0.0, with_grad=True)
    exact = eager.contrast(exact, temperature=0.02, with_grad=True)
    torch.testing.assert_close(result.logsumexp.double(), exact.logsumexp, rtol=3e-6, atol=0)
    assert (result.grad.double() - exact.grad).norm() <= 3e-5 * exact.grad.norm()


@pytest.mark.parametrize("eps", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_gram(backend: str, dtype: torch.dtype, case: Case, eps: float):
    views = _views(case, dtype)
    eager = choice.load("eager")
    statistics = eager.statistics(_exact(views), positions=False, channels=True)
    anchors = eager.anchors(statistics.channels, eps=eps, with_grad=False).unit
    stage = choice.load(backend).gram
    precise = anchors.dtype if dtype == torch.float64 else torch.float32
    scale, unit = statistics.scale.to(precise), anchors.to(precise)
    result = stage(views, scale, unit, eps=eps, with_grad=True)
    exact = eager.gram(_exact(views), statistics.scale, anchors, eps=eps, with_grad=True)
    for name in ("similarity", "inverse", "slope", "projection"):
        f, e = getattr(result, name), getattr(exact, name)
        assert f.shape == e.shape and f.dtype == precise
        if e.norm() > 0:
            # Anchors multiply 16-bit saliencies in two 16-bit parts.
            _close(f, e, torch.float32 if dtype.itemsize == 2 else dtype, factor=15)
        else:
            assert (f == 0).all()
    assert result.matrix.shape == exact.matrix.shape and result.matrix.dtype == dtype
    # The matrix is the backend's own multiple of the exact one: compare directions.
    f, e = result.matrix.double(), exact.matrix
    _close(f / f.norm(), e / e.norm(), dtype)
    without = stage(views, scale, unit, eps=eps, with_grad=False)
    assert without.matrix is None and without.projection is None
    torch.testing.assert_close(without.similarity, result.similarity, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [f for f in TSR_FORMS if f["normalizer"] == "softmax"], ids=str)
@pytest.mark.parametrize("backend", sorted({b for b, _ in BACKEND_DTYPES}))
def test_entropy_where_a_probability_is_zero(backend: str, form: dict):
    """A value of -inf has no part in a softmax, as in the reference."""
    x = torch.randn((5, 3, 1030), device=DEVICE)
    absent = torch.rand(x.shape, device=DEVICE) < 0.4
    absent[1:, :, 11], absent[2, 1, :-1] = True, True  # one value is all of some distributions
    absent[0], absent[:, :, -1] = False, False  # and none is -inf everywhere
    x[absent] = -math.inf
    stage = choice.load(backend).entropy
    result = stage(x, eps=0.0, with_grad=True, **form)
    exact = x.double().requires_grad_()
    probability = torch.softmax(exact / form["temperature"], 0 if form["over"] == "tasks" else 2)
    logarithm = probability.where(probability != 0, 1).log()
    value = -(probability * logarithm).sum(0 if form["over"] == "tasks" else 2).mean()
    (grad,) = torch.autograd.grad(value, exact)
    torch.testing.assert_close(result.value.double(), value.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(
        result.grad.double(), grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item()
    )
    assert (result.grad[absent] == 0).all()
    for other in (math.nan, math.inf):
        spoiled = x.clone()
        spoiled[1, 0, 3] = other
        result = stage(spoiled, eps=0.0, with_grad=True, **form)
        assert result.value.isnan() and result.grad[1, 0, 3].isnan()


# The first sample has all its positions, the last none, the others some.
MASKED_CASES = [
    Case(2, 4, 96, (7, 7)),
    Case(2, 4, 64, (8, 8)),
    Case(2, 3, 150, (10, 13), "channels_last"),  # several tiles
    Case(3, 3, 40, (4, 5), "tokens"),
    Case(2, 3, 70, (9, 10)),  # C side, several tiles
    Case(2, 4, 8, (5, 6), "channels_last"),
    Case(2, 3, 16, (4, 6), "tokens"),
    Case(3, 3, 17, (3, 4), "mixed"),
    Case(2, 3, 11, (2, 3, 4), "crop"),
    Case(9, 3, 17, ()),
]


def _mask_of(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand((case.batch, math.prod(case.spatial)), generator=generator) < 0.6
    mask[0], mask[-1] = True, False
    return mask.to(DEVICE)


def _masked_views(case: Case, dtype: torch.dtype, mask: torch.Tensor, scale: float = 1.0):
    """Saliencies with anything at other positions than those of the mask, and the same with 0."""
    views = _views(case, dtype, scale)
    shaped = mask.view(case.batch, 1, *case.spatial or (1,))
    anything = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max], dtype=dtype)
    anything = anything.repeat(mask.shape[1])[: mask.shape[1]].to(DEVICE).view(shaped.shape[1:])
    for view in views:
        view.copy_(torch.where(shaped, view, anything))
    exact = [torch.where(shaped, v.double(), 0) for v in views]
    return views, exact


def _share(mask: torch.Tensor) -> torch.Tensor:
    """(B,): N over the number of positions of a sample, 0 where there is none."""
    count = mask.sum(1).double()
    return (mask.shape[1] / count).where(count != 0, 0)


@pytest.mark.parametrize("case", MASKED_CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_statistics_of_some_positions(backend: str, dtype: torch.dtype, case: Case):
    mask = _mask_of(case)
    views, zeroed = _masked_views(case, dtype, mask, 1.0 if dtype == torch.float16 else 1e-12)
    stages = choice.load(backend)
    result = stages.statistics(views, positions=True, channels=True, mask=mask)
    exact = choice.load("eager").statistics(zeroed, positions=True, channels=True)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    _close(result.positions, exact.positions, precise)
    _close(result.channels, exact.channels * _share(mask)[:, None], precise)
    assert (result.positions[:, ~mask] == 0).all() and (result.channels[:, -1] == 0).all()
    largest = torch.stack([z.abs().flatten(1).amax(1) for z in zeroed])
    scaled = result.scale.double() * largest
    assert ((scaled >= 0.5) & (scaled < 2))[:, :-1].all()
    assert (result.scale[:, -1] == 1).all()
    for options in ({"positions": True, "channels": False}, {"positions": False, "channels": True}):
        alone = stages.statistics(views, mask=mask, **options)
        for one, other in zip(alone, result, strict=True):
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("case", MASKED_CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype", "scale"), _at(1.0, 1e-15))
def test_gram_and_gradient_of_some_positions(
    backend: str, dtype: torch.dtype, case: Case, scale: float
):
    mask = _mask_of(case)
    views, zeroed = _masked_views(case, dtype, mask, scale)
    eager = choice.load("eager")
    statistics = eager.statistics(zeroed, positions=False, channels=True)
    anchors = eager.anchors(statistics.channels * _share(mask)[:, None], eps=0.0, with_grad=True)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    stages = choice.load(backend)
    arguments = statistics.scale.to(precise), anchors.unit.to(precise)
    result = stages.gram(views, *arguments, eps=0.0, with_grad=True, mask=mask)
    exact = eager.gram(zeroed, statistics.scale, anchors.unit, eps=0.0, with_grad=True)
    for name in ("similarity", "inverse", "slope", "projection"):
        f, e = getattr(result, name), getattr(exact, name)
        _close(f, e, torch.float32 if dtype.itemsize == 2 else dtype, factor=15)
    f, e = result.matrix.double(), exact.matrix
    _close(f / f.norm(), e / e.norm(), dtype)
    if mask.shape[1] <= case.channels:
        b, n = (~mask).nonzero(as_tuple=True)
        assert (result.matrix[:, b, n] == 0).all() and (result.matrix[:, b, :, n] == 0).all()
        assert (result.projection[:, b, :, n] == 0).all()
    without = stages.gram(views, *arguments, eps=0.0, with_grad=False, mask=mask)
    assert without.matrix is None and without.projection is None
    torch.testing.assert_close(without.similarity, result.similarity, rtol=1e-6, atol=0)

    contrast_grad = torch.randn(anchors.unit.shape, device=DEVICE) * anchors.factor[:, None]
    weight = torch.rand(statistics.scale.shape, device=DEVICE) + 0.1
    position_grad = torch.randn((case.tasks, *mask.shape), device=DEVICE)
    position_grad *= anchors.factor[:, None] * case.channels  # of the size of the other terms
    position_grad[:, ~mask] = math.nan

    def gradient(stages, saliencies, gram, share, dtype, **options):
        cast = [anchors.unit.to(dtype), (anchors.factor * share).to(dtype)]
        cast.append(anchors.radial.to(dtype).contiguous())
        csa = contract.CSAGradient(
            scale=statistics.scale.to(dtype),
            anchors=contract.Anchors(*cast),
            contrast_grad=(contrast_grad * share[:, None]).to(dtype),
            gram=gram,
            weight=weight.to(dtype),
            of_loss=contract.LossGradient(torch.tensor(1.4, dtype=dtype, device=DEVICE), 0.5),
        )
        of_tsr = contract.LossGradient(torch.tensor(0.6, dtype=dtype, device=DEVICE), 1.5)
        tsr = contract.TSRGradient(position_grad.to(dtype), of_tsr)
        outputs = [torch.empty_like(s) for s in saliencies]
        stages.saliency_grad(saliencies, outputs, csa, tsr, **options)
        return torch.stack(outputs).flatten(3)

    one = torch.ones_like(anchors.factor)
    result = gradient(stages, views, result, one, precise, mask=mask)
    position_grad[:, ~mask] = 0
    exact = gradient(eager, zeroed, exact, _share(mask), torch.float64) * mask[:, None]
    assert (result.movedim(2, 3)[:, ~mask] == 0).all()
    for b in range(case.batch - 1):
        _close(result[:, b], exact[:, b], dtype, factor=5)
