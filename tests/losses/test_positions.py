"""Saliencies with padding: a mask of the positions that are there, on every backend."""

import math
import os
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    CASES,
    DEVICE,
    FLOOR_FORMS,
    FLOOR_IDS,
    GRAD_TOLERANCE,
    LOSSES,
    TSR_FORMS,
    TSR_IDS,
    VALUE_TOLERANCE,
    Case,
    Loss,
    judge,
    relative_error,
    supports,
    value_and_grads,
)
from torch import Tensor

from benchmarks.memory import peak_extra_bytes
from benchmarks.rotation import Rotating, graphed, synchronisation_refused
from repmtl_kernels import (
    CSALoss,
    RepMTLLoss,
    TSRLoss,
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)
from repmtl_kernels._losses import backward
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.options import CsaOptions, TsrOptions
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.eager import operand, statistics

EVERY_BACKEND = ["reference", *BACKENDS]
EXACT = [name for name in EVERY_BACKEND if name == "reference" or supports(name, torch.float64)]
FORMS, FORM_IDS = TSR_FORMS + FLOOR_FORMS, TSR_IDS + FLOOR_IDS
TSR, CSA, *_ = LOSSES


def _total(saliencies, **options) -> Tensor:
    return rep_mtl_loss(saliencies, lambda_tsr=0.7, lambda_csa=1.3, tsr_floor=0.1, **options).total


def _literal_total(saliencies, **options) -> Tensor:
    tsr = reference.tsr_loss(saliencies, floor=0.1, **options)
    return 0.7 * tsr + 1.3 * reference.csa_loss(saliencies, **options)


# With a floor: else a few positions with next to no saliency, and their rounding, are most of the
# gradient.
BOTH = Loss("rep_mtl_loss", _total, _literal_total)


