"""The one list of shapes, layouts, dtypes, losses and tolerances, for every backend."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import repmtl_kernels
from repmtl_kernels import RepMTL, csa_loss, reference, rep_mtl_loss, tsr_loss
from repmtl_kernels._training.strength import FIRST
from repmtl_kernels.backends.availability import interpreting
from repmtl_kernels.backends.native import library as native_library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The backends that take tensors of the device.
BACKENDS = [
    name
    for name in repmtl_kernels.available_backends()
    if name != "reference" and not (name == "native" and native_library.status(DEVICE) != "ok")
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Relative errors that rounding alone explains, with float64 as the judge. `judge` allows larger
# ones only where plain PyTorch (the reference in the same dtype) is as far off. The two round small
# differences in different orders, and a factor of LUCK covers that. No error may exceed LIMIT times
# the tolerance, because plain PyTorch in 16 bits may be wrong altogether.
LUCK = 2.0
LIMIT = 5.0
VALUE_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 3e-4,
    torch.float16: 3e-4,
}
GRAD_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 4e-6,
    torch.bfloat16: 6e-3,
    torch.float16: 1e-3,
}


def supports(backend: str, dtype: torch.dtype) -> bool:
    return not (backend == "triton" and dtype == torch.float64)


BACKEND_DTYPES = [(b, d) for b in BACKENDS for d in DTYPES if supports(b, d)]


@dataclass(frozen=True)
class Case:
    """The shape of the saliencies, ``(B, C, *spatial)`` for each of T tasks, and their layout."""

    tasks: int
    batch: int
    channels: int
    spatial: tuple[int, ...] = ()
    layout: str = "contiguous"

    def __str__(self) -> str:
        spatial = "x".join(map(str, self.spatial)) or "1"
        return f"T{self.tasks}-B{self.batch}-C{self.channels}-{spatial}-{self.layout}"

    @property
    def channel_dim(self) -> int:
        return -1 if self.layout == "tokens" else 1

    def make(self, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
        """Return leaves that require a gradient: one tensor for "stacked", else T of them."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.tasks, self.batch, self.channels, *self.spatial)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        # The means of real saliencies are not zero. If they were, anchors would be mere noise.
        values += torch.randn(shape[:3] + (1,) * len(self.spatial), generator=generator)
        values = (values * scale).to(DEVICE, dtype)
        if self.layout == "stacked":
            return [values.requires_grad_()]
        return [LAYOUTS[self.layout](t, v).requires_grad_() for t, v in enumerate(values)]

    def run(self, loss: Callable, tensors: list[Tensor], **options) -> Tensor:
        argument = tensors[0] if self.layout == "stacked" else tensors
        return loss(argument, channel_dim=self.channel_dim, **options)


def _dense(t: int, x: Tensor) -> Tensor:
    return x.clone()


