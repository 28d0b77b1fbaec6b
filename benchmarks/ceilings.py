"""The best rates of this machine, which floors are counted with: copies, products, the L2 cache."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.cases import BFLOAT16, FLOAT16, FLOAT32, TF32, products_in
from benchmarks.timing import block_ms

# Numbers of a copy, and the side of the matrices.
NUMBERS = {"cpu": 1 << 26, "cuda": 1 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
# Programs for each multiprocessor: all of them run at once, and end together.
READERS = 4
# Far more than the L1 cache of a multiprocessor, and at home in either half of the L2 cache.
L2_SHARE = 4


def of(device: torch.device, file: Path | None = None) -> dict:
    """Return GB/s and TFLOP/s: what ``file`` has, else as measured now and written there."""
    if file is not None and file.exists():
        return json.loads(file.read_text())
    rates = {"copy_gbs": copy_gbs(device), "matmul_tflops": matmul_tflops(device)}
    if device.type == "cuda":
        rates["l2_read_gbs"] = l2_read_gbs(device)
    if file is not None:
        results.write(file, json.dumps(rates))
    return rates


def copy_gbs(device: torch.device) -> float:
    source = torch.randn(NUMBERS[device.type], device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    return round(2 * source.nbytes / _best_ms(copy, device) / 1e6, 1)


def matmul_tflops(device: torch.device) -> dict[str, float]:
    """Return the rates of matrix products by precision."""
    side, rates = SIDE[device.type], {}
    for precision in (FLOAT32, TF32, BFLOAT16, FLOAT16) if device.type == "cuda" else (FLOAT32,):
        with products_in(precision):
            a, b = (torch.randn(side, side, device=device).to(precision.dtype) for _ in range(2))
            ms = _best_ms(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
            rates[precision.name] = round(2 * side**3 / ms / 1e9, 4)
    return rates


def l2_read_gbs(device: torch.device) -> float:
    """Return the rate of reading numbers that all multiprocessors share, again and again."""
    from benchmarks import l2

    properties = torch.cuda.get_device_properties(device)
    blocks = properties.L2_cache_size // L2_SHARE // (4 * l2.BLOCK)
    source = torch.randn(blocks * l2.BLOCK, device=device)
    sums = torch.empty(READERS * properties.multi_processor_count, device=device)
    ms = _best_ms(partial(l2.read_by_all, source, sums), device)
    return round(len(sums) * source.nbytes / ms / 1e6, 1)


def _best_ms(call: partial, device: torch.device) -> float:
    call()
    return min(block_ms(call, 3, device) for _ in range(8))
