"""Steps without values, on the meta device or of fake tensors, and steps that a tool traces."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from small_network import LAMBDAS, step_on_noise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from repmtl_kernels import RepMTL, rep_mtl_loss


def training_step(criterion: RepMTL, encoder: nn.Module, x: Tensor, step: int | None = None):
    z = encoder(x)
    with criterion.second_order(step):
        losses = [z.square().mean(), (z.sin() * z).mean()]
    total = criterion(losses, z, step=step)
    total.backward()
    return total


OPTIONS = (
    {},
    {"strength": 0.3, "clip": 2.0},
    {"every": 2},
    {"start": 1},
    {**LAMBDAS, "eps": 1e-6, "normalizer": "softmax"},
    {"scaler": torch.amp.GradScaler(DEVICE)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "default")
@pytest.mark.parametrize("dry", ("meta", "fake"))
@pytest.mark.parametrize("backend", ("auto", "eager", "reference"))
def test_a_dry_run_leaves_no_trace(options: dict, dry: str, backend: str) -> None:
    torch.manual_seed(0)
    encoder = nn.Conv2d(3, 6, 3).to(DEVICE)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    totals = []
    for dry_runs in (0, 1, 3):
        criterion = RepMTL(**{"every": 1, **options}, backend=backend)
        state = criterion.get_extra_state()
        for i in range(dry_runs):
            if dry == "meta":
                total = training_step(
                    criterion, nn.Conv2d(3, 6, 3, device="meta"), x.to("meta"), step=i
                )
                assert total.is_meta and criterion.last.total.is_meta
            else:
                with FakeTensorMode(allow_non_fake_inputs=False):
                    fake = nn.Conv2d(3, 6, 3, device=DEVICE)
                    total = training_step(criterion, fake, torch.randn(4, 3, 8, 8, device=DEVICE))
                assert total.shape == () and total.dtype == torch.float32
            assert torch.equal(criterion.get_extra_state(), state)
        totals.append([training_step(criterion, encoder, x).item() for _ in range(3)])
        assert criterion.get_extra_state()[0] == 3
    assert totals[0] == totals[1] == totals[2]


def test_a_dry_run_in_the_middle() -> None:
    totals = []
    for dry in (False, True):
        criterion = RepMTL(every=2, strength=0.3, clip=2.0)
        run = []
        for seed in range(4):
            run.append(step_on_noise(criterion, seed).item())
            if dry:
                training_step(criterion, nn.Conv2d(3, 6, 3, device="meta"), torch.randn(
                    4, 3, 8, 8, device="meta"
                ))  # fmt: skip
        totals.append(run)
    assert totals[0] == totals[1]


def test_counting_flops_is_an_ordinary_step() -> None:
    criterion, encoder = RepMTL(**LAMBDAS, every=2), nn.Conv2d(3, 6, 3).to(DEVICE)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        training_step(criterion, encoder, x)
    assert criterion.last.applied and counter.get_total_flops() > 0
    training_step(criterion, encoder, x)
    assert not criterion.last.applied


@pytest.mark.parametrize("backend", ("eager", "auto", "reference"))
def test_losses_of_fake_tensors(backend: str) -> None:
    with FakeTensorMode():
        s = [torch.randn(4, 3, 5, 6, device=DEVICE, requires_grad=True) for _ in range(2)]
        result = rep_mtl_loss(s, backend=backend)
        assert result.total.shape == () and result.total.dtype == torch.float32
        grads = torch.autograd.grad(result.total, s)
        assert [g.shape for g in grads] == [x.shape for x in s]


@pytest.mark.parametrize("export", (False, True), ids=("compile", "export"))
@pytest.mark.parametrize("options", ({}, {"log_losses": True, "log_offset": 0.1}), ids=str)
def test_evaluation_compiles(options: dict, export: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.criterion = nn.Linear(3, 4), RepMTL(**options)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            return self.criterion([z.square().mean(), z.sin().square().mean()], z)

    model, x = Model().eval(), torch.randn(5, 3)
    if export:
        compiled = torch.export.export(model, (x,), strict=True).module()(x)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x))
