"""Pictures of task saliencies and of exponents, on a small data set made here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quality_data import dense, domains, make_run
from test_quality_studies import study_file  # noqa: F401 -- a fixture

from benchmarks.quality import config, loaders, pictures, saliency
from benchmarks.quality.tasks import Task

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def made_data(monkeypatch):
    monkeypatch.setitem(loaders.LOADERS, "dense", dense)
    monkeypatch.setitem(loaders.LOADERS, "domains", domains)


def test_maps_are_the_gradients_of_the_losses(tmp_path):
    """Written out: |dL/dZ|, the mean over channels, at its largest 1."""
    trainer = saliency.trained(make_run(), None, tmp_path)
    rows = torch.tensor([1, 4])
    found = saliency.maps(trainer, rows)
    assert not trainer.network.training
    test, network = trainer.dataset.splits["test"], trainer.network
    z = network.encoder(trainer.dataset.prepared(test.inputs[rows]))
    assert found.size == tuple(z.shape[2:]) == (4, 4)
    for task in trainer.dataset.tasks:
        output = network.head(task.name, z, (8, 8))
        loss = task.kind.loss(output, test.targets[task.name][rows])
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        mean = gradient.abs().mean(1, keepdim=True)
        up = torch.nn.functional.interpolate(mean, (8, 8), mode="bilinear")[:, 0]
        for mine, theirs in zip(found.maps[task.name], up, strict=True):
            torch.testing.assert_close(mine, theirs / theirs.max())


def test_images_have_a_label_in_every_task(tmp_path):
    trainer = saliency.Trainer(make_run(), dense(), None)
    trainer.dataset.splits["test"].targets["depth"][[0, 3]] = 0
    assert saliency.labelled(trainer, 2).tolist() == [1, 5]
    with pytest.raises(ValueError, match="images: expected at most 4, got 5"):
        saliency.labelled(trainer, 5)
    with pytest.raises(ValueError, match="dataset: expected one whose tasks share their images"):
        saliency.labelled(saliency.Trainer(make_run("domains"), domains(), None), 1)


def test_images_that_have_one_class_each():
    """The tasks are classifications of the whole image, as on MultiMNIST."""
    data = dense()
    for split in data.splits.values():
        rows = torch.arange(len(split.inputs))
        split.targets.update(a=rows % 2, b=(rows - 1).clamp(max=2))
    tasks = tuple(Task.of(name, "classification", 3) for name in "ab")
    trainer = saliency.Trainer(make_run(), replace(data, tasks=tasks), None)
    rows = saliency.labelled(trainer, 3)
    assert rows.tolist() == [1, 3, 5], "task b has no label of the first image"
    assert [m.shape for m in saliency.maps(trainer, rows).maps.values()] == [(3, 8, 8)] * 2


def test_what_a_study_does_not_have_is_refused(study_file):  # noqa: F811
    study = config.study(study_file)
    name = "small [label_fraction=1]"
    (run,) = saliency.chosen_runs(study, name, ["equal"], 2)
    assert (run.method, run.seed, run.task) == ("equal", 2, None)
    with pytest.raises(ValueError, match="dataset: expected one of small .*; got 'x'"):
        saliency.chosen_runs(study, "x", ["equal"], 2)
    with pytest.raises(ValueError, match="methods: expected one of equal, .*; got 'alone'"):
        saliency.chosen_runs(study, name, ["alone"], 2)


def test_the_command_draws_a_picture(study_file, tmp_path):  # noqa: F811
    given = [str(study_file), "--dataset", "small [label_fraction=1]", "--seed", "1"]
    given += ["--methods", "equal", "Rep-MTL [strength=0.1]", "--images", "3"]
    given += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    saliency.main(given)
    (picture,) = (tmp_path / "out").iterdir()
    assert picture.name == "quality_study_saliency_dense.png"
    assert 1000 < picture.stat().st_size < 400_000
    before = picture.read_bytes()
    saliency.main(given)
    assert picture.read_bytes() == before


def test_the_figure_of_exponents():
    """A panel for each data set; a part without an exponent is not in it."""
    rows = [
        {
            "dataset": dataset, "method": method, "seed": seed,
            "spectra": {"all": {"encoder": 3.0 + seed, "a": 2.0, "b": None}},
        }
        for dataset in ("one", "two") for method in ("equal", "Rep-MTL") for seed in (0, 1)
    ]  # fmt: skip
    figure = pictures.exponents_figure(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    for axes in figure.axes:
        _, names = axes.get_legend_handles_labels()
        assert names == ["well trained", "encoder", "a"]
        encoder, a = axes.containers
        assert encoder[0].get_xdata().tolist() == [3.5, 3.5] and a[0].get_xdata().tolist() == [2, 2]
    assert pictures.exponents_figure([{"dataset": "one", "method": "equal"}]) is None
