"""Tests that only the operators for CUDA need: one call, blocks, wide loads, argument checks.

Runs on a CUDA device, and on the CPU under ``test_emulated_cuda.py``.
"""

import math
import os
from functools import partial

import pytest
import torch
from cases import DEVICE, DTYPES, LOSSES, Case, judge, relative_error, value_and_grads

from repmtl_kernels import csa_loss, rep_mtl_loss
from repmtl_kernels._ground.saliency import canonical_tasks
from repmtl_kernels.backends.eager import affinity as eager_affinity
from repmtl_kernels.backends.eager import contrast as eager_contrast
from repmtl_kernels.backends.native import library as native_library

if not os.environ.get("REPMTL_EMULATED_CUDA") and (
    DEVICE != "cuda" or native_library.status("cuda") != "ok"
):
    pytest.skip("needs a CUDA device and the library for it", allow_module_level=True)

from repmtl_kernels.backends.native import stages as native

pytestmark = pytest.mark.decisive

ops = native_library.load("cuda")

ANY = [
    Case(1, 2, 700, (27, 25)),  # Gram matrix in two blocks, N side
    Case(1, 2, 650, (26, 26), "channels_last"),  # the same, C side
    Case(2, 2, 96, (7, 7)),  # small
    Case(3, 2, 64, (8, 8)),  # small, full tiles, wide loads
    Case(2, 2, 64, (4, 4), "channels_last"),
    Case(2, 3, 24, (3, 8), "crop"),  # nothing is adjacent
    Case(2, 2, 33, (5, 3, 2), "crop"),  # three dimensions
    Case(9, 2, 40, (3, 3)),  # more tasks than one launch takes
    Case(5, 2, 16, (4, 8), "channels_last"),  # C side, two groups of vectors
    Case(3, 2, 48, (5, 8), "mixed"),  # one launch for each layout
    Case(3, 2, 300),  # pooled
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ANY, ids=str)
def test_every_way_through_the_kernels(case: Case, dtype: torch.dtype):
    # One task has no TSR: its entropy is 0.
    judge(LOSSES[1 if case.tasks == 1 else 2], case, dtype, "native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ANY, ids=str)
def test_every_way_with_a_mask(case: Case, dtype: torch.dtype):
    """Positions that the mask leaves out hold NaN."""
    mask = torch.rand(case.batch, math.prod(case.spatial)) < 0.7
    mask[:, 0] = True
    mask = mask.view(case.batch, *case.spatial).to(DEVICE)
    tensors = case.make(dtype)
    spoiled = [t.detach() for t in case.make(dtype)]
    for t in spoiled:
        t.masked_fill_(~mask.unsqueeze(1), math.nan)
    for loss in LOSSES[:2]:
        judge(loss, case, dtype, "native", positions=mask)
        run = partial(value_and_grads, loss.public, case, backend="native", positions=mask)
        value, grads = run(tensors)
        masked, masked_grads = run([t.requires_grad_() for t in spoiled])
        assert torch.equal(masked, value)
        assert all(torch.equal(a, b) for a, b in zip(masked_grads, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ANY, ids=str)
def test_every_way_through_the_affinity(case: Case, dtype: torch.dtype):
    saliencies = canonical_tasks([t.detach() for t in case.make(dtype)], False, case.channel_dim)
    mask = (torch.rand(case.batch, math.prod(case.spatial)) < 0.7).to(DEVICE)
    for there in (None, mask):
        products = native.affinity(saliencies, mask=there)
        exact = eager_affinity.affinity([s.double() for s in saliencies], mask=there)
        norms = exact.diagonal(dim1=1, dim2=2).sqrt()
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        assert torch.equal(products, products.mT)
        allowed = tolerance * norms[:, :, None] * norms[:, None]
        assert ((products - exact).abs() <= allowed).all()


@pytest.mark.parametrize("case", ANY, ids=str)
def test_stages_and_one_call_give_the_same(monkeypatch, case: Case):
    """A group of processes runs the stages one by one."""
    options = {"backend": "native"}
    in_one = value_and_grads(LOSSES[2].public, case, case.make(torch.float32), **options)
    monkeypatch.setattr(native, "in_one_call", lambda saliency: None)
    value, grads = value_and_grads(LOSSES[2].public, case, case.make(torch.float32), **options)
    torch.testing.assert_close(value, in_one[0], rtol=1e-6, atol=0)
    assert relative_error(grads, [g.double() for g in in_one[1]]) < 1e-6


def test_contrast_in_several_blocks():
    case = Case(2, 1100, 3)  # (T B)^2 > 2^22
    judge(LOSSES[1], case, torch.float64, "native")


def test_contrast_of_the_stages_in_several_blocks(monkeypatch):
    monkeypatch.setattr(native, "in_one_call", lambda saliency: None)
    case = Case(2, 17, 24, (3,))
    whole = value_and_grads(csa_loss, case, case.make(torch.float64), backend="native")
    five_samples = 2 * 34 * 5
    monkeypatch.setattr(eager_contrast, "products_at_a_time", lambda anchors: five_samples)
    value, grads = value_and_grads(csa_loss, case, case.make(torch.float64), backend="native")
    torch.testing.assert_close(value, whole[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(grads, whole[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [ANY[0], ANY[2], ANY[4]], ids=str)
def test_gradients_of_some_tasks(case: Case):
    tensors = case.make(torch.float32)
    _, all_grads = value_and_grads(LOSSES[2].public, case, tensors, backend="native")
    for t, tensor in enumerate(tensors):
        value = LOSSES[2].public(tensors, channel_dim=case.channel_dim, backend="native")
        (grad,) = torch.autograd.grad(value, [tensor])
        assert torch.equal(grad, all_grads[t])


def test_present_tasks():
    case = Case(3, 4, 24, (3, 3))
    present = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool().to(DEVICE)
    tensors = case.make(torch.float64)
    for mask in (present, present.mT.contiguous().mT):
        value, grads = value_and_grads(csa_loss, case, tensors, present=mask, backend="native")
        expected, exact = value_and_grads(csa_loss, case, tensors, present=mask, backend="eager")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        assert relative_error(grads, exact) < 1e-12


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_rows_that_start_anywhere(offset: int):
    """The kernels may load 16 bytes at a time only where memory is aligned."""
    case = Case(2, 2, 24, (4, 8))
    tensors = []
    for t in case.make(torch.float32):
        memory = torch.full((t.numel() + offset,), float("nan"), device=DEVICE)
        memory[offset:] = t.detach().flatten()
        tensors.append(memory[offset:].view(t.shape).requires_grad_())
    value, grads = value_and_grads(LOSSES[2].public, case, tensors, backend="native")
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact, exact_grads = value_and_grads(LOSSES[2].public, case, doubles, backend="eager")
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert relative_error(grads, exact_grads) < 4e-6


@pytest.mark.parametrize("case", [ANY[0], ANY[2]], ids=str)
def test_bitwise_repeatable(case: Case):
    runs = [
        value_and_grads(LOSSES[2].public, case, case.make(torch.bfloat16), backend="native")
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


GOOD = torch.ones(2, 3, 4, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.statistics([GOOD, GOOD.double()], True, True), "one dtype"),
        (lambda: ops.statistics([GOOD, GOOD[:1]], True, True), "of one shape"),
        (lambda: ops.statistics([GOOD[0]], True, True), "one to three spatial dimensions"),
        (lambda: ops.statistics([GOOD.long()], True, True), "floating-point tensors"),
        (lambda: ops.statistics([GOOD[:0]], True, True), "no size of 0, got one in dimension 0"),
        (lambda: ops.statistics([GOOD], False, False), "positions, channels or both"),
        (lambda: ops.entropy(GOOD[0], True, False, 1.0, 0.0, True), "x: expected 3 dimensions"),
        (lambda: ops.entropy(GOOD.mT, True, False, 1.0, 0.0, True), "x: .*contiguous"),
        (lambda: ops.unit_anchors(GOOD.bfloat16(), 0.0, True), "a: .*precision of the others"),
        (lambda: ops.log_sum_exp(GOOD[:, :, None], 5, 0.5, None), "dots: "),
        (
            lambda: ops.through_normalisation(GOOD, GOOD, GOOD[0, :, 0], GOOD),
            r"factor: .*of shape \(3\)",
        ),
        (lambda: ops.affinity([GOOD, GOOD[:1]]), "of one shape"),
        (lambda: ops.affinity([GOOD], GOOD[:, :2, 0] > 0), r"mask: .*\(2, 4\)"),
        (lambda: ops.statistics([GOOD], True, True, GOOD[:, 0].contiguous()), "mask: "),
        (lambda: ops.statistics([GOOD], True, True, GOOD[:, :2, 0] > 0), r"mask: .*\(2, 4\)"),
        (lambda: ops.gram([GOOD], GOOD[:1, :, 0], GOOD[:1], 0.0, True), r"scale: .*\(1, 2\)"),
        (
            lambda: ops.losses(
                [GOOD], GOOD[:1, :2, 0], None, *(True,) * 4, 1.0, 0.0, 0.5, 0.0, True
            ),
            "present: ",
        ),
        (
            lambda: ops.losses_backward(
                GOOD[0, 0, 0], None, None, [GOOD], [GOOD[:1]], [0], [GOOD] * 12
            ),
            "of one shape",
        ),
        (
            lambda: ops.losses_backward(
                GOOD[0, 0, 0], None, None, [GOOD], [GOOD], [1], [GOOD] * 12
            ),
            "tasks: expected numbers of saliencies, got 1",
        ),
        (
            lambda: ops.losses_backward(GOOD[0, 0, 0], None, None, [GOOD], [GOOD], [0], [GOOD]),
            "saved: expected 12 tensors, got 1",
        ),
    ],
)
def test_operators_refuse_what_they_cannot_read(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def _arguments() -> dict[str, tuple]:
    def randn(*shape):
        return torch.randn(shape, device=DEVICE)

    saliencies = [randn(3, 20, 4, 4) for _ in range(2)]
    u, ones, scalar = randn(2, 3, 20), torch.ones(3, device=DEVICE), randn()
    pair = torch.ones(2, 3, device=DEVICE)
    projection, matrix = randn(2, 3, 2, 16), randn(2, 3, 16, 16)
    outputs = [torch.zeros_like(saliencies[0])]
    mask = torch.rand(3, 16, device=DEVICE) < 0.5
    saved = [randn(2, 3, 16), pair, u, ones, u, u, pair, pair, pair, pair, projection, matrix]
    return {
        "statistics": (saliencies, True, True, mask),
        "affinity": (saliencies, mask),
        "entropy": (randn(2, 3, 16), True, False, 1.0, 0.0, True),
        "unit_anchors": (u, 0.0, True),
        "log_sum_exp": (randn(2, 3, 2, 3), 0, 0.5, randn(2, 3).abs()),
        "weigh_dots": (randn(2, 3, 2, 3), randn(2, 3), randn(2, 3), 0, 0.5),
        "through_normalisation": (u.clone(), u, ones, u),
        "gram": (saliencies, pair, u, 0.0, True, mask),
        "saliency_grad": (
            saliencies, outputs, [1], pair, u, ones, u, u, projection, matrix, pair, pair, ones,
            scalar, None, mask,
        ),
        "losses": (saliencies, None, mask, True, True, True, False, 1.0, 0.0, 0.5, 0.0, True),
        "losses_backward": (scalar, randn(2, 3, 16), mask, saliencies, outputs, [0], saved),
    }  # fmt: skip


@pytest.mark.parametrize("name", _arguments())
def test_opcheck(name: str):
    tests = ("test_schema", "test_faketensor")  # autograd is that of the losses
    torch.library.opcheck(getattr(ops, name).default, _arguments()[name], test_utils=tests)


def test_float16_sums_of_float16_are_refused():
    tensors = Case(2, 3, 40, (4, 5)).make(torch.float16)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = True
    try:
        with pytest.raises(ValueError, match="allow_fp16_accumulation: expected False"):
            csa_loss(tensors, backend="native")
    finally:
        matmul.allow_fp16_accumulation = before


def test_the_device_can_run_the_kernels():
    assert ops.why_not(GOOD) == ""


def test_results_without_a_gradient():
    case = Case(2, 3, 40, (4, 5))
    saliencies = canonical_tasks([t.detach() for t in case.make(torch.float32)], False, 1)
    with torch.no_grad():
        value = rep_mtl_loss(saliencies, backend="native").total
    results = ops.losses(saliencies, None, None, True, True, True, False, 1.0, 0.0, 0.5, 0.0, False)
    assert all(t.numel() == 0 for t in results[2:])
    torch.testing.assert_close(value, 0.01 * results[0] + 0.01 * results[1])
