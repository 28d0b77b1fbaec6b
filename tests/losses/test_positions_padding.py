"""Values of the saliencies where no position exists have no part in the losses."""

import math
from functools import partial

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    CASES,
    DEVICE,
    GRAD_TOLERANCE,
    VALUE_TOLERANCE,
    Case,
    relative_error,
    value_and_grads,
)
from masked_cases import (
    BOTH,
    CSA,
    EVERY_BACKEND,
    FORM_IDS,
    FORMS,
    TSR,
    mask_of,
    over_channels,
    with_garbage,
)
from torch import Tensor

from repmtl_kernels import (
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)

GARBAGE = [case for case in CASES if case.layout != "expanded"]  # one number for all positions
FEW = [Case(3, 2, 8, (5, 6)), Case(2, 2, 40, (30,), "tokens"), Case(2, 3, 24, (4, 5), "stacked")]


@pytest.mark.parametrize(
    ("backend", "dtype", "case"),
    [(b, torch.float32, case) for b in EVERY_BACKEND for case in GARBAGE]
    + [(b, d, case) for b, d in BACKEND_DTYPES if d != torch.float32 for case in FEW],
    ids=str,
)
def test_garbage_changes_no_bit(backend: str, dtype: torch.dtype, case: Case):
    mask = mask_of(case, "empty" if case.batch > 2 else "random")
    run = partial(value_and_grads, BOTH.public, case, backend=backend, positions=mask)
    value, grads = run(case.make(dtype))
    actual, again = run(with_garbage(case, dtype, mask))
    assert torch.isfinite(value) and torch.equal(actual, value)
    others = ~over_channels(case, mask)
    for grad, expected in zip(again, grads, strict=True):
        assert torch.equal(grad, expected)
        assert (grad.masked_select(others) == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_garbage_in_every_distribution(backend: str, form: dict):
    case = Case(2, 3, 5, (3, 4))
    mask = mask_of(case, "empty")
    run = partial(value_and_grads, tsr_loss, case, backend=backend, positions=mask, **form)
    value, grads = run(case.make(torch.float32))
    actual, again = run(with_garbage(case, torch.float32, mask))
    assert torch.equal(actual, value)
    for grad, expected in zip(again, grads, strict=True):
        assert torch.equal(grad, expected)
        assert (grad.masked_select(~over_channels(case, mask)) == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_that_is_there_is_not_hidden(backend: str, form: dict):
    """It gives NaN, and the gradient of what is not there is zero all the same."""
    case = Case(2, 3, 24, (4, 5))
    mask = mask_of(case, "random")
    mask[0, 0, 0] = True
    tensors = [t.detach() for t in case.make(torch.float32)]
    tensors[1][0, 2, 0, 0] = math.nan
    tensors = [t.requires_grad_() for t in tensors]
    tsr = tsr_loss(tensors, positions=mask, backend=backend, **form)
    both = rep_mtl_loss(tensors, positions=mask, backend=backend)
    for value in (tsr, both.csa, both.total):
        assert value.isnan()
        for grad in torch.autograd.grad(value, tensors, retain_graph=True):
            assert (grad.masked_select(~over_channels(case, mask)) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_incoming_gradient(backend: str):
    """A loss scale that is too large shows where a position is, and there alone."""
    case = Case(2, 3, 24, (4, 5))
    tensors, mask = case.make(torch.float32), mask_of(case, "random")
    for loss in (TSR, BOTH):
        value = loss.public(tensors, positions=mask, backend=backend)
        grads = torch.autograd.grad(value, tensors, torch.full_like(value, math.inf))
        for grad in grads:
            assert not grad.isfinite().all()
            assert (grad.masked_select(~over_channels(case, mask)) == 0).all()


def padded(case: Case, tensors: list[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same with more of everything that is not there, in every spatial dimension."""
    sizes = [2 * n + 3 for n in mask.shape[1:]]
    place = (slice(None), *(slice(1, 1 + n) for n in mask.shape[1:]))
    wide = mask.new_zeros(len(mask), *sizes)
    wide[place] = mask
    actual = []
    for tensor in tensors:
        moved = tensor.detach().movedim(case.channel_dim, 1)
        big = moved.new_full((*moved.shape[:2], *sizes), math.nan)
        big[(slice(None), *place)] = moved
        actual.append(big.movedim(1, case.channel_dim).requires_grad_())
    return actual, wide


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 3, 8, (5, 6)),  # C side before and after
        Case(2, 3, 40, (4, 5)),  # N side to C side
        Case(2, 3, 150, (3, 4)),  # N side before and after, small products to large ones
        Case(2, 3, 16, (9,), "tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b, d in BACKEND_DTYPES if d in (torch.float64, torch.float32)],
)
def test_wider_padding_changes_nothing(backend: str, dtype: torch.dtype, case: Case):
    tensors, mask = case.make(dtype), mask_of(case, "prefix")
    wide, wide_mask = padded(case, tensors, mask)
    for loss in (TSR, CSA, BOTH):
        run = partial(value_and_grads, loss.public, case, backend=backend)
        value, grads = run(tensors, positions=mask)
        actual, wide_grads = run(wide, positions=wide_mask)
        tolerance = VALUE_TOLERANCE[dtype]
        torch.testing.assert_close(actual, value, rtol=tolerance, atol=tolerance)
        place = [wide_mask.unsqueeze(case.channel_dim).expand_as(g) for g in wide_grads]
        inner = [mask.unsqueeze(case.channel_dim).expand_as(g) for g in grads]
        kept = [g.movedim(case.channel_dim, -1)[wide_mask] for g in wide_grads]
        expected = [g.movedim(case.channel_dim, -1)[mask].double() for g in grads]
        assert relative_error(kept, expected) <= 2 * GRAD_TOLERANCE[dtype], loss.name
        for grad, there in zip([*wide_grads, *grads], [*place, *inner], strict=True):
            assert (grad[~there] == 0).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_the_largest_magnitude_is_that_of_what_is_there(backend: str):
    """Numbers near the end of the range next to padding of ordinary size, and the other way."""
    case = Case(2, 3, 12, (3, 4))
    mask = mask_of(case, "random")
    exact, _ = value_and_grads(reference.csa_loss, case, case.make(torch.float64), positions=mask)
    for scale in (1e-25, 1e25) if backend != "reference" else (1.0,):
        tensors = [t.detach() for t in case.make(torch.float32, scale=scale)]
        for t in tensors:
            t.masked_fill_(~over_channels(case, mask), 1.0)
        actual, grads = value_and_grads(
            csa_loss, case, [t.requires_grad_() for t in tensors], positions=mask, backend=backend
        )
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)
        assert all(g.isfinite().all() for g in grads)


# --- samples without any position ---


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_nothing_there_at_all(backend: str, form: dict):
    for case in (Case(2, 3, 8, (2, 3)), Case(2, 3, 30, (4, 5)), Case(3, 2, 5)):
        nothing = torch.zeros(case.batch, *case.spatial, dtype=torch.bool, device=DEVICE)
        tensors = with_garbage(case, torch.float32, nothing)
        value = tsr_loss(tensors, positions=nothing, backend=backend, **form)
        both = rep_mtl_loss(tensors, positions=nothing, backend=backend)
        assert value == 0 and both.tsr == 0
        # No similarity: the logarithm of the number of negatives.
        assert both.csa.item() == pytest.approx(math.log(case.batch - 1))
        for grad in torch.autograd.grad(value + both.total, tensors):
            assert (grad == 0).all()


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_sample_without_positions_is_one_of_zeros(backend: str, eps: float):
    case = Case(2, 4, 24, (4, 5))
    mask = torch.ones(4, 4, 5, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    zeros = [t.detach() for t in case.make(torch.float32)]
    for t in zeros:
        t[2] = 0
    zeros = [t.requires_grad_() for t in zeros]
    for loss in (csa_loss, partial(tsr_loss, over="space")):
        actual, grads = value_and_grads(
            loss, case, with_garbage(case, torch.float32, mask), positions=mask, eps=eps,
            backend=backend,
        )  # fmt: skip
        expected, exact = value_and_grads(loss, case, zeros, eps=eps, backend=backend)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grads, exact, rtol=1e-4, atol=1e-6)
        assert all((g[2] == 0).all() for g in grads)
    # Over tasks it is no part of the mean.
    actual = tsr_loss(zeros, positions=mask, eps=eps, backend=backend)
    some = tsr_loss([z[[0, 1, 3]] for z in zeros], eps=eps, backend=backend)
    torch.testing.assert_close(actual, some)
