"""The rates that floors are counted with, and the kernels that are compiled before the clock."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from cases import DEVICE
from stand_ins import CPU

from benchmarks import ceilings

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def test_rates_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setitem(ceilings.NUMBERS, "cpu", 1 << 10)
    monkeypatch.setitem(ceilings.SIDE, "cpu", 8)
    file = tmp_path / "folder" / "rates.json"
    rates = ceilings.of(CPU, file)
    assert rates["copy_gbs"] > 0 and set(rates["matmul_tflops"]) == {"float32"}
    assert json.loads(file.read_text()) == rates
    monkeypatch.setattr(ceilings, "block_ms", lambda *_: 1 / 0)
    assert ceilings.of(CPU, file) == rates
    with pytest.raises(ZeroDivisionError):
        ceilings.of(CPU)


def test_rates_are_work_over_time(monkeypatch):
    """By hand: two times 1024 numbers, 2 * 8^3 operations, in the fastest of the blocks."""
    times = iter([2.0, 0.5, *[3.0] * 14])
    monkeypatch.setattr(ceilings, "block_ms", lambda *_: next(times))
    monkeypatch.setitem(ceilings.NUMBERS, "cpu", 1 << 20)
    monkeypatch.setitem(ceilings.SIDE, "cpu", 256)
    rates = ceilings.of(CPU)
    assert rates["copy_gbs"] == round(2 * 4 * 2**20 / 0.5e-3 / 1e9, 1)
    assert rates["matmul_tflops"] == {"float32": round(2 * 256**3 / 3e-3 / 1e12, 4)}


@needs_triton
def test_every_program_reads_all_numbers(monkeypatch):
    from benchmarks import l2

    monkeypatch.setattr(l2, "BLOCK", 64)
    source = torch.randint(-9, 9, (5 * 64,), device=DEVICE).float()
    sums = torch.empty(7, device=DEVICE)
    l2.read_by_all(source, sums)
    assert torch.equal(sums, source.sum().expand(7))
