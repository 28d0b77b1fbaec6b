"""Metrics of the field and Delta_p, against their definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.quality.tables import delta_p, delta_per_metric, interval
from benchmarks.quality.tasks import KINDS, LOWER_IS_BETTER

GENERATOR = torch.Generator().manual_seed(0)


def batches(outputs: torch.Tensor, targets: torch.Tensor) -> list:
    return list(zip(outputs.split(2), targets.split(2), strict=True))


def test_segmentation_metrics():
    """Class 4 is nowhere: it has no IoU. One pixel in four has no label."""
    outputs = torch.randn(5, 5, 4, 6, generator=GENERATOR)
    outputs[:, 4] = -100
    targets = torch.randint(0, 4, (5, 4, 6), generator=GENERATOR)
    targets[torch.rand(targets.shape, generator=GENERATOR) < 0.25] = -1
    found = KINDS["segmentation"](5).evaluate(batches(outputs, targets.to(torch.int8)))
    pairs = list(zip(outputs.argmax(1).flatten().tolist(), targets.flatten().tolist(), strict=True))
    pairs = [(y, t) for y, t in pairs if t != -1]
    ious = []
    for c in range(4):
        both = sum(y == c and t == c for y, t in pairs)
        ious.append(both / sum(y == c or t == c for y, t in pairs))
    assert found["miou"] == pytest.approx(100 * sum(ious) / 4, rel=1e-12)
    right = sum(y == t for y, t in pairs)
    assert found["pixel_accuracy"] == pytest.approx(100 * right / len(pairs), rel=1e-12)


@pytest.mark.parametrize("kind", ["depth", "disparity"])
def test_depth_metrics(kind):
    outputs = torch.rand(5, 1, 4, 6, generator=GENERATOR, dtype=torch.float64)
    targets = 0.5 + torch.rand(5, 1, 4, 6, generator=GENERATOR, dtype=torch.float64)
    targets[torch.rand(targets.shape, generator=GENERATOR) < 0.25] = 0
    found = KINDS[kind](0).evaluate(batches(outputs, targets))
    y, t = outputs.numpy().ravel(), targets.numpy().ravel()
    y, t = y[t > 0], t[t > 0]
    expected = {"absolute_error": np.abs(y - t).mean()}
    if kind == "depth":
        expected["relative_error"] = 100 * (np.abs(y - t) / t).mean()
    else:
        expected["rms_error"] = math.sqrt(((y - t) ** 2).mean())
    assert found == pytest.approx(expected, rel=1e-12)


def test_normals_metrics():
    targets = torch.nn.functional.normalize(
        torch.randn(5, 3, 4, 6, generator=GENERATOR, dtype=torch.float64), dim=1
    )
    outputs = 7 * (targets + 0.3 * torch.randn(targets.shape, generator=GENERATOR).double())
    targets[:, :, 0] = 0
    found = KINDS["normals"](0).evaluate(batches(outputs, targets))
    angles = []
    for b in range(5):
        for i in range(1, 4):
            for j in range(6):
                y, t = outputs[b, :, i, j].tolist(), targets[b, :, i, j].tolist()
                dot = sum(a * b for a, b in zip(y, t, strict=True))
                angles.append(math.degrees(math.acos(dot / math.hypot(*y) / math.hypot(*t))))
    assert found["mean_angle"] == pytest.approx(sum(angles) / len(angles), rel=1e-9)
    # The lower of the two in the middle.
    assert found["median_angle"] == pytest.approx(sorted(angles)[(len(angles) - 1) // 2], rel=1e-9)
    for degrees in (11.25, 22.5, 30):
        share = 100 * sum(a < degrees for a in angles) / len(angles)
        assert 0 < share < 100
        assert found[f"within_{degrees:g}"] == pytest.approx(share, rel=1e-12)


def test_accuracy_leaves_out_what_has_no_label():
    outputs = torch.eye(4)
    found = KINDS["classification"](4).evaluate([(outputs, torch.tensor([0, 1, 3, -1]))])
    assert found == {"accuracy": pytest.approx(200 / 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_leave_out_what_has_no_label(kind):
    """The loss is the same whatever the output says there, and its gradient there is 0."""
    task = KINDS[kind](3)
    one = (2, 6, 3) if kind == "tokens" else (6, task.channels)
    shape = (2, task.channels, 3, 4) if task.dense else one
    outputs = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    if kind in ("classification", "binary"):
        targets = torch.tensor([0, 1, -1, task.channels - 1, -1, 0])
        missing = (targets == -1).unsqueeze(1).expand(shape)
    elif kind == "tokens":
        targets = torch.tensor([[0, 1, -1, 2, -1, 0], [-1, -1, 2, 2, 1, 0]])
        missing = (targets == -1).unsqueeze(2).expand(shape)
    elif kind == "segmentation":
        targets = torch.randint(0, 3, (2, 3, 4), generator=GENERATOR)
        targets[:, 1] = -1
        missing = (targets == -1).unsqueeze(1).expand(shape)
    else:
        targets = torch.nn.functional.normalize(torch.rand(shape, generator=GENERATOR).double())
        targets[:, :, 1] = 0
        missing = (targets == 0).expand(shape)
    losses = []
    for noise in (0, 1):
        y = (outputs + noise * missing).requires_grad_()
        losses.append(task.loss(y, targets))
        (gradient,) = torch.autograd.grad(losses[-1], y)
        assert (gradient[missing] == 0).all() and gradient.abs().sum() > 0
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["depth", "disparity", "normals"])
def test_dense_losses_are_means_over_labelled_pixels(kind):
    task = KINDS[kind](0)
    shape = (2, task.channels, 3, 4)
    outputs = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    targets = torch.nn.functional.normalize(torch.rand(shape, generator=GENERATOR).double())
    targets[:, :, 1] = 0
    values = []
    for b in range(2):
        for i in (0, 2):
            for j in range(4):
                y, t = outputs[b, :, i, j], targets[b, :, i, j]
                normals = kind == "normals"
                values.append(1 - y @ t / y.norm() if normals else (y - t).abs().squeeze())
    expected = sum(values) / len(values)
    torch.testing.assert_close(task.loss(outputs, targets), expected, rtol=1e-12, atol=0)


def test_delta_p_by_hand():
    """MIoU 50 to 55: +10 %. Errors 2 to 1: +50 %, 4 to 5: -25 %."""
    base = {"seg": {"miou": 50.0}, "depth": {"absolute_error": 2.0, "relative_error": 4.0}}
    new = {"seg": {"miou": 55.0}, "depth": {"absolute_error": 1.0, "relative_error": 5.0}}
    assert delta_per_metric(new, base) == {
        "seg": {"miou": pytest.approx(10)},
        "depth": {"absolute_error": pytest.approx(50), "relative_error": pytest.approx(-25)},
    }
    expected = {"seg": 10, "depth": 12.5, "mean": 11.25}
    assert delta_p(new, base) == pytest.approx(expected)


def test_delta_p_of_the_paper_on_nyuv2():
    """Rep-MTL and single-task figures as printed give the printed +1.70."""
    names = ("mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30")
    base = {
        "segmentation": {"miou": 53.50, "pixel_accuracy": 75.39},
        "depth": {"absolute_error": 0.3926, "relative_error": 0.1605},
        "normals": dict(zip(names, (21.99, 15.16, 39.04, 65.00, 75.16), strict=True)),
    }
    new = {
        "segmentation": {"miou": 54.59, "pixel_accuracy": 76.04},
        "depth": {"absolute_error": 0.3750, "relative_error": 0.1542},
        "normals": dict(zip(names, (21.91, 15.28, 38.37, 64.72, 75.05), strict=True)),
    }
    assert delta_p(new, base)["mean"] == pytest.approx(1.70, abs=0.005)


def test_every_metric_has_a_direction():
    better_lower = {m for m, low in LOWER_IS_BETTER.items() if low}
    assert better_lower == {
        "absolute_error", "relative_error", "rms_error", "mean_angle", "median_angle",
    }  # fmt: skip


def test_interval_is_students():
    """Five values have mean 3 and deviation sqrt(2.5): 2.776445 sqrt(2.5 / 5)."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.7764451052 * math.sqrt(0.5), rel=1e-9)
    assert math.isnan(interval([1.0]).half) and str(interval([1.0])) == "+1.00"
