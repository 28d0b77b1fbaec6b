"""The checks of the arguments of a call, for all public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._ground.checks import (
    LARGEST_INT,
    attribute_text,
    check_plain,
    shown,
)
from repmtl_kernels._ground.saliency import DTYPES, accumulation_dtype
from repmtl_kernels._losses.options import CsaOptions, TsrOptions


def check_saliencies(
    saliencies: object,
    channel_dim: int,
    name: str = "saliencies",
    names: Sequence[str] = (),
) -> tuple[Tensor, ...]:
    """Return the operands: T tensors ``(B, C, *spatial)``, or one stacked ``(T, B, C, *spatial)``.

    Args:
        saliencies: a sequence of T tensors, or one stacked tensor.
        channel_dim: dimension of the channels within one task's saliency.
        name: what messages call ``saliencies``.
        names: what messages call the T tensors; by default their index in ``name``.

    Raises:
        ValueError, TypeError: the losses are not defined on these saliencies.
    """
    operands: tuple[Tensor, ...]
    if isinstance(saliencies, Tensor):
        check_plain(name, saliencies)
        if not 3 <= saliencies.ndim <= 6:
            raise ValueError(
                f"{name}: one tensor must be stacked, (T, B, C, *spatial) with 0 to 3 spatial "
                f"dimensions; got shape {tuple(saliencies.shape)}. Pass a list for single tasks."
            )
        operands, task_ndim = (saliencies,), saliencies.ndim - 1
    elif isinstance(saliencies, Sequence) and not isinstance(saliencies, str | bytes):
        operands = tuple(saliencies)
        if not operands:
            raise ValueError(f"{name}: expected at least one task, got an empty sequence")
        names = names or [f"{name}[{t}]" for t in range(len(operands))]
        for name_of_s, s in zip(names, operands, strict=True):
            if not isinstance(s, Tensor):
                raise TypeError(f"{name_of_s}: expected a Tensor, got {type(s).__name__}")
            check_plain(name_of_s, s)
        first = operands[0]
        for name_of_s, s in zip(names, operands, strict=True):
            for attribute in ("shape", "dtype", "device", "layout"):
                if getattr(s, attribute) != getattr(first, attribute):
                    raise ValueError(
                        f"{name_of_s}: every task must have the {attribute} of {names[0]}, "
                        f"{attribute_text(getattr(first, attribute))}; "
                        f"got {attribute_text(getattr(s, attribute))}"
                    )
        if not 2 <= first.ndim <= 5:
            raise ValueError(
                f"{name}: each task must be (B, C, *spatial) with 0 to 3 spatial dimensions; "
                f"got shape {tuple(first.shape)}"
            )
        task_ndim = first.ndim
    else:
        raise TypeError(
            f"{name}: expected a sequence of T tensors (B, C, *spatial) or one tensor "
            f"(T, B, C, *spatial); got {type(saliencies).__name__}"
        )
    first = operands[0]
    if first.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16; got {first.dtype}"
        )
    if first.layout != torch.strided:
        raise TypeError(f"{name}: expected strided tensors, got layout {first.layout}")
    for size in first.shape:
        if size == 0:
            raise ValueError(
                f"{name}: every dimension must be at least 1; got shape {tuple(first.shape)}"
            )
    check_channel_dim(channel_dim)
    if not -task_ndim <= channel_dim < task_ndim or channel_dim % task_ndim == 0:
        raise ValueError(
            f"channel_dim: expected a dimension of one task's {task_ndim}-dimensional saliency "
            f"other than 0, the batch; got {channel_dim}"
        )
    return operands


def checked_operands(
    saliencies: object, positions: Tensor | None, channel_dim: int
) -> tuple[tuple[Tensor, ...], bool]:
    """Return the operands of :func:`check_saliencies`, and whether the only one is stacked."""
    operands, stacked = check_saliencies(saliencies, channel_dim), isinstance(saliencies, Tensor)
    check_positions(positions, operands[0][0] if stacked else operands[0], channel_dim)
    return operands, stacked


def check_channel_dim(channel_dim: object) -> None:
    """Raise if no saliencies have this dimension for their channels."""
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"channel_dim: expected an int, got {type(channel_dim).__name__}")
    if not -LARGEST_INT <= channel_dim <= LARGEST_INT:
        raise ValueError(
            f"channel_dim: expected a dimension of the saliencies; got {shown(channel_dim)}"
        )
    if channel_dim == 0:
        raise ValueError("channel_dim: expected a dimension other than 0, the batch; got 0")


def check_present(present: Tensor | None, tasks: int, batch: int, device: torch.device) -> None:
    """Raise if ``present`` is neither None nor a bool tensor (T, B) on this device."""
    if present is None:
        return
    if not isinstance(present, Tensor):
        raise TypeError(f"present: expected a bool Tensor or None, got {type(present).__name__}")
    check_plain("present", present)
    if present.dtype != torch.bool:
        raise TypeError(f"present: expected a bool Tensor, got {present.dtype}")
    if tuple(present.shape) != (tasks, batch):
        transposed = tuple(present.shape) == (batch, tasks)
        remedy = "Transpose it" if transposed else "A mask of padding is given as positions="
        raise ValueError(
            f"present: expected shape (T, B) = {(tasks, batch)}; got {tuple(present.shape)}. "
            f"{remedy}"
        )
    if present.layout != torch.strided:
        raise TypeError(f"present: expected a strided tensor, got layout {present.layout}")
    if present.device != device:
        raise ValueError(f"present: expected device {device}; got {present.device}")


def check_positions(
    positions: Tensor | None, saliency: Tensor, channel_dim: int, name: str = "positions"
) -> None:
    """Raise if ``positions`` is neither None nor a bool tensor (B, *spatial).

    Args:
        positions: the mask.
        saliency: one task's, checked.
        channel_dim: dimension of its channels.
        name: what messages call the mask.
    """
    if positions is None:
        return
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name}: expected a bool Tensor or None, got {type(positions).__name__}")
    check_plain(name, positions)
    if positions.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool Tensor, got {positions.dtype}")
    if positions.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided Tensor, got layout {positions.layout}")
    expected = list(saliency.shape)
    del expected[channel_dim]
    if list(positions.shape) != expected:
        raise ValueError(
            f"{name}: expected shape (B, *spatial) = {tuple(expected)}, that of one task's "
            f"saliency without its channels; got {tuple(positions.shape)}. For tokens (B, N, D) "
            "give channel_dim=-1"
        )
    if positions.device != saliency.device:
        raise ValueError(f"{name}: expected device {saliency.device}; got {positions.device}")


ONE_SAMPLE = (
    "CSA contrasts a sample with the other samples of the batch and needs at least 2; "
    "got B = 1. Use a larger batch, drop the last short batch (DataLoader(drop_last=True)), or use "
    "TSR alone (tsr_loss; lambda_csa=0 in RepMTL)."
)


def check_csa_batch(
    operands: Sequence[Tensor],
    stacked: bool,
    present: Tensor | None,
    group: str,
    name: str = "saliencies",
) -> None:
    """Raise if CSA has no other samples to contrast with, or ``present`` does not fit.

    ``group`` is the name of a process group whose other ranks may have samples; empty without one.
    """
    shape = operands[0].shape
    tasks, batch = (shape[0], shape[1]) if stacked else (len(operands), shape[0])
    if batch == 1 and not group:
        raise ValueError(f"{name}: {ONE_SAMPLE}")
    check_present(present, tasks, batch, operands[0].device)


class Call(NamedTuple):
    """Checked arguments."""

    operands: tuple[Tensor, ...]
    stacked: bool  # the only operand has the tasks in its first dimension
    tsr: TsrOptions | None
    csa: CsaOptions | None


def checked_call(
    saliencies: Tensor | Sequence[Tensor],
    tsr: TsrOptions | None,
    csa: CsaOptions | None,
    present: Tensor | None,
    positions: Tensor | None,
    channel_dim: int,
    group: str,
) -> Call:
    """Return the arguments of a call of one or both losses. Raise if one is not as documented.

    A loss whose options are None is left out. ``group`` is the name of a group of several.
    """
    operands, stacked = check_saliencies(saliencies, channel_dim), isinstance(saliencies, Tensor)
    dtype = accumulation_dtype(operands[0].dtype)
    both = tsr is not None and csa is not None
    if csa is not None:
        csa = csa.check(csa.prefix if both else "", dtype)
        check_csa_batch(operands, stacked, present, group)
    if tsr is not None:
        tsr = tsr.check(tsr.prefix if both else "", dtype)
    if positions is not None:
        check_positions(positions, operands[0][0] if stacked else operands[0], channel_dim)
    return Call(operands, stacked, tsr, csa)