def _channels_last(t: int, x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _tokens(t: int, x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def _crop(t: int, x: Tensor) -> Tensor:
    """Return a view with a gap in each dimension, so that no two dimensions collapse."""
    big = x.new_full([2 * n + 1 for n in x.shape], float("nan"))
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def _transposed(t: int, x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded(t: int, x: Tensor) -> Tensor:
    """Return a view with stride 0 over the positions, as the backward of average pooling does."""
    return x[..., :1, :1].expand(x.shape)


def _negative_view(t: int, x: Tensor) -> Tensor:
    """Return a view that is negative by a flag, as the backward of a complex head may do."""
    return torch._neg_view(-x)


def _mixed(t: int, x: Tensor) -> Tensor:
    return (_dense, _channels_last, _crop)[t % 3](t, x)


LAYOUTS = {
    "contiguous": _dense,
    "channels_last": _channels_last,
    "tokens": _tokens,
    "crop": _crop,
    "transposed": _transposed,
    "expanded": _expanded,
    "negative_view": _negative_view,
    "mixed": _mixed,
}

CASES = [
    Case(3, 2, 8, (5, 6)),  # C < N: the affinities are the smaller Gram matrix
    Case(2, 3, 40, (4, 5)),  # N < C
    Case(2, 2, 16, (4, 4)),  # N = C
    Case(2, 2, 96, (7, 7)),  # Office, 7x7
    Case(3, 4, 40),  # pooled: no spatial dimension
    Case(2, 3, 33, (1, 1)),  # pooled, kept dimensions
    Case(2, 2, 1, (3, 3)),  # one channel
    Case(1, 3, 20, (3, 3)),  # one task
    Case(9, 2, 10, (2, 2)),  # more tasks than one launch takes
    Case(2, 17, 24, (3,)),  # more samples than one tile; a sequence
    Case(2, 2, 12, (2, 3, 2)),  # a volume
    Case(2, 2, 150, (10, 13)),  # several tiles of 64, N side
    Case(2, 2, 70, (9, 10)),  # several tiles of 64, C side
    Case(2, 2, 40, (4, 5), "channels_last"),
    Case(2, 2, 18, (6, 7), "channels_last"),
    Case(2, 2, 40, (30,), "tokens"),
    Case(2, 2, 16, (4, 6), "tokens"),
    Case(2, 2, 20, (4, 5), "crop"),
    Case(2, 2, 11, (2, 3, 4), "crop"),
    Case(2, 2, 24, (4, 5), "transposed"),
    Case(2, 2, 24, (4, 5), "expanded"),
    Case(2, 2, 24, (4, 5), "negative_view"),
    Case(3, 2, 24, (4, 5), "mixed"),
    Case(3, 3, 24, (4, 5), "stacked"),
]

TSR_FORMS = [
    {"over": over, "normalizer": normalizer, "temperature": 0.3}
    for over in ("tasks", "space")
    for normalizer in ("abs", "softmax")
]
TSR_IDS = [f"{form['over']}-{form['normalizer']}" for form in TSR_FORMS]
FLOOR_FORMS = [{"over": over, "floor": 0.1} for over in ("tasks", "space")]
FLOOR_IDS = [f"{form['over']}-floor" for form in FLOOR_FORMS]


@dataclass(frozen=True)
class Loss:
    """A public function that returns a scalar, and the same function of the reference."""

    name: str
    public: Callable[..., Tensor]
    literal: Callable[..., Tensor]


def _total(saliencies, **options) -> Tensor:
    return rep_mtl_loss(saliencies, lambda_tsr=0.7, lambda_csa=1.3, **options).total


def _literal_total(saliencies, *, channel_dim=1, eps=0.0) -> Tensor:
    tsr = reference.tsr_loss(saliencies, channel_dim=channel_dim, eps=eps)
    return 0.7 * tsr + 1.3 * reference.csa_loss(saliencies, channel_dim=channel_dim, eps=eps)


LOSSES = [
    Loss("tsr_loss", tsr_loss, reference.tsr_loss),
    Loss("csa_loss", csa_loss, reference.csa_loss),
    Loss("rep_mtl_loss", _total, _literal_total),
    Loss("floor", partial(tsr_loss, floor=0.2), partial(reference.tsr_loss, floor=0.2)),
]


class _AllTasks(set):
    def __contains__(self, task: object) -> bool:
        return True


def settled(criterion: RepMTL) -> RepMTL:
    """Return the criterion as if after its first calls, so that the next one is an ordinary step.

    It checks no head and does not measure the ratio.
    """
    criterion._progress.checked_derivatives = _AllTasks()
    criterion._progress.calls = FIRST + 1
    return criterion


def value_and_grads(
    loss: Callable, case: Case, tensors: list[Tensor], *, factor: float = 1.0, **options
):
    """Return the value, and the gradient of ``factor`` times the value."""
    value = case.run(loss, tensors, **options)
    return value, torch.autograd.grad(value, tensors, torch.full_like(value, factor))


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    """Return dense copies in float64, for the judge."""
    return [t.detach().double().clone().requires_grad_() for t in tensors]


def relative_error(values: list[Tensor], exact: list[Tensor]) -> float:
    """Return ||values - exact|| / ||exact|| over all tensors, or NaN if ``values`` has NaN."""
    difference = torch.stack([(v.double() - e).norm() for v, e in zip(values, exact, strict=True)])
    return (difference.norm() / torch.stack([e.norm() for e in exact]).norm()).item()


def loss_scale(grads: list[Tensor], dtype: torch.dtype) -> float:
    """Return the power of two that brings the largest float16 gradient into [0.5, 1).

    Gradients are of order 1 / |S|. On large maps they are below the normal numbers of float16, and
    rounding alone costs more than any tolerance. Training in float16 scales its losses for the same
    reason. Other dtypes need no scale: it is 1.
    """
    if dtype != torch.float16 or is_zero(grads):
        return 1.0
    return 2.0 ** -math.frexp(max(g.abs().max().item() for g in grads))[1]


def is_zero(grads: list[Tensor]) -> bool:
    """Return whether gradients in float64 are zero up to rounding."""
    return max(g.norm() for g in grads) < 1e-14


def allowed(tolerance: float, plain_error: float) -> float:
    return max(tolerance, min(plain_error, LIMIT * tolerance))


def grad_tolerance(dtype: torch.dtype, backend: str) -> float:
    """Return the tolerance of gradients that this backend makes in this process."""
    if backend == "triton" and dtype == torch.bfloat16 and interpreting():
        # Triton's interpreter truncates to bfloat16 where hardware rounds.
        return 2.5 * GRAD_TOLERANCE[dtype]
    return GRAD_TOLERANCE[dtype]


def judge(
    loss: Loss,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    rounding: torch.dtype | None = None,
    **options,
) -> None:
    """Assert that value and gradient are as close to the float64 reference as they have to be.

    The error is at most that of rounding, or that of plain PyTorch if it is larger. ``rounding`` is
    a dtype with the rounding of the products, if it is not ``dtype``.
    """
    rounding = rounding or dtype
    tensors = case.make(dtype)
    exact, exact_grads = value_and_grads(loss.literal, case, doubles(tensors), **options)
    factor = loss_scale(exact_grads, dtype)
    exact_grads = [g * factor for g in exact_grads]
    options["factor"] = factor
    value, grads = value_and_grads(loss.public, case, tensors, backend=backend, **options)
    plain, plain_grads = value_and_grads(loss.literal, case, tensors, **options)

    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == expected and value.shape == ()
    scale = max(1.0, abs(exact.item()))
    error, plain_error = abs(value.item() - exact.item()), abs(plain.item() - exact.item())
    assert error <= allowed(VALUE_TOLERANCE[rounding] * scale, LUCK * plain_error)

    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad.dtype == dtype and grad.shape == tensor.shape
    if is_zero(exact_grads):
        plain_error = max(g.abs().max().item() for g in plain_grads)
        assert max(g.abs().max() for g in grads) <= allowed(GRAD_TOLERANCE[rounding], plain_error)
        return
    error = relative_error(grads, exact_grads)
    plain_error = relative_error(plain_grads, exact_grads)
    tolerance = grad_tolerance(rounding, backend)
    if error > allowed(tolerance, LUCK * plain_error):
        others = other_plain_errors(loss, case, tensors, rounding, exact_grads, options)
        plain_error = max(plain_error, *others)
    assert error <= allowed(tolerance, LUCK * plain_error), (error, plain_error)


def other_plain_errors(
    loss: Loss,
    case: Case,
    tensors: list[Tensor],
    rounding: torch.dtype,
    exact_grads: list[Tensor],
    options: dict,
) -> list[float]:
    """Return errors of plain PyTorch that one lucky order of sums does not hide.

    They are of the channels in other orders, and of saliencies as 16-bit products take them.
    """
    errors = []
    dim = 2 if case.layout == "stacked" else case.channel_dim
    channels = torch.arange(case.channels, device=tensors[0].device)
    for order in (channels.flip(0), torch.cat([channels[::2], channels[1::2]])):
        back = order.argsort()
        moved = [leaf(t.index_select(dim, order)) for t in tensors]
        _, grads = value_and_grads(loss.literal, case, moved, **options)
        grads = [g.index_select(dim, back) for g in grads]
        errors.append(relative_error(grads, exact_grads))
    if rounding != tensors[0].dtype:
        cut = [leaf((t.detach().view(torch.int32) & -8192).view(t.dtype)) for t in tensors]
        _, grads = value_and_grads(loss.literal, case, doubles(cut), **options)
        errors.append(relative_error(grads, exact_grads))
    return errors


def leaf(tensor: Tensor) -> Tensor:
    """Return the values as a tensor that requires a gradient."""
    return tensor.detach().requires_grad_()
