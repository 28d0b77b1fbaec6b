"""A monitor in a criterion: the same training, and the values of the saliencies that are there."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICE
from literal_monitor import FIELDS, assert_equal, literal
from torch import Tensor, nn

from repmtl_kernels import Levels, RepMTL, SaliencyMonitor, task_saliencies

TASKS = 3


class Model(nn.Module):
    """An encoder of two levels and smooth heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(2, 4, 3, padding=1)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Conv2d(3, 1, 1)) for _ in range(TASKS)
        )
        self.double().to(DEVICE)

    def forward(self, seed: int, levels: bool = False) -> tuple[Tensor | Levels, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 2, 4, 6, generator=generator, dtype=torch.float64).to(DEVICE)
        fine = self.encoder(x).tanh()
        z = Levels(fine, fine[..., ::2, ::2] * 1) if levels else fine
        losses = []
        for t, head in enumerate(self.heads):
            of_levels = [(head(y) - t).square().mean() for y in (z if levels else [z])]
            losses.append(sum(of_levels[1:], of_levels[0]))
        return z, losses


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lambda_tsr": 0.5},
        {"lambda_tsr": 0.7, "lambda_csa": 0.0, "every": 2},
        {"lambda_tsr": 0.0, "lambda_csa": 0.0},
        {"start": 2, "log_losses": True, "clip": 0.9, "task_weights": [1, 2, 0.5]},
    ],
    ids=str,
)
def test_totals_and_gradients_are_the_same_bits(options: dict, levels: bool) -> None:
    def train(criterion: RepMTL) -> list[Tensor]:
        model, results = Model(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(5):
            z, losses = model(seed, levels)
            total = criterion(losses, z)
            total.backward()
            results += [total.detach().clone(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        return results

    monitor = SaliencyMonitor(every=1)
    expected, actual = train(RepMTL(**options)), train(RepMTL(**options, monitor=monitor))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert monitor.summary().observations == 5


@pytest.mark.parametrize("log_losses", [False, True])
def test_values_with_and_without_the_regulariser(log_losses: bool) -> None:
    """They are those of the unweighted saliencies, of the logarithms with ``log_losses``."""
    model = Model()
    monitor = SaliencyMonitor(every=1, decay=0.0)
    criterion = RepMTL(every=2, monitor=monitor, log_losses=log_losses, task_weights=[1, 5, 0])
    for seed in range(4):
        z, losses = model(seed)
        saliencies = task_saliencies([loss.log() for loss in losses] if log_losses else losses, z)
        criterion(losses, z)
        assert criterion.last.applied is (seed % 2 == 0)
        assert_equal(monitor.summary(), literal([[s.detach() for s in saliencies]]), 1e-10)


def test_ratio_is_the_last_measured_one() -> None:
    model, monitor = Model(), SaliencyMonitor(every=1, decay=0.5)
    criterion = RepMTL(start=1, every=2, monitor=monitor)
    expected = []
    for seed in range(5):
        z, losses = model(seed)
        criterion(losses, z)
        last = criterion.last.ratio
        expected.append(expected[-1] if last is None and expected else last)
    ratios = [math.nan if r is None else r.item() for r in expected]
    history = monitor.summary().history.ratio
    torch.testing.assert_close(history, torch.tensor(ratios).double(), equal_nan=True)
    weights = torch.tensor([0.5**3, 0.5**2, 0.5, 1.0]).double()
    assert monitor.summary().ratio == pytest.approx(
        ((weights * history[1:]).sum() / weights.sum()).item(), rel=1e-12
    )
    assert math.isnan(history[0])


@pytest.mark.parametrize("start", [0, 5])
def test_scaled_float16(start: int) -> None:
    """Saliencies that float16 does not hold are observed as the scaler scales them."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 4, 5, 6, generator=generator).to(DEVICE) + 1
    small = exact.half()
    z = torch.zeros(4, 5, 6, dtype=torch.float16, device=DEVICE, requires_grad=True)
    losses = [((s * z) * 2.0**-26).sum() + 1 for s in small]
    assert not task_saliencies(losses, z)[0].any(), "or no scale is needed"
    monitor = SaliencyMonitor(every=1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**15)
    criterion = RepMTL(0.5, 0.5, start=start, monitor=monitor, scaler=scaler)
    criterion(losses, z)
    assert criterion.last.applied is (start == 0)
    assert_equal(monitor.summary(), literal([list(small)]), 2e-3)
    by_itself = SaliencyMonitor()
    by_itself([scaler.scale(loss) for loss in losses], z)
    assert_equal(by_itself.summary(), literal([list(small)]), 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 5, 6, device=DEVICE, requires_grad=True)
    losses = [(z**3).mean(), z.sin().mean()]
    inside, outside = SaliencyMonitor(), SaliencyMonitor()
    outside(losses, z)
    with torch.autocast(DEVICE, dtype):
        inside(losses, z)
    for name in FIELDS:
        assert torch.equal(getattr(inside.summary(), name), getattr(outside.summary(), name))


def test_what_the_criterion_has_counts() -> None:
    """Its channels, masks and batches; without CSA a batch of one sample will do."""
    monitor = SaliencyMonitor(every=1)
    criterion = RepMTL(0.5, 0.0, channel_dim=-1, monitor=monitor)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 7, 5, generator=generator).to(DEVICE).requires_grad_()
    losses = [(z**3).mean(), z.sin().mean()]
    mask = (torch.arange(7) < 4)[None].to(DEVICE)
    criterion(losses, z, positions=mask)
    saliencies = [s.detach().movedim(-1, 1) for s in task_saliencies(losses, z)]
    clean = [s.where(mask.unsqueeze(1), 0) for s in saliencies]
    assert_equal(monitor.summary(), literal([clean], masks=[mask]), 2e-6)
    off = RepMTL(strength=0.0, monitor=SaliencyMonitor())
    off(losses, z)
    assert off.monitor.summary().observations == 1 and not off.last.applied


def test_a_task_that_is_absent() -> None:
    model, monitor = Model(), SaliencyMonitor(every=1)
    criterion = RepMTL(0.5, 0.5, every=2, monitor=monitor)
    for seed in range(2):
        z, losses = model(seed)
        criterion([losses[0], None, losses[2]], z)
    assert monitor.summary().cosine[1].isnan().all()
    assert monitor.summary().history.cosine[:, 0, 2].isfinite().all()


@pytest.mark.parametrize("every", [1, 2])
def test_beside_torchjd(every: int) -> None:
    pytest.importorskip("torchjd")
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    from repmtl_kernels.integrations.torchjd import rep_mtl_backward

    def train(watch, criterion: RepMTL | None) -> list[Tensor]:
        model, grads = Model(), []
        for seed in range(3):
            z, losses = model(seed)
            if criterion is None:
                if watch is not None:
                    watch(losses, z)
                mtl_backward(losses, features=z)
            else:
                rep_mtl_backward(losses, features=z, criterion=criterion)
            jac_to_grad(model.encoder.parameters(), UPGrad())
            grads += [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
        return grads

    def same(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    inside, around = SaliencyMonitor(every=1), SaliencyMonitor(every=1)
    plain = train(None, RepMTL(0.5, 0.5, every=every))
    assert same(train(None, RepMTL(0.5, 0.5, every=every, monitor=inside)), plain)
    assert same(train(around, None), train(None, None))
    assert inside.summary().observations == around.summary().observations == 3


def test_no_monitor_of_another_type() -> None:
    for wrong in (3, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="monitor: expected a SaliencyMonitor or None, got"):
            RepMTL(monitor=wrong)
    criterion = RepMTL()
    criterion.monitor = "all"
    z = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(TypeError, match="monitor: expected a SaliencyMonitor or None, got str"):
        criterion([z.sum(), z.sin().sum()], z)
