"""Every bad argument is named, with what was expected and what came."""

import pytest
import torch

from repmtl_kernels import (
    CSALoss,
    RepMTL,
    RepMTLLoss,
    TSRLoss,
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)

GOOD = [torch.randn(2, 3, 4, 4) for _ in range(2)]

BAD_SALIENCIES = {
    "no task": ([], ValueError, "saliencies: expected at least one task"),
    "not a sequence": (3.0, TypeError, "saliencies: expected a sequence"),
    "a dict": ({"a": GOOD[0]}, TypeError, "saliencies: expected a sequence.*dict"),
    "not a tensor": (
        [GOOD[0], None],
        TypeError,
        r"saliencies\[1\]: expected a Tensor, got NoneType",
    ),
    "other shape": ([GOOD[0], GOOD[0][:1]], ValueError, r"saliencies\[1\].*\(2, 3, 4, 4\).*\(1, 3"),
    "other dtype": ([GOOD[0], GOOD[0].double()], ValueError, r"saliencies\[1\].*float32.*float64"),
    "other device": ([GOOD[0], GOOD[0].to("meta")], ValueError, r"saliencies\[1\].*cpu.*meta"),
    "integers": ([GOOD[0].long()] * 2, TypeError, "saliencies: expected float64.*int64"),
    "complex": ([GOOD[0].cfloat()] * 2, TypeError, "saliencies: expected float64.*complex64"),
    "one vector each": ([torch.randn(4)] * 2, ValueError, r"saliencies: each task.*\(4,\)"),
    "four spatial": ([torch.randn(2, 2, 1, 1, 1, 1)], ValueError, "0 to 3 spatial"),
    "a single map": (torch.randn(4, 4), ValueError, "saliencies: one tensor must be stacked"),
    "no position": ([torch.randn(2, 3, 0)], ValueError, r"at least 1.*\(2, 3, 0\)"),
    "no sample": ([torch.randn(0, 3, 2)], ValueError, r"at least 1.*\(0, 3, 2\)"),
    "sparse": ([torch.randn(2, 3).to_sparse()], TypeError, "saliencies: expected strided"),
    "one sparse": (
        [GOOD[0], GOOD[0].to_sparse()],
        ValueError,
        r"saliencies\[1\].*torch.strided; got torch.sparse_coo",
    ),
}

FUNCTIONS = [tsr_loss, csa_loss, rep_mtl_loss, reference.tsr_loss, reference.csa_loss]
FUNCTION_IDS = ["tsr_loss", "csa_loss", "rep_mtl_loss", "reference.tsr", "reference.csa"]


@pytest.mark.parametrize("bad", BAD_SALIENCIES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=FUNCTION_IDS)
def test_saliencies(function, bad: str):
    saliencies, error, message = BAD_SALIENCIES[bad]
    with pytest.raises(error, match=message):
        function(saliencies)


@pytest.mark.parametrize("function", FUNCTIONS, ids=FUNCTION_IDS)
@pytest.mark.parametrize(
    ("channel_dim", "error", "message"),
    [
        (0, ValueError, "other than 0, the batch; got 0"),
        (-4, ValueError, "other than 0, the batch; got -4"),
        (4, ValueError, "channel_dim: expected a dimension"),
        (1.0, TypeError, "channel_dim: expected an int, got float"),
        (True, TypeError, "channel_dim: expected an int, got bool"),
    ],
)
def test_channel_dim(function, channel_dim, error, message):
    with pytest.raises(error, match=message):
        function(GOOD, channel_dim=channel_dim)


