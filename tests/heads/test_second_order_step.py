"""A Rep-MTL step under second_order(): the gradients of plain PyTorch."""

import copy
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from cases import DEVICE
from double_backward import F64, HEADS, assert_same, images, leaf, network
from torch import nn
from torch.nn import functional as F

from benchmarks.part import Run
from benchmarks.parts import second_order as benchmark
from benchmarks.parts.second_order import Convolutions
from repmtl_kernels import RepMTL
from repmtl_kernels._heads.second_order import convert_second_order, second_order


def rep_mtl_step(model, x, targets, context=None):
    encoder, heads = model
    torch.manual_seed(1)
    z = encoder(x)
    with context or nullcontext():
        losses = [F.mse_loss(head(z), y) for head, y in zip(heads, targets, strict=True)]
    total = RepMTL(0.9, 0.7)(losses, z)
    with Convolutions() as counter:
        total.backward()
    return total.detach(), [p.grad for p in model.parameters()], counter


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["context", "converted"])
@pytest.mark.parametrize("name", HEADS)
def test_whole_step(name, way, training):
    plain = network(HEADS[name]).train(training)
    fast = copy.deepcopy(plain)
    x, targets = images()
    expected = rep_mtl_step(plain, x, targets)
    if way == "converted":
        actual = rep_mtl_step(convert_second_order(fast), x, targets)
    else:
        actual = rep_mtl_step(fast, x, targets, second_order())
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, fast.buffers(), plain.buffers()))
    for a, b in zip(actual[1], expected[1], strict=True):
        # In training an exact 0 is left of biases that batch norm takes out: rounding errors.
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_step_in_lower_precision(dtype):
    """The error is that of plain PyTorch in that dtype; on CUDA this runs the Triton form."""
    exact = network(HEADS["ASPP"])
    x, targets = images()
    plain, fast = (copy.deepcopy(exact).float() for _ in range(2))
    judge = rep_mtl_step(exact, x, targets)[1]

    def error(model, context):
        enabled = dtype == torch.bfloat16
        with torch.autocast(DEVICE, dtype if enabled else None, enabled=enabled):
            actual = rep_mtl_step(model, x.float(), [y.float() for y in targets], context)[1]
        return torch.stack([(a - b).norm() for a, b in zip(actual, judge, strict=True)]).norm()

    size = torch.stack([b.norm() for b in judge]).norm()
    bound = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype] * size
    assert error(fast, second_order()) < max(bound, 1.5 * error(plain, nullcontext()))


def test_backward_under_autocast():
    """Autocast chooses the precision of the forward; the derivatives keep it."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    layers.to(DEVICE)
    x = leaf(2, 3, 6, 5, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with second_order():
            loss = layers(x).square().mean()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
        probe = first.square().sum()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            results.append((first, *torch.autograd.grad(probe, tuple(layers.parameters()))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_last(layout):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    layers.to(DEVICE, F64, memory_format=layout)
    x = leaf(2, 3, 6, 5).detach().contiguous(memory_format=layout).requires_grad_()
    results = []
    for context in (nullcontext(), second_order()):
        with context:
            y = layers(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (x, *layers.parameters()))
        results.append((y, first, *second))
        assert all(t.is_contiguous(memory_format=layout) for t in (y, first, second[0]))
    assert_same(*results)


def test_encoder_under_torchjd():
    pytest.importorskip("torchjd")
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    plain = network(HEADS["convolutional"])
    plain[0].append(nn.ConvTranspose2d(6, 6, 3, padding=1))
    plain[0].extend([nn.BatchNorm2d(6), nn.ReLU()])
    plain.to(DEVICE, F64)
    x, targets = images()
    results = []
    for model in (plain, convert_second_order(copy.deepcopy(plain))):
        encoder, heads = model
        z = encoder(x)
        losses = [F.mse_loss(head(z), y) for head, y in zip(heads, targets, strict=True)]
        mtl_backward(losses, features=z)
        jac_to_grad(encoder.parameters(), UPGrad())
        results.append([p.grad for p in model.parameters()])
    assert_same(results[1], results[0], 1e-9)


def test_benchmark(monkeypatch, capsys):
    tiny = replace(benchmark.NETWORK, height=32, width=32, batch=2, base=4, on_cpu={})
    monkeypatch.setattr(benchmark, "NETWORK", tiny)
    monkeypatch.setattr(benchmark, "QUICK", {})
    device = torch.device("cpu")
    run = Run("second_order", device, {}, None, quick=True, deadline=time.monotonic() + 1)
    benchmark.measure(run)
    base, plain, fast = rows = run.rows
    assert [row["method"] for row in rows] == list(benchmark.TITLES) and not run.notes
    assert [row["convolutions_per_head_layer"] for row in rows] == [3, 6, 6]
    assert fast["ratio_to_plain"] == pytest.approx(
        plain["steps_per_s"] / fast["steps_per_s"], rel=1e-3
    )
    heads = base["phases"]["heads_forward"] + base["phases"]["heads_backward"]
    floor = 1e3 / base["steps_per_s"] + heads
    own = 1e3 / fast["steps_per_s"] - fast["phases"]["regularizer"]
    assert fast["ratio_to_floor"] == pytest.approx(own / floor, rel=1e-3)
    assert len(capsys.readouterr().out.splitlines()) == 3
