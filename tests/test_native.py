"""What only the compiled operators have: units of work, threads, argument checks."""

import pytest
import torch
from cases import DEVICE, LOSSES, Case, judge, value_and_grads

from repmtl_kernels import _native, csa_loss
from repmtl_kernels._saliency import canonical_tasks
from repmtl_kernels.backends import eager

if _native.status() != "ok":
    pytest.skip(_native.status(), allow_module_level=True)
if DEVICE != "cpu":
    pytest.skip("the native backend is for the CPU", allow_module_level=True)

from repmtl_kernels.backends import native

SEVERAL_UNITS = [
    Case(2, 2, 600, (3, 3)),  # units of 256 rows
    Case(2, 2, 5, (40, 60)),  # blocks of 1024 elements of a row
    Case(2, 2, 5, (40, 60), "channels_last"),
    Case(2, 2, 1500, (5,), "tokens"),
    Case(2, 2, 300, (20, 60), "crop"),
    Case(2, 2, 600, (5, 5)),  # panels of 256 channels
    Case(5, 2, 70, (8, 8), "channels_last"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SEVERAL_UNITS, ids=str)
def test_several_units_of_work(case: Case, dtype: torch.dtype):
    saliencies = canonical_tasks([t.detach() for t in case.make(dtype)], False, case.channel_dim)
    found = native.statistics(saliencies, positions=True, channels=True)
    exact = eager.statistics([s.double() for s in saliencies], positions=True, channels=True)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for name in ("positions", "channels"):
        error = (getattr(found, name).double() - getattr(exact, name)).abs().max()
        assert error <= tolerance * 4, name
    assert torch.equal(found.scale.double(), exact.scale)
    judge(LOSSES[2], case, dtype, "native")


@pytest.mark.parametrize("positions", [range(1, 65), range(0)], ids=("own", "library"))
@pytest.mark.parametrize("case", [Case(2, 3, 96, (7, 7)), Case(3, 2, 9, (3,), "crop")], ids=str)
def test_products_of_few_positions_by_own_code_and_by_the_library(monkeypatch, case, positions):
    monkeypatch.setattr(native, "SMALL", positions)
    judge(LOSSES[2], case, torch.float32, "native")


@pytest.mark.parametrize("case", [SEVERAL_UNITS[0], Case(2, 40, 30, (4, 5))], ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: Case):
    saliencies = [t.detach() for t in case.make(torch.float32)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            statistics = native.statistics(saliencies, positions=True, channels=True)
            entropy = native.entropy(
                statistics.positions, over="tasks", normalizer="abs", temperature=1.0, eps=0.0,
                with_grad=True,
            )  # fmt: skip
            anchors = native.ops.unit_anchors(statistics.channels, 0.0, True)
            gram = native.gram(saliencies, statistics.scale, anchors[0], eps=0.0, with_grad=True)
            found.append([*statistics, *entropy, *anchors, *gram])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_blocks_of_the_contrast_give_the_same(monkeypatch):
    case = Case(2, 17, 24, (3,))
    whole = value_and_grads(csa_loss, case, case.make(torch.float64), backend="native")
    monkeypatch.setattr(eager, "CONTRAST_BLOCK", 2 * 34 * 5)  # five samples at a time
    value, grads = value_and_grads(csa_loss, case, case.make(torch.float64), backend="native")
    torch.testing.assert_close(value, whole[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(grads, whole[1], rtol=1e-12, atol=1e-14)


GOOD = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.ops.statistics([GOOD, GOOD.double()], True, True), "one dtype"),
        (lambda: native.ops.statistics([GOOD, GOOD[:1]], True, True), "of one shape"),
        (lambda: native.ops.statistics([GOOD[0]], True, True), "at least one spatial dimension"),
        (lambda: native.ops.statistics([GOOD.long()], True, True), "floating-point saliencies"),
        (lambda: native.ops.entropy(GOOD[0], True, False, 1.0, 0.0, True), r"x: .*\(T, B, N\)"),
        (lambda: native.ops.entropy(GOOD.mT, True, False, 1.0, 0.0, True), "x: .*contiguous"),
        (lambda: native.ops.unit_anchors(GOOD.bfloat16(), 0.0, True), "float32 or float64"),
        (lambda: native.ops.log_sum_exp(GOOD[:, :, None], 5, 0.5), "dots: "),
        (
            lambda: native.ops.through_normalisation(GOOD, GOOD, GOOD[0, :, 0], GOOD),
            r"factor: .*contiguous CPU tensor of shape \(3\)",
        ),
        (
            lambda: native.ops.add_outer(
                None, False, GOOD[0], None, GOOD[:0, 0], GOOD[:, :0], torch.ones(3, 4, 5)
            ),
            r"left: expected \(K, B, C\)",
        ),
        (
            lambda: native.ops.small_gram(
                [torch.ones(2, 3, 65)], GOOD[:1, :2, 0], GOOD[:1, :2, :3], True
            ),
            "at most 64 positions",
        ),
        (
            lambda: native.ops.small_gradient(
                GOOD, GOOD, GOOD[0], None, GOOD, GOOD, torch.ones(2, 3, 5)
            ),
            "saliency: expected the output's batch",
        ),
    ],
)
def test_operators_refuse_what_they_cannot_read(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_an_empty_batch_of_positions_or_tasks_is_no_crash():
    x, a, scale = native.ops.statistics([torch.ones(0, 3, 4)], True, True)
    assert x.shape == (1, 0, 4) and a.shape == (1, 0, 3) and scale.shape == (1, 0)
