"""The checks of each loss's arguments, for the public functions, modules and reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_kernels._distributed import Group, check_group
from repmtl_kernels._ground.checks import (
    LARGEST_INT,
    check_choice,
    check_number,
    check_plain,
    shown,
    size_text,
)
from repmtl_kernels._ground.saliency import DTYPES, NORMALIZERS, OVER, accumulation_dtype

MEMORY = ("auto", "save", "recompute")


def check_saliencies(
    saliencies: Tensor | Sequence[Tensor],
    channel_dim: int,
    name: str = "saliencies",
    names: Sequence[str] = (),
) -> tuple[Tensor, ...]:
    """The operands: T tensors ``(B, C, *spatial)``, or one stacked ``(T, B, C, *spatial)``.

    ``name`` is what messages call the argument, ``names`` its T tensors where not by their index.
    Raises ``TypeError`` or ``ValueError`` for anything that the losses are not defined on.
    """
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
            for what in ("shape", "dtype", "device", "layout"):
                if getattr(s, what) != getattr(first, what):
                    raise ValueError(
                        f"{name_of_s}: every task must have the {what} of {names[0]}, "
                        f"{size_text(getattr(first, what))}; got {size_text(getattr(s, what))}"
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


def check_channel_dim(channel_dim: int) -> None:
    """What can be told of it without the saliencies."""
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"channel_dim: expected an int, got {type(channel_dim).__name__}")
    if not -LARGEST_INT <= channel_dim <= LARGEST_INT:
        raise ValueError(
            f"channel_dim: expected a dimension of the saliencies; got {shown(channel_dim)}"
        )
    if channel_dim == 0:
        raise ValueError("channel_dim: expected a dimension other than 0, the batch; got 0")


def check_present(present: Tensor | None, tasks: int, batch: int, device: torch.device) -> None:
    if present is None:
        return
    if not isinstance(present, Tensor):
        raise TypeError(f"present: expected a bool Tensor or None, got {type(present).__name__}")
    check_plain("present", present)
    if present.dtype != torch.bool:
        raise TypeError(f"present: expected a bool Tensor, got {present.dtype}")
    if tuple(present.shape) != (tasks, batch):
        raise ValueError(
            f"present: expected shape (T, B) = {(tasks, batch)}; got {tuple(present.shape)}. A "
            "mask of padding is given as positions="
        )
    if present.layout != torch.strided:
        raise TypeError(f"present: expected a strided tensor, got layout {present.layout}")
    if present.device != device:
        raise ValueError(f"present: expected device {device}; got {present.device}")


def check_positions(
    positions: Tensor | None, saliency: Tensor, channel_dim: int, name: str = "positions"
) -> None:
    """``saliency``: one task's, checked."""
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


def check_tsr_options(
    *,
    over: str,
    normalizer: str,
    temperature: float,
    floor: float,
    eps: float,
    prefix: str = "",
    dtype: torch.dtype = torch.float64,
) -> None:
    """``dtype``: the one that the losses are computed in; of unknown saliencies, the widest."""
    check_choice("over", over, OVER)
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_number(
        f"{prefix}temperature", temperature, minimum=0, exclusive=True, dtype=dtype, normal=True
    )
    check_number(f"{prefix}floor", floor, minimum=0, dtype=dtype, normal=True)
    if floor != 0 and normalizer != "abs":
        raise ValueError(
            f"{prefix}floor: it is a share of the mean of |x|, for normalizer='abs'; expected 0 "
            f"with normalizer={normalizer!r}, got {floor!r}"
        )
    check_number("eps", eps, minimum=0, dtype=dtype)


def check_csa_options(
    *,
    temperature: float,
    eps: float,
    group: Group | None,
    memory: str = "auto",
    prefix: str = "",
    dtype: torch.dtype = torch.float64,
) -> None:
    """``dtype`` as for :func:`check_tsr_options`."""
    check_number(
        f"{prefix}temperature", temperature, minimum=0, exclusive=True, dtype=dtype, normal=True
    )
    check_number("eps", eps, minimum=0, dtype=dtype)
    check_group(group)
    check_choice("memory", memory, MEMORY)


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
    """``group``: the name of the one whose other ranks may have samples; empty without."""
    shape = operands[0].shape
    tasks, batch = (shape[0], shape[1]) if stacked else (len(operands), shape[0])
    if batch == 1 and not group:
        raise ValueError(f"{name}: {ONE_SAMPLE}")
    check_present(present, tasks, batch, operands[0].device)


def tsr_arguments(
    saliencies: Tensor | Sequence[Tensor],
    *,
    over: str,
    normalizer: str,
    temperature: float,
    floor: float,
    eps: float,
    positions: Tensor | None,
    channel_dim: int,
) -> tuple[tuple[Tensor, ...], bool]:
    """Checked operands of TSR and whether they are one stacked tensor."""
    operands = check_saliencies(saliencies, channel_dim)
    check_tsr_options(
        over=over,
        normalizer=normalizer,
        temperature=temperature,
        floor=floor,
        eps=eps,
        dtype=accumulation_dtype(operands[0].dtype),
    )
    stacked = isinstance(saliencies, Tensor)
    if positions is not None:
        check_positions(positions, operands[0][0] if stacked else operands[0], channel_dim)
    return operands, stacked


def csa_arguments(
    saliencies: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    eps: float,
    present: Tensor | None,
    positions: Tensor | None,
    channel_dim: int,
    group: str,
    memory: str = "auto",
    prefix: str = "",
) -> tuple[tuple[Tensor, ...], bool]:
    """Checked operands of CSA and whether they are one stacked tensor. ``group`` is a name."""
    operands, stacked = check_saliencies(saliencies, channel_dim), isinstance(saliencies, Tensor)
    check_csa_options(
        temperature=temperature,
        eps=eps,
        group=None,
        memory=memory,
        prefix=prefix,
        dtype=accumulation_dtype(operands[0].dtype),
    )
    check_csa_batch(operands, stacked, present, group)
    if positions is not None:
        check_positions(positions, operands[0][0] if stacked else operands[0], channel_dim)
    return operands, stacked