def mask_of(case: Case, kind: str) -> Tensor:
    """(B, *spatial). "prefix": the first positions, of each sample another number; "random";
    "empty": random, and nothing of the last sample."""
    count = math.prod(case.spatial)
    if kind == "prefix":
        lengths = 1 + (torch.arange(case.batch) * 5 + count // 2) % count
        mask = torch.arange(count) < lengths[:, None]
    else:
        mask = torch.rand(case.batch, count, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[:, 0] = True
        if kind == "empty":
            mask[-1] = False
    return mask.view(case.batch, *case.spatial).to(DEVICE)


def over_channels(case: Case, mask: Tensor) -> Tensor:
    """The mask as it broadcasts to what ``case.make`` gives."""
    return mask.unsqueeze(1 if case.layout == "stacked" else case.channel_dim)


def with_garbage(case: Case, dtype: torch.dtype, mask: Tensor) -> list[Tensor]:
    """Saliencies that hold NaN, infinities and huge numbers where no position is."""
    tensors = [t.detach() for t in case.make(dtype)]
    others = ~over_channels(case, mask)
    for tensor in tensors:
        bad = torch.tensor([math.nan, 1e30, -math.inf, math.inf], dtype=torch.float64).to(dtype)
        garbage = bad.repeat(tensor.numel())[: tensor.numel()].view(tensor.shape).to(DEVICE)
        tensor.copy_(garbage.where(others, tensor))
    return [t.requires_grad_() for t in tensors]


# --- the paper's equations, sample by sample, on what is cut out of the saliencies ---


def cut(saliencies: list[Tensor], mask: Tensor) -> list[list[Tensor]]:
    """(C, n) of each sample and task."""
    return [[s[b].flatten(1)[:, mask[b].flatten()] for s in saliencies] for b in range(len(mask))]


def cut_tsr(
    saliencies, mask, *, over="tasks", normalizer="abs", temperature=1.0, floor=0.0, eps=0.0
) -> Tensor:
    x = [torch.stack([s.mean(0) for s in sample]) for sample in cut(saliencies, mask)]  # (T, n)
    least = floor * torch.cat([of.abs().flatten() for of in x]).mean() if floor else 0.0
    entropies = []
    for of in x:
        values = of if over == "space" else of.T
        if values.shape[1] == 0:
            entropies.append(values.sum(1))
            continue
        if normalizer == "softmax":
            p = torch.softmax(values / temperature, 1)
        else:
            magnitude = values.abs() + least
            p = magnitude / (magnitude.sum(1, keepdim=True) + eps)
        entropies.append(-(p * p.log()).sum(1))
    return torch.cat(entropies).mean()


def cut_csa(saliencies, mask, *, temperature=0.5, eps=0.0, present=None) -> Tensor:
    def normalized(matrix: Tensor) -> Tensor:
        norm = matrix.norm()
        return matrix / max(norm, eps) if norm > 0 else torch.zeros_like(matrix)

    samples = cut(saliencies, mask)
    anchors, positives = [], []
    for b, sample in enumerate(samples):
        means = [s.mean(1) if s.shape[1] else s.sum(1) for s in sample]
        anchors.append(normalized(sum(torch.outer(a, a) for a in means)))
        wanted = [t for t in range(len(sample)) if present is None or present[t, b]]
        similar = [(anchors[b] * normalized(sample[t] @ sample[t].T)).sum() for t in wanted]
        positives.append(torch.stack(similar).mean() if similar else anchors[b].sum() * 0)
    losses = []
    for b, positive in enumerate(positives):
        negative = [(anchors[b] * other).sum() for k, other in enumerate(anchors) if k != b]
        losses.append(torch.logsumexp(torch.stack(negative) / temperature, 0))
        losses[-1] = losses[-1] - positive / temperature
    return torch.stack(losses).mean()


def assert_same(found: Tensor, exact: Tensor, tensors: list[Tensor], tolerance=1e-12) -> None:
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(found, tensors, allow_unused=True)
    exact_grads = torch.autograd.grad(exact, tensors, allow_unused=True)
    for grad, wanted in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e3 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("kind", ["prefix", "random", "empty"])
@pytest.mark.parametrize("form", [*FORMS, {"eps": 0.3}], ids=[*FORM_IDS, "eps"])
@pytest.mark.parametrize("backend", EXACT)
def test_tsr_of_what_is_cut_out(backend: str, form: dict, kind: str):
    case = Case(3, 4, 6, (3, 5))
    tensors, mask = case.make(torch.float64), mask_of(case, kind)
    found = tsr_loss(tensors, positions=mask, backend=backend, **form)
    assert_same(found, cut_tsr(tensors, mask, **form), tensors)


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
        found = csa_loss(tensors, positions=mask, eps=eps, present=labels, backend=backend)
        assert_same(found, cut_csa(tensors, mask, eps=eps, present=labels), tensors)


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
        found, again = value_and_grads(
            BOTH.public, case, tensors, backend=backend, positions=everything
        )
        torch.testing.assert_close(found, expected)
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
        found = rep_mtl_loss(tensors, positions=view, backend=backend)
        expected = rep_mtl_loss(tensors, positions=dense, backend=backend)
        assert torch.equal(found.total, expected.total)


# --- what is not there has no part in it ---

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
    found, again = run(with_garbage(case, dtype, mask))
    assert torch.isfinite(value) and torch.equal(found, value)
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
    found, again = run(with_garbage(case, torch.float32, mask))
    assert torch.equal(found, value)
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
    found = []
    for tensor in tensors:
        moved = tensor.detach().movedim(case.channel_dim, 1)
        big = moved.new_full((*moved.shape[:2], *sizes), math.nan)
        big[(slice(None), *place)] = moved
        found.append(big.movedim(1, case.channel_dim).requires_grad_())
    return found, wide


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
        found, wide_grads = run(wide, positions=wide_mask)
        tolerance = VALUE_TOLERANCE[dtype]
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
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
        found, grads = value_and_grads(
            csa_loss, case, [t.requires_grad_() for t in tensors], positions=mask, backend=backend
        )
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
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
        found, grads = value_and_grads(
            loss, case, with_garbage(case, torch.float32, mask), positions=mask, eps=eps,
            backend=backend,
        )  # fmt: skip
        expected, exact = value_and_grads(loss, case, zeros, eps=eps, backend=backend)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grads, exact, rtol=1e-4, atol=1e-6)
        assert all((g[2] == 0).all() for g in grads)
    # Over tasks it is no part of the mean.
    found = tsr_loss(zeros, positions=mask, eps=eps, backend=backend)
    some = tsr_loss([z[[0, 1, 3]] for z in zeros], eps=eps, backend=backend)
    torch.testing.assert_close(found, some)


# --- gradients, and a few samples at a time ---


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


@pytest.mark.parametrize("block", [1, 10**9], ids=["one sample at a time", "at once"])
@pytest.mark.parametrize(
    "case", [Case(3, 5, 8, (5, 6)), Case(2, 5, 40, (4, 5), "mixed"), Case(2, 3, 70, (9,))], ids=str
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_recompute(backend: str, dtype: torch.dtype, case: Case, block: int, monkeypatch):
    monkeypatch.setattr(backward, "RECOMPUTE_BLOCK", block)
    loss = Loss("recompute", partial(BOTH.public, memory="recompute"), BOTH.literal)
    judge(loss, case, dtype, backend, positions=mask_of(case, "empty"))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "case",
    [Case(3, 5, 8, (5, 6), "channels_last"), Case(2, 5, 40, (4, 5)), Case(2, 5, 30, (7, 11))],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_a_few_samples_at_a_time(backend: str, dtype, case: Case, samples: int, monkeypatch):
    """As many as a block holds are masked together; which ones they are changes nothing."""
    elements = case.channels * math.prod(case.spatial)
    masked, seen = operand.masked, []
    monkeypatch.setattr(operand, "MASKED_BLOCK", samples * elements + 1)
    for module in (operand, statistics):
        monkeypatch.setattr(
            module, "masked", lambda s, mask: (seen.append(len(s)), masked(s, mask))[1]
        )
    judge(BOTH, case, dtype, backend, positions=mask_of(case, "empty"))
    assert set(seen) <= {samples, 5 % samples or samples}
    assert seen or backend == "native"


@pytest.mark.skipif(
    DEVICE != "cpu" or "REPMTL_EMULATED_CUDA" in os.environ,
    reason="counts what PyTorch allocates on the CPU, without the workspaces of operators for CUDA",
)
@pytest.mark.parametrize("loss", [TSR, CSA, BOTH], ids=lambda loss: loss.name)
@pytest.mark.parametrize(
    "case",
    [Case(2, 8, 128, (16, 20)), Case(2, 8, 384, (15, 16)), Case(2, 8, 600, (8, 8))],
    ids=["C side", "N side", "few positions"],
)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_saliencies_are_not_copied(backend: str, case: Case, loss: Loss, monkeypatch):
    """The peak grows by a block of two samples and its temporaries, not by one task's eight."""
    elements = case.channels * math.prod(case.spatial)
    monkeypatch.setattr(operand, "MASKED_BLOCK", 2 * elements)
    tensors, mask = case.make(torch.float32), mask_of(case, "random")

    def call(positions):
        value = loss.public(tensors, positions=positions, backend=backend)
        torch.autograd.grad(value, tensors)

    peaks = []
    for positions in (None, mask):
        call(positions)
        peaks.append(peak_extra_bytes(partial(call, positions), torch.device("cpu")))
    assert peaks[1] - peaks[0] < 5 * 4 * elements


# --- the stages ---


@pytest.mark.parametrize(
    "case",
    [Case(2, 3, 8, (5, 6)), Case(2, 3, 40, (4, 5)), Case(3, 3, 40, (4, 5), "channels_last")],
    ids=str,
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_stages(backend: str, dtype: torch.dtype, case: Case):
    """The stages keep the contract of a mask, on saliencies that hold garbage elsewhere."""
    stages, eager = choice.load(backend), choice.load("eager")
    mask = mask_of(case, "empty")
    flat = mask.flatten(1)
    views = [t.detach() for t in with_garbage(case, dtype, mask)]
    zeros = [v.masked_fill(~over_channels(case, mask), 0).double() for v in views]
    found = stages.statistics(views, positions=True, channels=True, mask=flat)
    exact = eager.statistics(zeros, positions=True, channels=True)
    count = flat.sum(1).clamp_min(1)[:, None]
    rounding = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.positions.double(), exact.positions, **rounding)
    assert (found.positions.masked_select(~flat) == 0).all()
    means = exact.channels * flat.shape[1] / count
    torch.testing.assert_close(found.channels.double(), means, **rounding)
    scaled = found.scale.double() * torch.stack([z.abs().amax((1, 2, 3)) for z in zeros])
    assert ((scaled[:, :-1] >= 0.5) & (scaled[:, :-1] < 2)).all()
    assert (found.scale[:, -1] == 1).all() and (found.channels[:, -1] == 0).all()
    for only in ("positions", "channels"):
        wanted = {"positions": False, "channels": False} | {only: True}
        alone = stages.statistics(views, mask=flat, **wanted)
        torch.testing.assert_close(getattr(alone, only), getattr(found, only))
    unit = eager.anchors(found.channels, eps=0.0, with_grad=False).unit
    gram = stages.gram(views, found.scale, unit, eps=0.0, with_grad=True, mask=flat)
    assert gram.matrix.isfinite().all() and (gram.similarity[:, -1] == 0).all()
    if math.prod(case.spatial) <= case.channels:
        assert (gram.matrix.masked_select(~flat[:, None]) == 0).all()
        assert (gram.matrix.masked_select(~flat[:, :, None]) == 0).all()
        assert (gram.projection.masked_select(~flat[:, None]) == 0).all()
    without = stages.gram(views, found.scale, unit, eps=0.0, with_grad=False, mask=flat)
    torch.testing.assert_close(without.similarity, gram.similarity, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(3, 4, 64, (7, 7)), Case(2, 2, 96, (12, 12))], ids=str)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_capture_in_a_cuda_graph(backend: str, case: Case):
    """No synchronisation, and a replay reads the mask anew."""
    tensors, mask = case.make(torch.float32), mask_of(case, "random")

    def step(saliencies):
        total = rep_mtl_loss(saliencies, positions=mask, backend=backend).total
        return total, torch.autograd.grad(total, saliencies)

    step(tensors)  # compiles
    torch.cuda.synchronize()
    if backend != "reference":
        with synchronisation_refused():
            step(tensors)
    replay = graphed(Rotating(step, [tensors]), torch.device("cuda"))
    for kind in ("prefix", "empty"):
        mask.copy_(mask_of(case, kind))
        torch.testing.assert_close(replay(), step(tensors))


# --- compilers, transforms, operators ---

CASE = Case(2, 3, 12, (3, 3))


def _objective(backend: str):
    def function(*s, positions):
        return rep_mtl_loss([x * 2 for x in s], positions=positions, backend=backend).total * 3

    return function


@pytest.mark.cell("`positions=`, a mask of padding: `torch.compile`, `torch.vmap`, `torch.export`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_compile_full_graph(backend: str):
    torch.compiler.reset()
    function, tensors = _objective(backend), CASE.make(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for kind in ("random", "empty"):
        mask = mask_of(CASE, kind)
        found, expected = compiled(*tensors, positions=mask), function(*tensors, positions=mask)
        torch.testing.assert_close(found, expected)
        grads = torch.autograd.grad(found, tensors)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, tensors))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_compile_of_func_grad(backend: str):
    torch.compiler.reset()
    function, mask = _objective(backend), mask_of(CASE, "random")
    tensors = [t.detach() for t in CASE.make(torch.float32)]
    grad = torch.func.grad(function)
    found = torch.compile(grad, fullgraph=True, backend="aot_eager")(*tensors, positions=mask)
    torch.testing.assert_close(found, grad(*tensors, positions=mask))


@pytest.mark.cell("`positions=`, a mask of padding: `torch.compile`, `torch.vmap`, `torch.export`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap(backend: str):
    """Over saliencies and masks, over saliencies alone, and over masks alone."""
    stacks = [torch.stack(Case(2, 3, 12, (3, 3)).make(torch.float32, seed=k)) for k in range(3)]
    stack = torch.stack(stacks).detach()  # (3, T, B, C, H, W)
    masks = torch.stack([mask_of(CASE, kind) for kind in ("random", "empty", "prefix")])

    def loss(s, positions):
        return rep_mtl_loss(s, positions=positions, backend=backend).total

    ways = {(0, 0): (stack, masks), (0, None): (stack, masks[0]), (None, 0): (stack[0], masks)}
    for dims, given in ways.items():
        each = [
            [x if dim is None else x[k] for x, dim in zip(given, dims, strict=True)]
            for k in range(3)
        ]
        found = torch.vmap(loss, dims)(*given)
        torch.testing.assert_close(found, torch.stack([loss(*one) for one in each]))
        grads = torch.vmap(torch.func.grad(loss), dims)(*given)
        exact = torch.stack([torch.func.grad(loss)(*one) for one in each])
        torch.testing.assert_close(grads, exact)


class Objective(torch.nn.Module):
    """Parameters before the loss, so that what is exported can be trained."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.loss = RepMTLLoss(lambda_tsr=0.7, lambda_csa=1.3, backend=backend)
        self.weight = torch.nn.Parameter(torch.randn(6, 6, device=DEVICE))

    def forward(self, a, b, positions):
        mixed = torch.einsum("oc,bcn->bon", self.weight, a).tanh()
        return self.loss([mixed, b], positions=positions).total


@pytest.mark.cell("`positions=`, a mask of padding: `torch.compile`, `torch.vmap`, `torch.export`")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_export(backend: str):
    module = Objective(backend)

    def given(batch: int, count: int) -> tuple[Tensor, ...]:
        a, b = (torch.randn(batch, 6, count, device=DEVICE) for _ in range(2))
        return a, b, torch.rand(batch, count, device=DEVICE) < 0.7

    batch, count = torch.export.Dim("B"), torch.export.Dim("N")
    dims = {0: batch, 2: count}
    shapes = {"a": dims, "b": dims, "positions": {0: batch, 1: count}}
    exported = torch.export.export(module, given(3, 7), dynamic_shapes=shapes)
    loaded = exported.run_decompositions().module()
    for arguments in (given(3, 7), given(5, 4)):
        found, expected = loaded(*arguments), module(*arguments)
        torch.testing.assert_close(found, expected)
        grad = torch.autograd.grad(found, loaded.weight)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, module.weight))


CONFIGS = {
    "both": {},
    "tsr": {"csa": None},
    "csa": {"tsr": None},
    "recompute": {"csa": CsaOptions(memory="recompute")},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend: str, name: str):
    config = Config(backend, False, 1, True, TsrOptions(), CsaOptions())._replace(**CONFIGS[name])
    dtype = torch.float64 if supports(backend, torch.float64) else torch.float32
    operands = [t.detach() for t in CASE.make(dtype)]
    mask = mask_of(CASE, "random")
    ops = torch.ops.repmtl
    torch.library.opcheck(ops.losses.default, (operands, None, mask, *config.flat()))
    _, _, *saved = ops.losses(operands, None, mask, *config.flat())
    one = torch.ones((), dtype=dtype, device=DEVICE)
    for grads in ((one, one), (one, None), (None, one)):
        if (config.tsr or grads[0] is None) and (config.csa or grads[1] is None):
            given = (*grads, mask, operands, saved, [False, True], *config.flat())
            torch.library.opcheck(ops.losses_backward.default, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_after_the_mask_has_changed(backend: str):
    """Autograd notices that a saved mask was written."""
    tensors, mask = CASE.make(torch.float32), mask_of(CASE, "random")
    value = csa_loss(tensors, positions=mask, backend=backend)
    mask[0, 0, 0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


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


# --- -inf in a softmax ---


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
    found, grads = value_and_grads(tsr_loss, case, tensors, backend=backend, **form)
    assert exact.isfinite() and all(g.isfinite().all() for g in (*grads, *exact_grads))
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-6)
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
    found = tsr_loss(tensors, over=over, normalizer="softmax", backend=backend)
    assert found.isnan()


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
    found = stage(x.float(), with_grad=True, **options)
    torch.testing.assert_close(found.value.double(), exact.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(found.grad.double(), exact_grad, rtol=1e-4, atol=1e-8)
    assert (found.grad[x == -math.inf] == 0).all()
    assert torch.equal(stage(x.float(), with_grad=False, **options).value, found.value)


# --- two ranks ---

T, C, N = 3, 12, 6


def whole_batch(batch: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(batch)
    values = torch.randn(T, batch, C, N, generator=generator, dtype=torch.float64)
    values += torch.randn(T, batch, C, 1, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, N, generator=generator) < 0.6
    mask[1] = False
    return list(values), mask


def check_average_is_that_of_the_whole_batch(rank: int) -> None:
    for sizes, over, options in (
        ((3, 3), "tasks", {}),
        ((5, 2), "tasks", {"normalizer": "softmax"}),
        ((1, 4), "tasks", {"memory": "recompute"}),
        ((2, 4), "space", {"normalizer": "softmax"}),
        ((2, 4), "space", {}),
    ):
        values, mask = whole_batch(sum(sizes))
        samples = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        module = partial(rep_mtl_loss, lambda_tsr=0.7, lambda_csa=1.3, over=over, **options)
        everything = [v.clone().requires_grad_() for v in values]
        mine = [v[samples].clone().requires_grad_() for v in values]
        exact = module(everything, positions=mask)
        found = module(mine, positions=mask[samples], group="world")
        for field in ("tsr", "csa", "total"):
            value = getattr(found, field).detach().clone()
            dist.all_reduce(value)
            torch.testing.assert_close(value / 2, getattr(exact, field), rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(found.total, mine)
        for grad, wanted in zip(grads, torch.autograd.grad(exact.total, everything), strict=True):
            torch.testing.assert_close(grad / 2, wanted[samples], rtol=1e-8, atol=1e-12)


def check_csa_alone_and_by_modules(rank: int) -> None:
    values, mask = whole_batch(6)
    samples = slice(0, 2) if rank == 0 else slice(2, None)
    found = CSALoss(group="world")([v[samples] for v in values], positions=mask[samples])
    dist.all_reduce(found)
    torch.testing.assert_close(found / 2, csa_loss(values, positions=mask), rtol=1e-10, atol=0)


def check_nothing_there_on_one_rank_or_on_all(rank: int) -> None:
    values, mask = whole_batch(6)
    for empty in (slice(3, None), slice(None)):
        mask[empty] = False
        samples = slice(0, 3) if rank == 0 else slice(3, None)
        mine = [v[samples].clone().requires_grad_() for v in values]
        found = rep_mtl_loss(mine, positions=mask[samples], group="world")
        exact = rep_mtl_loss(values, positions=mask)
        value = found.tsr.detach().clone()
        dist.all_reduce(value)
        torch.testing.assert_close(value / 2, exact.tsr, rtol=1e-10, atol=1e-12)
        assert all(g.isfinite().all() for g in torch.autograd.grad(found.total, mine))


def check_all_give_a_mask_or_none(rank: int) -> None:
    values, mask = whole_batch(4)
    with pytest.raises(ValueError, match="group: expected a mask of positions, or none, on every"):
        csa_loss(values, positions=mask if rank else None, group="world")
    match = "positions: expected shape" if rank else "ranks .1. of it have raised an error"
    with pytest.raises(ValueError, match=match):
        csa_loss(values, positions=mask[:, : N - rank], group="world")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory) -> list[dict[str, str]]:
    return ranks.run(CHECKS, Path(tmp_path_factory.mktemp("positions")))


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.slow_cpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_two_ranks(both_ranks, check):
    for rank, failed in enumerate(both_ranks):
        assert "end" not in failed, failed
        assert check.__name__ not in failed, f"rank {rank}\n{failed[check.__name__]}"
