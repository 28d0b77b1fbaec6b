"""A map as a small PNG with a palette, written by hand: the page needs no library for it."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

from repmtl_kernels._monitor.colours import MISSING, rgb, sequential

SHADES = 255  # the last of the 256 entries is for values that are missing


def data_uri(values: Tensor, largest: float) -> str:
    """Return ``(H, W)`` values from 0 to ``largest`` as a PNG in a URI, one pixel for each."""
    scaled = (values / largest * (SHADES - 1)).round().clamp(0, SHADES - 1)
    indices = torch.where(values.isnan(), torch.full_like(scaled, SHADES), scaled).byte()
    palette = b"".join(bytes(colour) for colour in (*sequential(SHADES), rgb(MISSING)))
    return f"data:image/png;base64,{base64.b64encode(_png(indices, palette)).decode()}"


def _png(indices: Tensor, palette: bytes) -> bytes:
    height, width = indices.shape
    # Each row begins with its filter, 0: none.
    rows = b"".join(b"\0" + bytes(row) for row in indices.tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    pixels = zlib.compress(rows, 9)
    parts = {b"IHDR": header, b"PLTE": palette, b"IDAT": pixels, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
