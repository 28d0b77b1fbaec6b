"""Every bad argument is named, with what was expected and what came."""

import inspect
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from repmtl_kernels import (
    CSALoss,
    RepMTL,
    RepMTLLoss,
    TSRLoss,
    csa_loss,
    reference,
    rep_mtl_loss,
    task_saliencies,
    tsr_loss,
)

GOOD = [torch.randn(2, 3, 4, 4) for _ in range(2)]
with warnings.catch_warnings():  # that these are prototypes, or on their way out
    warnings.simplefilter("ignore")
    PARTS = [torch.ones(2, 5), torch.ones(3, 5)]
    NESTED = torch.nested.nested_tensor(PARTS)
    JAGGED = torch.nested.nested_tensor(PARTS, layout=torch.jagged)
    NESTED_MASK = torch.nested.nested_tensor([part > 0 for part in PARTS])
    MASKED = torch.masked.masked_tensor(GOOD[0], GOOD[0] > 0)
    QUANTIZED = torch.quantize_per_tensor(GOOD[0], 0.1, 0, torch.quint8)

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
    "nested": (
        torch.nested.nested_tensor([GOOD[0][0], GOOD[0][0]]),
        TypeError,
        "saliencies: .*nested",
    ),
    "jagged": ([JAGGED], TypeError, r"saliencies\[0\]: .*nested"),
    "one nested": ([GOOD[0], NESTED], TypeError, r"saliencies\[1\]: .*nested"),
    "lazy": (nn.UninitializedParameter(), TypeError, "saliencies: .*UninitializedParameter"),
    "masked": ([MASKED], TypeError, r"saliencies\[0\]: .*MaskedTensor"),
    "quantized": ([QUANTIZED], TypeError, "saliencies: expected float64.*quint8"),
    "an array": (np.ones((2, 2, 3)), TypeError, "saliencies: expected a sequence.*ndarray"),
    "arrays": ([np.ones((2, 3))] * 2, TypeError, r"saliencies\[0\]: expected a Tensor.*ndarray"),
    "a string": ("ab", TypeError, "saliencies: expected a sequence.*str"),
    "none": (None, TypeError, "saliencies: expected a sequence.*NoneType"),
    "a scalar": (torch.tensor(1.0), ValueError, "saliencies: one tensor must be stacked"),
    "scalars": ([torch.tensor(1.0)] * 2, ValueError, "saliencies: each task"),
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


@pytest.mark.parametrize(
    "shape, remedy", [((2, 3), "Transpose it$"), ((2, 4), "padding is given as positions=$")]
)
def test_a_shape_of_present_has_its_remedy(shape, remedy):
    message = rf"^present: expected shape \(T, B\) = \(3, 2\); got .*\. .*{remedy}"
    with pytest.raises(ValueError, match=message):
        csa_loss([*GOOD, GOOD[0]], present=torch.ones(shape, dtype=torch.bool))


class _Incomparable:
    """Neither is it equal to anything, nor can it be shown."""

    def __eq__(self, other):
        raise RuntimeError

    def __repr__(self):
        raise RuntimeError


# No option takes any of them.
ODD = {
    "nan": float("nan"),
    "text": "x",
    "bytes": b"x",
    "array": np.ones(3),
    "scalar array": np.array(1.0),
    "bool array": np.bool_(True),
    "tensor": torch.ones(2),
    "scalar tensor": torch.tensor(0.5),
    "meta tensor": torch.ones(2, 2, dtype=torch.bool, device="meta"),
    "sparse mask": torch.ones(2, 2, dtype=torch.bool).to_sparse(),
    "nested mask": NESTED_MASK,
    "complex": 1j,
    "huge": 10**400,
    "huge and negative": -(10**400),
    "too long to be written": 10**6000,
    "huge fraction": Fraction(10**6000, 7),
    "a type": float,
    "incomparable": _Incomparable(),
}
# These are checked in a place of their own.
OTHER = {"saliencies", "self", "task_weights", "scaler", "log_losses"}


def _options(called) -> list[str]:
    return [name for name in inspect.signature(called).parameters if name not in OTHER]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "called", [*FUNCTIONS, TSRLoss, CSALoss, RepMTLLoss, RepMTL], ids=lambda c: c.__qualname__
)
def test_every_option_is_named(called, odd: str):
    assert len(_options(called)) >= 6
    arguments = () if inspect.isclass(called) else (GOOD,)
    for option in _options(called):
        with pytest.raises((ValueError, TypeError)) as raised:
            called(*arguments, **{option: ODD[odd]})
        assert str(raised.value).startswith(f"{option}: "), (option, str(raised.value))


