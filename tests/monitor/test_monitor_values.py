"""The values of one observation, against loops over samples, positions and tasks in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BACKEND_DTYPES, BACKENDS, DEVICE
from literal_monitor import assert_equal, literal, losses_with, observe
from torch import Tensor
from torch.nn import functional as F

from repmtl_kernels import Levels, SaliencyMonitor, tsr_loss
from repmtl_kernels._monitor import statistics

# Of values, whose float64 judge has the same saliencies; 16 bits round products of matrices.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 3e-4,
    torch.float16: 3e-4,
}
TASKS, BATCH = 3, 4
PRESENT = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool, device=DEVICE)


def random(
    channels: int,
    *spatial: int,
    dtype: torch.dtype = torch.float64,
    tasks: int = TASKS,
    batch: int = BATCH,
    seed: int = 0,
) -> list[Tensor]:
    """Return saliencies whose means are not zero and whose tasks are alike to some degree."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, batch, channels, *spatial)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values += torch.randn(shape[:3] + (1,) * len(spatial), generator=generator)
    values += torch.randn(shape[1:], generator=generator)
    values *= torch.arange(1.0, tasks + 1).view(-1, *[1] * (len(shape) - 1))
    return list(values.to(DEVICE, dtype))


def random_mask(*spatial: int, seed: int = 1) -> Tensor:
    mask = torch.rand(BATCH, *spatial, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    return mask.to(DEVICE)


SHAPES = [(6,), (5, 7), (9, 2, 3), (3, 5, 4), (4, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_values(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    saliencies = random(*shape, dtype=dtype)
    summary = observe(SaliencyMonitor(backend=backend), [saliencies])
    assert_equal(summary, literal([saliencies]), TOLERANCE[dtype])
    assert (summary.cosine.diagonal() - 1).abs().max() < 1e-12
    assert torch.equal(summary.cosine, summary.cosine.T)
    assert list(summary.maps) == ([""] if shape[1:] else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_of_tsr_sum_to_tsr(backend: str) -> None:
    saliencies, mask = random(5, 3, 4, dtype=torch.float32), random_mask(3, 4)
    for positions in (None, mask):
        monitor = SaliencyMonitor(backend=backend)
        summary = observe(monitor, [saliencies], positions=positions)
        exact = tsr_loss([s.double() for s in saliencies], positions=positions).item()
        assert summary.tsr.sum().item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (9, 2, 3), (3, 5, 4)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_masks(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Padding is not seen, whatever it holds, NaN too. A position that no sample has is NaN."""
    saliencies, mask = random(*shape, dtype=dtype), random_mask(*shape[1:])
    mask.flatten(1)[:, 2] = False
    for s in saliencies:
        s.masked_fill_(~mask.unsqueeze(1), math.nan)
    summary = observe(SaliencyMonitor(backend=backend), [saliencies], positions=mask)
    clean = [s.where(mask.unsqueeze(1), 0) for s in saliencies]
    assert_equal(summary, literal([clean], masks=[mask]), TOLERANCE[dtype])
    assert summary.maps[""].isnan().any() and summary.cosine.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_present_absent_and_zero(backend: str) -> None:
    """Samples without a label, a task without a loss, and a saliency of zero."""
    dtype = torch.float32
    saliencies = random(5, 3, 4, dtype=dtype)
    saliencies[0][3] = 0
    saliencies[1][1, :, 1] = 0
    summary = observe(SaliencyMonitor(backend=backend), [saliencies], present=PRESENT)
    assert_equal(summary, literal([saliencies], PRESENT), TOLERANCE[dtype])
    without = [saliencies[0], None, saliencies[2]]
    for present in (None, PRESENT):
        summary = observe(SaliencyMonitor(backend=backend), [without], present=present)
        assert_equal(summary, literal([without], present), TOLERANCE[dtype])
        assert summary.cosine[1].isnan().all() and summary.tsr[1].isnan()
        assert summary.norm_share[1].isnan() and summary.maps[""][1].isnan().all()
        assert summary.cosine[0, 2].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels(backend: str) -> None:
    """Levels of several sizes, one of them of two tasks alone, one of an absent task alone."""
    dtype = torch.float32
    fine, coarse = random(5, 4, 6, dtype=dtype), random(7, 2, 3, dtype=dtype, seed=1)
    masks = [random_mask(4, 6), random_mask(2, 3)]
    coarse[1] = None
    summary = observe(
        SaliencyMonitor(backend=backend), [fine, coarse], present=PRESENT, positions=masks
    )
    for level, mask in zip((fine, coarse), masks, strict=True):
        level[:] = [None if s is None else s.where(mask.unsqueeze(1), 0) for s in level]
    assert_equal(summary, literal([fine, coarse], PRESENT, masks), TOLERANCE[dtype])
    assert list(summary.maps) == ["0", "1"]
    z = [torch.zeros(4, 5, 2, device=DEVICE, requires_grad=True) for _ in range(2)]
    monitor = SaliencyMonitor(backend=backend)
    saliencies = random(5, 2, dtype=dtype)
    losses = [*losses_with([saliencies[:2]], z[:1]), None]
    monitor(losses, Levels({"p3": z[0], "p4": z[1]}))
    summary = monitor.summary()
    assert_equal_but_maps(summary, literal([[*saliencies[:2], None]]))
    assert list(summary.maps) == ["p3", "p4"] and summary.maps["p4"].isnan().all()


def assert_equal_but_maps(summary, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if not name.startswith("maps"):
            torch.testing.assert_close(
                getattr(summary, name), value, rtol=2e-6, atol=2e-6, equal_nan=True
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_their_own(backend: str) -> None:
    """Multi-input: each task has its representation, and dict keys name the tasks."""
    saliencies = random(5, 3, 4, dtype=torch.float32)
    zs = {name: torch.zeros_like(saliencies[0]).requires_grad_() for name in "abc"}
    losses = {k: (s * z).sum() for (k, z), s in zip(zs.items(), saliencies, strict=True)}
    monitor = SaliencyMonitor(backend=backend)
    monitor(losses, zs)
    assert_equal(monitor.summary(), literal([saliencies]), TOLERANCE[torch.float32])
    assert monitor.summary().tasks == ("a", "b", "c")


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens(backend: str) -> None:
    saliencies, mask = random(6, 9, dtype=torch.float32), random_mask(9)
    monitor = SaliencyMonitor(channel_dim=-1, backend=backend)
    summary = observe(monitor, [saliencies], channel_dim=-1, positions=mask)
    clean = [s.where(mask.unsqueeze(1), 0) for s in saliencies]
    assert_equal(summary, literal([clean], masks=[mask]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_scale_counts(backend: str, scale: float) -> None:
    """Tasks of any scale, and samples of another one."""
    saliencies = random(5, 3, 4, dtype=torch.float32)
    saliencies[0][1] *= 1e-4
    scaled = [s * scale for s in saliencies]
    summary = observe(SaliencyMonitor(backend=backend), [scaled])
    assert_equal(summary, literal([scaled]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows_and_does_not_stay(backend: str) -> None:
    """An overflow is NaN in the history, for its own task, and no part of the means."""
    good, bad = random(5, 3, 4, dtype=torch.float32), random(5, 3, 4, dtype=torch.float32)
    for broken in (math.nan, math.inf):
        bad[1][2, 3, 1, 1] = broken
        monitor = SaliencyMonitor(every=1, backend=backend)
        observe(monitor, [good])
        summary = observe(monitor, [bad])
        assert_equal(summary, literal([good]), TOLERANCE[torch.float32])
        history = summary.history
        for pair in ("cosine", "conflicting_samples", "conflicting_positions"):
            last = getattr(history, pair)[1]
            assert last[1].isnan().all() and last[:, 1].isnan().all()
            assert last[0, 2].isfinite() and last[0, 0].isfinite()
        assert history.norm_share[1].isnan().all() and history.csa[1, 1].isnan()
        assert history.tsr[1].isnan().all()
        assert history.cosine[0].isfinite().all()


def test_a_bad_sample_that_does_not_count_is_not_seen() -> None:
    saliencies = random(5, 3, 4)
    saliencies[2][0] = math.nan  # without a label
    present = PRESENT.clone()
    summary = observe(SaliencyMonitor(), [saliencies], present=present)
    assert summary.cosine.isfinite().all() and summary.conflicting_positions.isfinite().all()
    assert summary.norm_share.isfinite().all() and summary.maps[""].isfinite().all()


@pytest.mark.parametrize("spatial", [(70,), (33, 5), (64, 48), (33, 2, 3)], ids=str)
def test_maps_of_large_grids_are_pooled(spatial: tuple[int, ...]) -> None:
    saliencies = random(3, *spatial, tasks=2, batch=2)
    summary = observe(SaliencyMonitor(), [saliencies])
    assert summary.maps[""].shape == (2, *(min(size, 32) for size in spatial))
    assert_equal(summary, literal([saliencies]))
    torch.testing.assert_close(summary.maps[""].flatten(1).mean(1), torch.ones(2).double())


def test_maps_of_another_size_have_the_first_grid() -> None:
    monitor = SaliencyMonitor(every=1, decay=0.0)
    first, second = random(3, 6, 4, seed=0), random(3, 9, 8, seed=1)
    observe(monitor, [first])
    summary = observe(monitor, [second])
    norms = torch.stack([s.norm(dim=1).mean(0) for s in second]).cpu()
    pooled = F.adaptive_avg_pool2d(norms, (6, 4))
    expected = pooled / pooled.mean((1, 2), keepdim=True)
    torch.testing.assert_close(summary.maps[""], expected)


def test_blocks_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a few samples at a time are those of all."""
    saliencies, mask = random(5, 3, 4), random_mask(3, 4)
    expected = observe(SaliencyMonitor(), [saliencies], present=PRESENT, positions=mask)
    monkeypatch.setattr(statistics, "PRODUCTS_BLOCK", 3 * TASKS * 5 * 12)
    actual = observe(SaliencyMonitor(), [saliencies], present=PRESENT, positions=mask)
    for name in ("conflicting_positions", "maps"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=0, equal_nan=True
        )


def test_inputs_are_not_written() -> None:
    saliencies = random(5, 3, 4)
    copies = [s.clone() for s in saliencies]
    mask, present = random_mask(3, 4), PRESENT.clone()
    observe(SaliencyMonitor(), [saliencies], present=present, positions=mask)
    assert all(torch.equal(s, c) for s, c in zip(saliencies, copies, strict=True))
    assert torch.equal(mask, random_mask(3, 4)) and torch.equal(present, PRESENT)
