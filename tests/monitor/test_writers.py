"""Summaries in TensorBoard and Weights & Biases, written and read back by the real libraries."""

from __future__ import annotations

import math

import pytest
import torch
from made_summaries import TASKS, made

from repmtl_kernels._monitor import writers

pytest.importorskip("matplotlib")

# Warnings of protobuf and of Python about these libraries are none of ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def expected(summary) -> dict[str, float]:
    values = {"saliency/ratio": summary.ratio}
    for t, first in enumerate(TASKS):
        for field in ("norm_share", "tsr", "csa"):
            values[f"saliency/{field}/{first}"] = getattr(summary, field)[t].item()
        for u in range(t + 1, len(TASKS)):
            for field in ("cosine", "conflicting_samples", "conflicting_positions"):
                tag = f"saliency/{field}/{first} - {TASKS[u]}"
                values[tag] = getattr(summary, field)[t, u].item()
    return values


def test_scalars_are_the_summarys():
    summary = made(unseen=(1, 2))
    found, wanted = dict(writers.scalars(summary)), expected(summary)
    assert found.keys() == wanted.keys()
    for tag, value in wanted.items():
        assert found[tag] == value or (math.isnan(value) and math.isnan(found[tag])), tag
    assert "saliency/ratio" not in dict(writers.scalars(made(ratio=math.nan)))


@pytest.mark.parametrize("step, written", ((None, 2950), (7, 7)))
def test_tensorboard(step, written, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = made()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writers.to_tensorboard(summary, writer, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    wanted = expected(summary)
    assert set(events.Tags()["scalars"]) == set(wanted)
    for tag, value in wanted.items():
        (event,) = events.Scalars(tag)
        assert event.step == written and event.value == pytest.approx(value, rel=1e-6)
    assert set(events.Tags()["images"]) == {"saliency/affinity", "saliency/history"}
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert image.step == written and image.width > 200 and image.height > 200


@pytest.mark.parametrize("step", (None, 7))
def test_wandb(step, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(mode="offline", root_dir=str(tmp_path), disable_git=True)
    summary = made()
    with wandb.init(project="test", dir=str(tmp_path), settings=settings) as run:
        writers.to_wandb(summary, run, step)
        run.log({"later": 1})  # a step that was given is open until the next one
        logged = dict(run.summary)
    for tag, value in expected(summary).items():
        assert logged[tag] == pytest.approx(value), tag
    for tag in ("saliency/affinity", "saliency/history"):
        assert logged[tag]["_type"] == "image-file" and logged[tag]["width"] > 200
    assert step is None or logged["_step"] == step
    assert len(list(tmp_path.rglob("*.png"))) == 2


@pytest.mark.parametrize("write", (writers.to_tensorboard, writers.to_wandb))
def test_arguments_are_checked(write):
    class Nothing:
        def log(self, *_, **__):
            raise AssertionError

        add_scalar = add_figure = log

    with pytest.raises(TypeError, match="summary: expected a SaliencySummary, got Tensor"):
        write(torch.ones(2), Nothing())
    with pytest.raises(ValueError, match="summary: expected at least one observation, got none"):
        write(made(count=0), Nothing())
    with pytest.raises(TypeError, match="(writer|run): expected a .*, got object"):
        write(made(), object())
    with pytest.raises(ValueError, match="step: expected an int of at least 0"):
        write(made(), Nothing(), -1)