@pytest.mark.parametrize(
    ("function", "option", "value", "error"),
    [
        (tsr_loss, "over", "channels", ValueError),
        (tsr_loss, "normalizer", "l2", ValueError),
        (tsr_loss, "temperature", 0.0, ValueError),
        (tsr_loss, "temperature", -1, ValueError),
        (tsr_loss, "temperature", float("nan"), ValueError),
        (tsr_loss, "temperature", "hot", TypeError),
        (tsr_loss, "eps", -1e-8, ValueError),
        (tsr_loss, "eps", float("inf"), ValueError),
        (csa_loss, "temperature", 0.0, ValueError),
        (csa_loss, "temperature", None, TypeError),
        (csa_loss, "eps", -1.0, ValueError),
        (csa_loss, "group", "world", ValueError),
        (csa_loss, "present", [[True]], TypeError),
        (csa_loss, "present", torch.ones(2, 2), TypeError),
        (csa_loss, "present", torch.ones(2, 3, dtype=torch.bool), ValueError),
        (csa_loss, "present", torch.ones(2, 2, dtype=torch.bool, device="meta"), ValueError),
        (tsr_loss, "floor", -0.1, ValueError),
        (tsr_loss, "floor", "much", TypeError),
        (reference.tsr_loss, "floor", float("inf"), ValueError),
        (rep_mtl_loss, "tsr_floor", -1, ValueError),
        (rep_mtl_loss, "lambda_tsr", -0.1, ValueError),
        (rep_mtl_loss, "lambda_csa", "0.1", TypeError),
        (rep_mtl_loss, "over", "", ValueError),
        (rep_mtl_loss, "tsr_temperature", 0, ValueError),
        (rep_mtl_loss, "csa_temperature", 0, ValueError),
        (csa_loss, "memory", "much", ValueError),
        (rep_mtl_loss, "memory", None, ValueError),
        (tsr_loss, "backend", "cuda", ValueError),
    ],
)
def test_options(function, option, value, error):
    with pytest.raises(error, match=f"^{option}: "):
        function(GOOD, **{option: value})


@pytest.mark.parametrize("over", ["tasks", "space"])
def test_no_floor_for_softmax(over):
    for call, name in (
        (tsr_loss, "floor"),
        (reference.tsr_loss, "floor"),
        (rep_mtl_loss, "tsr_floor"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*normalizer='softmax', got 0.1"):
            call(GOOD, over=over, normalizer="softmax", **{name: 0.1})
    with pytest.raises(ValueError, match="^tsr_floor: "):
        RepMTLLoss(normalizer="softmax", tsr_floor=0.1)


@pytest.mark.parametrize("loss", [csa_loss, rep_mtl_loss, reference.csa_loss])
def test_batch_of_one_says_what_to_do(loss):
    with pytest.raises(ValueError, match="at least 2; got B = 1.*drop_last"):
        loss([s[:1] for s in GOOD])
    with pytest.raises(ValueError, match="at least 2; got B = 1"):
        loss(torch.stack(GOOD)[:, :1])


def test_batch_of_one_is_fine_for_tsr():
    assert torch.isfinite(tsr_loss([s[:1] for s in GOOD]))


@pytest.mark.parametrize(
    ("module", "option", "value"),
    [
        (TSRLoss, "over", "time"),
        (TSRLoss, "temperature", 0),
        (CSALoss, "temperature", -1),
        (CSALoss, "group", "everyone"),
        (CSALoss, "memory", "much"),
        (RepMTLLoss, "memory", None),
        (RepMTLLoss, "lambda_tsr", -1),
        (RepMTLLoss, "csa_temperature", 0),
        (TSRLoss, "backend", "cuda"),
        (CSALoss, "channel_dim", 0),
        (RepMTL, "backend", "cuda"),
        (RepMTL, "channel_dim", 0),
    ],
)
def test_modules_check_when_they_are_made(module, option, value):
    with pytest.raises(ValueError, match=f"^{option}: "):
        module(**{option: value})


def test_modules_are_the_functions():
    torch.testing.assert_close(TSRLoss(over="space")(GOOD), tsr_loss(GOOD, over="space"))
    torch.testing.assert_close(TSRLoss(floor=0.3)(GOOD), tsr_loss(GOOD, floor=0.3))
    assert TSRLoss(floor=0.3)(GOOD) > TSRLoss()(GOOD) + 0.01
    assert RepMTLLoss(tsr_floor=0.3)(GOOD).tsr == rep_mtl_loss(GOOD, tsr_floor=0.3).tsr
    assert rep_mtl_loss(GOOD, tsr_floor=0.3).tsr == tsr_loss(GOOD, floor=0.3)
    torch.testing.assert_close(CSALoss(temperature=0.2)(GOOD), csa_loss(GOOD, temperature=0.2))
    found = RepMTLLoss(lambda_tsr=0.3, lambda_csa=0.4, eps=1e-6)(GOOD)
    assert found == rep_mtl_loss(GOOD, lambda_tsr=0.3, lambda_csa=0.4, eps=1e-6)
    assert "temperature=0.2" in repr(CSALoss(temperature=0.2))


def test_modules_pass_present_on():
    present = torch.tensor([[True, False], [True, True]])
    assert CSALoss()(GOOD, present) == csa_loss(GOOD, present=present)
    assert RepMTLLoss()(GOOD, present=present).csa == csa_loss(GOOD, present=present)
