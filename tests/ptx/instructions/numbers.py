"""Numbers that numpy does not have: bfloat16, TF32, and pairs of halves in one register."""

from __future__ import annotations

import numpy as np


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers (uint16) as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; uint16."""
    bits = np.asarray(value).view(np.uint32).astype(np.uint64)
    tie = (bits >> np.uint64(16)) & np.uint64(1)
    rounded = ((bits + np.uint64(0x7FFF) + tie) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def to_float16(value: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest float16; uint16."""
    return np.asarray(np.asarray(value).astype(np.float16)).view(np.uint16)


def tf32(bits: np.ndarray) -> np.ndarray:
    """Return what the matrix units make of float32 bits: the lower 13 cut off; float32."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def pair_kind(kind: str) -> str:
    """Return the type of each half: ``bf16`` of ``bf16x2``."""
    return kind.removesuffix("x2")


def halves(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper half of registers (uint32) as float32."""
    low, high = bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    if kind == "bf16":
        return bfloat16(low), bfloat16(high)
    return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)


def number(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return elements of a matrix (unsigned, of their size) as float64."""
    if kind == "bf16":
        return bfloat16(bits).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return tf32(bits).astype(np.float64)
    return bits.view({4: np.float32, 8: np.float64}[bits.dtype.itemsize]).astype(np.float64)
