"""A mask of positions in blocks of samples, in memory, in the stages and in CUDA graphs."""

import math
import os
from functools import partial

import pytest
import torch
from cases import (
    BACKEND_DTYPES,
    BACKENDS,
    DEVICE,
    Case,
    Loss,
    judge,
)
from masked_cases import (
    BOTH,
    CSA,
    EVERY_BACKEND,
    TSR,
    mask_of,
    over_channels,
    with_garbage,
)

from benchmarks.memory import peak_extra_bytes
from benchmarks.rotation import Rotating, graphed, synchronisation_refused
from repmtl_kernels import (
    rep_mtl_loss,
)
from repmtl_kernels._losses import backward
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.eager import operand, statistics


@pytest.mark.parametrize("block", [1, 10**9], ids=["one sample at a time", "at once"])
@pytest.mark.parametrize(
    "case", [Case(3, 5, 8, (5, 6)), Case(2, 5, 40, (4, 5), "mixed"), Case(2, 3, 70, (9,))], ids=str
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_recompute(backend: str, dtype: torch.dtype, case: Case, block: int, monkeypatch):
    monkeypatch.setattr(backward, "RECOMPUTE_BLOCK", block)
    loss = Loss("recompute", partial(BOTH.public, memory="recompute"), BOTH.literal)
    judge(loss, case, dtype, backend, positions=mask_of(case, "empty"))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "case",
    [Case(3, 5, 8, (5, 6), "channels_last"), Case(2, 5, 40, (4, 5)), Case(2, 5, 30, (7, 11))],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_a_few_samples_at_a_time(backend: str, dtype, case: Case, samples: int, monkeypatch):
    """As many as a block holds are masked together; which ones they are changes nothing."""
    elements = case.channels * math.prod(case.spatial)
    masked, seen = operand.masked, []
    monkeypatch.setattr(operand, "MASKED_BLOCK", samples * elements + 1)
    for module in (operand, statistics):
        monkeypatch.setattr(
            module, "masked", lambda s, mask: (seen.append(len(s)), masked(s, mask))[1]
        )
    judge(BOTH, case, dtype, backend, positions=mask_of(case, "empty"))
    assert set(seen) <= {samples, 5 % samples or samples}
    assert seen or backend == "native"


@pytest.mark.skipif(
    DEVICE != "cpu" or "REPMTL_EMULATED_CUDA" in os.environ,
    reason="counts what PyTorch allocates on the CPU, without the workspaces of operators for CUDA",
)
@pytest.mark.parametrize("loss", [TSR, CSA, BOTH], ids=lambda loss: loss.name)
@pytest.mark.parametrize(
    "case",
    [Case(2, 8, 128, (16, 20)), Case(2, 8, 384, (15, 16)), Case(2, 8, 600, (8, 8))],
    ids=["C side", "N side", "few positions"],
)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_saliencies_are_not_copied(backend: str, case: Case, loss: Loss, monkeypatch):
    """The peak grows by a block of two samples and its temporaries, not by one task's eight."""
    elements = case.channels * math.prod(case.spatial)
    monkeypatch.setattr(operand, "MASKED_BLOCK", 2 * elements)
    tensors, mask = case.make(torch.float32), mask_of(case, "random")

    def call(positions):
        value = loss.public(tensors, positions=positions, backend=backend)
        torch.autograd.grad(value, tensors)

    peaks = []
    for positions in (None, mask):
        call(positions)
        peaks.append(peak_extra_bytes(partial(call, positions), torch.device("cpu")))
    assert peaks[1] - peaks[0] < 5 * 4 * elements


# --- the stages ---


@pytest.mark.parametrize(
    "case",
    [Case(2, 3, 8, (5, 6)), Case(2, 3, 40, (4, 5)), Case(3, 3, 40, (4, 5), "channels_last")],
    ids=str,
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_stages(backend: str, dtype: torch.dtype, case: Case):
    """The stages keep the contract of a mask, on saliencies that hold garbage elsewhere."""
    stages, eager = choice.load(backend), choice.load("eager")
    mask = mask_of(case, "empty")
    flat = mask.flatten(1)
    views = [t.detach() for t in with_garbage(case, dtype, mask)]
    zeros = [v.masked_fill(~over_channels(case, mask), 0).double() for v in views]
    actual = stages.statistics(views, positions=True, channels=True, mask=flat)
    exact = eager.statistics(zeros, positions=True, channels=True)
    count = flat.sum(1).clamp_min(1)[:, None]
    rounding = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual.positions.double(), exact.positions, **rounding)
    assert (actual.positions.masked_select(~flat) == 0).all()
    means = exact.channels * flat.shape[1] / count
    torch.testing.assert_close(actual.channels.double(), means, **rounding)
    scaled = actual.scale.double() * torch.stack([z.abs().amax((1, 2, 3)) for z in zeros])
    assert ((scaled[:, :-1] >= 0.5) & (scaled[:, :-1] < 2)).all()
    assert (actual.scale[:, -1] == 1).all() and (actual.channels[:, -1] == 0).all()
    for only in ("positions", "channels"):
        wanted = {"positions": False, "channels": False} | {only: True}
        alone = stages.statistics(views, mask=flat, **wanted)
        torch.testing.assert_close(getattr(alone, only), getattr(actual, only))
    unit = eager.anchors(actual.channels, eps=0.0, with_grad=False).unit
    gram = stages.gram(views, actual.scale, unit, eps=0.0, with_grad=True, mask=flat)
    assert gram.matrix.isfinite().all() and (gram.similarity[:, -1] == 0).all()
    if math.prod(case.spatial) <= case.channels:
        assert (gram.matrix.masked_select(~flat[:, None]) == 0).all()
        assert (gram.matrix.masked_select(~flat[:, :, None]) == 0).all()
        assert (gram.projection.masked_select(~flat[:, None]) == 0).all()
    without = stages.gram(views, actual.scale, unit, eps=0.0, with_grad=False, mask=flat)
    torch.testing.assert_close(without.similarity, gram.similarity, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(3, 4, 64, (7, 7)), Case(2, 2, 96, (12, 12))], ids=str)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_capture_in_a_cuda_graph(backend: str, case: Case):
    """No synchronisation, and a replay reads the mask anew."""
    tensors, mask = case.make(torch.float32), mask_of(case, "random")

    def step(saliencies):
        total = rep_mtl_loss(saliencies, positions=mask, backend=backend).total
        return total, torch.autograd.grad(total, saliencies)

    step(tensors)  # compiles
    torch.cuda.synchronize()
    if backend != "reference":
        with synchronisation_refused():
            step(tensors)
    replay = graphed(Rotating(step, [tensors]), torch.device("cuda"))
    for kind in ("prefix", "empty"):
        mask.copy_(mask_of(case, kind))
        torch.testing.assert_close(replay(), step(tensors))
