"""Compares what two monitors have observed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from repmtl_kernels import SaliencySummary


def parts(value: object) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if dataclasses.is_dataclass(part):
            yield from parts(part)
        elif isinstance(part, dict):
            yield from part.items()
        else:
            yield field.name, part


def assert_same(first: SaliencySummary, second: SaliencySummary, tolerance: float = 0.0) -> None:
    for (name, a), (other, b) in zip(parts(first), parts(second), strict=True):
        assert name == other
        if isinstance(a, float):
            a, b = torch.tensor(a), torch.tensor(b)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
            )
        else:
            assert a == b, name
