"""Saliencies with padding: values and gradients with a mask of the positions that exist."""

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    CASES,
    DEVICE,
    Case,
    Loss,
    judge,
    value_and_grads,
)
from masked_cases import (
    BOTH,
    CSA,
    EVERY_BACKEND,
    EXACT,
    FORM_IDS,
    FORMS,
    TSR,
    assert_same,
    cut_csa,
    cut_tsr,
    mask_of,
)

from repmtl_kernels import (
    CSALoss,
    RepMTLLoss,
    TSRLoss,
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)
from repmtl_kernels.backends import choice


@pytest.mark.parametrize("kind", ["prefix", "random", "empty"])
@pytest.mark.parametrize("form", [*FORMS, {"eps": 0.3}], ids=[*FORM_IDS, "eps"])
@pytest.mark.parametrize("backend", EXACT)
def test_tsr_of_what_is_cut_out(backend: str, form: dict, kind: str):
    case = Case(3, 4, 6, (3, 5))
    tensors, mask = case.make(torch.float64), mask_of(case, kind)
    actual = tsr_loss(tensors, positions=mask, backend=backend, **form)
    assert_same(actual, cut_tsr(tensors, mask, **form), tensors)


@pytest.mark.parametrize("kind", ["prefix", "random", "empty"])
@pytest.mark.parametrize("channels", [4, 30], ids=["C side", "N side"])
@pytest.mark.parametrize("eps", [0.0, 1.0])
@pytest.mark.parametrize("backend", EXACT)
def test_csa_of_what_is_cut_out(backend: str, eps: float, channels: int, kind: str):
    case = Case(3, 4, channels, (3, 5))
    tensors, mask = case.make(torch.float64), mask_of(case, kind)
    present = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    present[0, 1] = present[2, 0] = present[1, 0] = False
    for labels in (None, present):
        actual = csa_loss(tensors, positions=mask, eps=eps, present=labels, backend=backend)
        assert_same(actual, cut_csa(tensors, mask, eps=eps, present=labels), tensors)


# --- every backend against the reference ---