@pytest.mark.parametrize("option", ["scaler", "log_losses", "task_weights", "start", "every"])
@pytest.mark.parametrize("odd", ["text", "array", "scalar tensor", "complex", "incomparable"])
def test_other_options_of_the_criterion_are_named(option: str, odd: str):
    with pytest.raises((ValueError, TypeError), match=f"^{option}: "):
        RepMTL(**{option: ODD[odd]})


@pytest.mark.parametrize("flag", [True, None])
@pytest.mark.parametrize("function", FUNCTIONS, ids=FUNCTION_IDS)
def test_neither_bool_nor_none_is_a_number(function, flag):
    for option in _options(function):
        if option in ("group", "present", "positions") and flag is None:
            continue
        with pytest.raises((ValueError, TypeError), match=f"^{option}: "):
            function(GOOD, **{option: flag})


NUMBERS = [
    (tsr_loss, "temperature", {"normalizer": "softmax"}),
    (tsr_loss, "floor", {}),
    (csa_loss, "temperature", {}),
    (rep_mtl_loss, "csa_temperature", {}),
    (rep_mtl_loss, "tsr_temperature", {"normalizer": "softmax"}),
    (reference.csa_loss, "temperature", {}),
]


@pytest.mark.parametrize("value", [1e-39, 1e-40, 1e-60, 1e39, 1e60, Fraction(1, 10**50)], ids=str)
@pytest.mark.parametrize(("function", "option", "others"), NUMBERS)
def test_numbers_that_float32_does_not_hold(function, option, others, value):
    """As normal numbers: GPUs take those below for zero. float64 holds them."""
    with pytest.raises(ValueError, match=rf"^{option}: .*1\.18e-38 to 3\.4e\+38.*torch.float32"):
        function(GOOD, **{option: value}, **others)
    for half in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"^{option}: .*torch.float32"):
            function([s.to(half) for s in GOOD], **{option: value}, **others)
    actual = function([s.double() for s in GOOD], **{option: value}, **others)
    assert torch.isfinite(actual if isinstance(actual, torch.Tensor) else actual.csa)


@pytest.mark.parametrize(
    ("function", "option"),
    [(tsr_loss, "eps"), (csa_loss, "eps"), (rep_mtl_loss, "lambda_tsr"), (rep_mtl_loss, "eps")],
)
def test_numbers_whose_limit_is_zero(function, option):
    for small in (1e-40, 5e-324, Fraction(1, 10**500)):
        actual, limit = (function(GOOD, **{option: value}) for value in (small, 0))
        torch.testing.assert_close(actual, limit)
    with pytest.raises(ValueError, match=rf"^{option}: .*of at most 3\.4e\+38.*torch.float32"):
        function(GOOD, **{option: 1e39})


@pytest.mark.parametrize("option", ["strength", "clip", "log_offset", "lambda_csa", "tsr_floor"])
def test_numbers_that_the_criterion_does_not_hold(option: str):
    with pytest.raises(ValueError, match=f"^{option}: .*torch.float32"):
        RepMTL(**{option: 1e39})


@pytest.mark.parametrize(
    "options",
    [
        {"strength": Fraction(1, 3)},
        {"strength": 2**70},
        {"clip": Fraction(1, 3)},
        {"log_losses": True, "log_offset": Fraction(1, 3)},
        {"csa_temperature": np.float32(0.5), "eps": Fraction(1, 7)},
        {"every": 2**62},
    ],
    ids=str,
)
def test_real_numbers_of_every_type(options: dict):
    z = torch.randn(3, 4, 5, requires_grad=True)
    RepMTL(**options)([z.square().mean(), z.exp().mean()], z).backward()
    assert torch.isfinite(z.grad).all()


def test_losses_that_are_no_real_dense_numbers():
    z = torch.randn(2, 3, 4, requires_grad=True)
    good = z.square().sum()
    for bad in (
        (z * 1j).sum(),
        good.to_sparse(),
        torch.quantize_per_tensor(good, 1, 0, torch.qint8),
    ):
        for called in (task_saliencies, RepMTL()):
            with pytest.raises(TypeError, match=r"^losses\[1\]: expected a real, strided Tensor"):
                called([good, bad], z)


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
    actual = RepMTLLoss(lambda_tsr=0.3, lambda_csa=0.4, eps=1e-6)(GOOD)
    assert actual == rep_mtl_loss(GOOD, lambda_tsr=0.3, lambda_csa=0.4, eps=1e-6)
    assert "temperature=0.2" in repr(CSALoss(temperature=0.2))


def test_modules_pass_present_on():
    present = torch.tensor([[True, False], [True, True]])
    assert CSALoss()(GOOD, present) == csa_loss(GOOD, present=present)
    assert RepMTLLoss()(GOOD, present=present).csa == csa_loss(GOOD, present=present)