@pytest.mark.parametrize(
    ("loss", "case"),
    [(CSA, case) for case in CASES]
    # The gradient of CSA is nothing but rounding where there is one channel.
    + [(BOTH, case) for case in CASES if case.channels > 1],
    ids=lambda x: getattr(x, "name", None) or str(x),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case(backend: str, loss: Loss, case: Case):
    judge(loss, case, torch.float32, backend, positions=mask_of(case, "random"))


@pytest.mark.parametrize("kind", ["prefix", "empty"])
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 3, 8, (5, 6)),
        Case(2, 3, 40, (4, 5), "channels_last"),
        Case(2, 3, 70, (49,), "tokens"),
        Case(3, 3, 24, (4, 5), "mixed"),
        Case(2, 4, 20),
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_every_dtype(backend: str, dtype: torch.dtype, case: Case, kind: str):
    judge(BOTH, case, dtype, backend, positions=mask_of(case, kind))


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize(
    "case", [Case(3, 3, 8, (5, 6)), Case(2, 3, 5), Case(1, 3, 4, (7,), "tokens")], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_distributions(backend: str, case: Case, form: dict):
    for kind in ("random", "empty"):
        judge(TSR, case, torch.float32, backend, positions=mask_of(case, kind), **form)


@pytest.mark.parametrize("eps", [1e-8, 1e-2, 1e3])
@pytest.mark.parametrize("loss", [TSR, CSA, BOTH], ids=lambda loss: loss.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend: str, loss: Loss, eps: float):
    case = Case(3, 3, 12, (3, 4))
    judge(loss, case, torch.float32, backend, positions=mask_of(case, "empty"), eps=eps)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_one_sample(backend: str):
    case = Case(2, 1, 6, (3, 4))
    mask = mask_of(case, "random")
    judge(TSR, case, torch.float32, backend, positions=mask)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_mask_of_everything_changes_nothing(backend: str):
    for case in (Case(3, 3, 8, (5, 6)), Case(2, 3, 40, (4, 5), "tokens"), Case(2, 3, 9)):
        everything = torch.ones(case.batch, *case.spatial, dtype=torch.bool, device=DEVICE)
        tensors = case.make(torch.float32)
        expected, grads = value_and_grads(BOTH.public, case, tensors, backend=backend)
        actual, again = value_and_grads(
            BOTH.public, case, tensors, backend=backend, positions=everything
        )
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(again, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_strides_of_the_mask(backend: str):
    """Any view is taken: transposed, expanded over the samples, cut out of a larger one."""
    case = Case(2, 3, 24, (4, 5))
    tensors, mask = case.make(torch.float32), mask_of(case, "random")
    one = mask[:1].expand(3, 4, 5)
    big = torch.ones(6, 9, 10, dtype=torch.bool, device=DEVICE)[::2, 1::2, ::2]
    views = [(mask.mT.contiguous().mT, mask), (one, one.contiguous()), (big.copy_(mask), mask)]
    for view, dense in views:
        assert not view.is_contiguous()
        actual = rep_mtl_loss(tensors, positions=view, backend=backend)
        expected = rep_mtl_loss(tensors, positions=dense, backend=backend)
        assert torch.equal(actual.total, expected.total)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck_of_tsr(backend: str, form: dict):
    case = Case(3, 3, 3, (2, 2))
    mask = mask_of(case, "empty")
    assert torch.autograd.gradcheck(
        lambda *s: tsr_loss(s, positions=mask, backend=backend, **form), case.make(torch.float64)
    )


@pytest.mark.parametrize("eps", [0.0, 0.5, 5.0])
@pytest.mark.parametrize(
    "case", [Case(2, 3, 3, (2, 2)), Case(2, 3, 6, (4,)), Case(2, 3, 2, (3,), "stacked")], ids=str
)
@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck_of_csa(backend: str, case: Case, eps: float):
    mask = mask_of(case, "random")
    assert torch.autograd.gradcheck(
        lambda *s: case.run(csa_loss, list(s), positions=mask, backend=backend, eps=eps),
        case.make(torch.float64),
    )


def test_reference_supports_second_derivatives():
    case = Case(2, 2, 2, (3,))
    mask = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)
    tensors = case.make(torch.float64)
    for form in FORMS:
        assert torch.autograd.gradgradcheck(
            lambda *s, form=form: tsr_loss(s, positions=mask, backend="reference", **form), tensors
        )
    assert torch.autograd.gradgradcheck(
        lambda *s: csa_loss(s, positions=mask, backend="reference"), tensors
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed(backend: str):
    case = Case(3, 3, 24, (4, 5))
    tensors, mask = case.make(torch.float32), mask_of(case, "random")
    full = torch.autograd.grad(rep_mtl_loss(tensors, positions=mask, backend=backend)[0], tensors)
    some = [tensors[0].detach(), tensors[1], tensors[2].detach()]
    (grad,) = torch.autograd.grad(rep_mtl_loss(some, positions=mask, backend=backend)[0], some[1:2])
    assert torch.equal(grad, full[1])


# --- modules and arguments ---

GOOD = [torch.randn(2, 3, 4, 5) for _ in range(2)]
MASK = torch.rand(2, 4, 5) < 0.6
FUNCTIONS = [tsr_loss, csa_loss, rep_mtl_loss, reference.tsr_loss, reference.csa_loss]


def test_modules_pass_it_on():
    assert TSRLoss()(GOOD, MASK) == tsr_loss(GOOD, positions=MASK)
    assert CSALoss()(GOOD, positions=MASK) == csa_loss(GOOD, positions=MASK)
    present = torch.tensor([[True, False], [True, True]])
    expected = rep_mtl_loss(GOOD, present=present, positions=MASK)
    assert RepMTLLoss()(GOOD, present, MASK) == expected
    assert abs(expected.csa - rep_mtl_loss(GOOD, present=present).csa) > 1e-4
    assert abs(expected.csa - rep_mtl_loss(GOOD, positions=MASK).csa) > 1e-4


BAD = {
    "a list": (MASK.tolist(), TypeError, "expected a bool Tensor or None, got list"),
    "floats": (MASK.float(), TypeError, "expected a bool Tensor, got torch.float32"),
    "bytes": (MASK.byte(), TypeError, "expected a bool Tensor, got torch.uint8"),
    "sparse": (MASK.to_sparse(), TypeError, "expected a strided Tensor"),
    "flat": (MASK.flatten(1), ValueError, r"\(B, \*spatial\) = \(2, 4, 5\).*got \(2, 20\)"),
    "with channels": (MASK[:, None], ValueError, r"= \(2, 4, 5\).*got \(2, 1, 4, 5\)"),
    "other batch": (MASK[:1], ValueError, r"= \(2, 4, 5\).*got \(1, 4, 5\)"),
    "other device": (MASK.to("meta"), ValueError, "expected device cpu; got meta"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_masks(function, bad: str):
    positions, error, message = BAD[bad]
    for saliencies in (GOOD, torch.stack(GOOD)):
        with pytest.raises(error, match=f"^positions: .*{message}"):
            function(saliencies, positions=positions)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shape_is_that_without_the_channels(function):
    for channel_dim, shape in ((2, (2, 3, 5)), (-1, (2, 3, 4)), (-2, (2, 3, 5))):
        mask = torch.ones(shape, dtype=torch.bool)
        assert torch.isfinite(
            torch.as_tensor(
                function(GOOD, positions=mask, channel_dim=channel_dim)[0]
                if function is rep_mtl_loss
                else function(GOOD, positions=mask, channel_dim=channel_dim)
            )
        )
        with pytest.raises(ValueError, match=rf"^positions: .*= \({', '.join(map(str, shape))}\)"):
            function(GOOD, positions=MASK, channel_dim=channel_dim)
    pooled = [s[..., 0, 0] for s in GOOD]
    function(pooled, positions=torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"^positions: .*= \(2,\).*got \(2, 1\)"):
        function(pooled, positions=torch.ones(2, 1, dtype=torch.bool))


def test_operators_refuse_a_mask_they_cannot_read():
    if "native" not in BACKENDS or DEVICE != "cpu":
        pytest.skip("needs the library for the CPU")
    ops = choice.load("native").ops_of(GOOD[0])
    flat = MASK.flatten(1)
    for bad in (MASK, flat[:, ::2], flat.byte(), flat[:1]):
        with pytest.raises(RuntimeError, match=r"mask: expected a contiguous .*\(2, 20\)"):
            ops.statistics(GOOD, True, True, bad)
