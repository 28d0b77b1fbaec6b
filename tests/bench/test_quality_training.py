"""Studies, runs and what comes of them, on a small data set made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import results
from benchmarks.quality import config, jobs, loaders, pictures, pretraining, tables, training
from benchmarks.quality.__main__ import main
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.delta import delta_p, interval
from benchmarks.quality.networks import build
from benchmarks.quality.tasks import Task

NETWORK = {"widths": [4, 6], "strides": [2, 1], "dilations": [1, 1], "head_width": 4}
TRAINING = {"steps": 6, "batch": 4, "log_every": 2}
REP_MTL = {"strength": 0.1, "start": 1, "ramp": 2}
METHODS = {"equal": {}, "rep_mtl": REP_MTL, "nash_mtl": {}, "fairgrad": {}}


def dense(folder=None, *, seed: int = 0) -> Dataset:
    """Two tasks of 8 x 8 images; of two training images in ten, one task has no label."""
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for split, count in (("train", 10), ("validation", 4), ("test", 6)):
        images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        grey = images.float().mean(1) / 255
        targets = {"segmentation": (grey > 0.5).to(torch.int8), "depth": grey.unsqueeze(1) + 0.1}
        splits[split] = Split(images, targets)
    splits["train"].targets["depth"][:2] = 0
    return Dataset((Task.of("segmentation", "segmentation", 2), Task.of("depth", "depth")), splits)


def domains(folder=None) -> Dataset:
    """Two domains of features, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, count in (("train", 12), ("test", 8)):
        inputs, targets = {}, {}
        for k, name in enumerate(("a", "b")):
            inputs[name] = torch.randn(count + 3 * k, 5, generator=generator)
            targets[name] = inputs[name][:, :3].argmax(1)
        splits[split] = Split(inputs, targets)
    return Dataset(tuple(Task.of(t, "classification", 3) for t in ("a", "b")), splits)


@pytest.fixture(autouse=True)
def made_data(monkeypatch):
    monkeypatch.setitem(loaders.LOADERS, "dense", dense)
    monkeypatch.setitem(loaders.LOADERS, "domains", domains)


def make_run(
    data: str = "dense", method: str = "equal", options=None, task=None, seed=0, **changes
):
    network = NETWORK if data == "dense" else {"encoder": "mlp", "widths": [6], "dropout": 0.2}
    settings = {"data": {"name": data}, "network": network, "training": TRAINING}
    settings = config.merged(config.merged(config.DEFAULTS, settings), changes)
    return config.Run(data, method, method, method, options or {}, seed, task, settings)


def execute(run, work, **options):
    return training.execute(run, None, work, keep_network=True, **options)


def weights(run, work) -> dict:
    return torch.load(training.weights_file(run, work), weights_only=True)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


# --- training ---


@pytest.mark.parametrize("data", ["dense", "domains"])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, method, data):
    if method != "equal":
        pytest.importorskip("torchjd")
    full = {"training": {"label_fraction": 1.0, "flip": data == "dense"}}
    if data == "dense" and method in ("nash_mtl", "fairgrad"):
        full["training"]["batch"] = 8  # every task in every batch
    run = make_run(data, method, METHODS[method], **full)
    whole = execute(run, tmp_path / "whole")
    assert execute(run, tmp_path / "parts", stop_at=3) is None
    assert not (tmp_path / "parts" / f"{run.key}.json").exists()
    torch.manual_seed(99)
    parts = execute(run, tmp_path / "parts")
    for record in (whole, parts):
        del record["cpu_seconds"]
    assert parts == whole
    assert_equal(weights(run, tmp_path / "parts"), weights(run, tmp_path / "whole"))
    assert not list((tmp_path / "parts").glob(f"{run.key}.pt*"))


def test_a_finished_run_is_read_not_repeated(tmp_path):
    run = make_run()
    first = execute(run, tmp_path)
    assert execute(run, tmp_path) == first
    assert make_run(seed=1).key != run.key != make_run(training={"lr": 2e-3}).key


@pytest.mark.parametrize("data", ["dense", "domains"])
def test_equal_weighting_is_rep_mtl_without_its_losses(tmp_path, data):
    none = {"lambda_tsr": 0.0, "lambda_csa": 0.0}
    runs = [make_run(data), make_run(data, "rep_mtl", none)]
    for run in runs:
        execute(run, tmp_path)
    assert_equal(weights(runs[1], tmp_path), weights(runs[0], tmp_path))


def test_a_step_is_the_plain_loop(tmp_path):
    """One step of Adam on the sum of both losses, written out."""
    run = make_run(training={"steps": 1, "batch": 8})
    execute(run, tmp_path)
    data = dense()
    network = build(data, 0, **NETWORK)
    batch, present = data.batch(0, 8, 0)
    assert set(present["segmentation"].tolist()) == {True}
    images = batch.inputs.float() / 255
    pixels = data.splits["train"].inputs.float().movedim(1, 0).flatten(1) / 255
    z = network.encoder((images - pixels.mean(1).view(1, 3, 1, 1)) / pixels.std(1).view(1, 3, 1, 1))
    total = 0
    for task in data.tasks:
        output = network.head(task.name, z, (8, 8))
        total = total + task.kind.loss(output, batch.targets[task.name])
    # The rate is halved after half of the steps: here, not in this only one.
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-5)
    total.backward()
    optimizer.step()
    assert_equal(weights(run, tmp_path), network.state_dict())


def test_weighting_methods_differ_from_equal_weighting(tmp_path):
    pytest.importorskip("torchjd")
    for method in ("nash_mtl", "fairgrad"):
        run = make_run("domains", method)
        record = execute(run, tmp_path)
        shares = [entry["weight_share_0"] for entry in record["history"]]
        assert any(abs(share - 0.5) > 1e-3 for share in shares)
        assert all(entry["weight_share_0"] + entry["weight_share_1"] == pytest.approx(1)
                   for entry in record["history"])  # fmt: skip


def test_batches_cover_an_epoch_and_differ_by_task_and_seed():
    data = domains()
    assert data.batch_size(100) == 12
    for task, count in (("a", 12), ("b", 15)):
        train = data.splits["train"]
        steps = [data.batch(step, 3, 0)[0].of(task) for step in range(count // 3)]
        epoch = torch.cat(steps)
        assert sorted(epoch[:, 0].tolist()) == sorted(train.of(task)[:, 0].tolist())
        following = data.batch(count // 3, 3, 0)[0].of(task)
        assert not torch.equal(following, steps[0])
        assert not torch.equal(data.batch(0, 3, 1)[0].of(task), steps[0])


def test_missing_labels(tmp_path):
    """A batch that has no label of a task trains the others; a method that can't says so."""
    run = make_run(method="rep_mtl", training={"batch": 1, "steps": 10},
                   options={"lambda_csa": 0.0})  # fmt: skip
    record = execute(run, tmp_path)
    lost = [entry["step"] for entry in record["history"] if "loss_depth" not in entry]
    data = dense()
    absent = [step for step in range(0, 10, 2) if not data.batch(step, 1, 0)[1]["depth"].all()]
    assert lost == absent and 0 < len(absent) < 5
    pytest.importorskip("torchjd")
    with pytest.raises(ValueError, match=r"FairGrad needs every task .* no label for depth"):
        execute(make_run(method="fairgrad", training={"batch": 1, "steps": 10}), tmp_path)


def test_single_task_runs_start_from_the_same_weights():
    data = dense()
    both, one = build(data, 3, **NETWORK), build(data.only("depth"), 3, **NETWORK)
    shared = {k: v for k, v in both.state_dict().items() if "segmentation" not in k}
    # Only the bias that is set to the mean of the training targets is computed from the data.
    assert_equal(one.state_dict(), shared)
    valid = data.splits["train"].targets["depth"][2:]
    torch.testing.assert_close(one.heads["depth"].project[-1].bias, valid.mean().view(1))
    assert not torch.equal(
        build(data, 4, **NETWORK).encoder[0][0].weight, both.encoder[0][0].weight
    )


def test_flipping_mirrors_images_and_labels_alike():
    images = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4).to(torch.uint8)
    normals = torch.randn(2, 3, 2, 4)
    data = Dataset((Task.of("normals", "normals"),), {"train": Split(images, {"normals": normals})})
    sign = torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    seen = set()
    for seed in range(8):
        found = training.flipped(data, data.splits["train"], seed)
        for i in range(2):
            turned = bool((found.inputs[i] == images[i].flip(-1)).all())
            expected = normals[i].flip(-1) * sign if turned else normals[i]
            assert turned or torch.equal(found.inputs[i], images[i])
            assert torch.equal(found.targets["normals"][i], expected)
            seen.add(turned)
    assert seen == {True, False}


def test_learning_rate_halves():
    settings = {"lr": 8.0, "steps": 10, "halve_at": [0.5, 0.8]}
    rates = [training.learning_rate(settings, step) for step in range(10)]
    assert rates == [8.0] * 5 + [4.0] * 3 + [2.0] * 2


@pytest.mark.parametrize(
    ("data", "how"),
    [
        ("dense", {"kind": "rotation"}),
        ("dense", {"kind": "denoising"}),
        ("dense", {"kind": "task", "task": "depth"}),
        ("domains", {"kind": "denoising"}),
    ],
)
def test_pretraining_gives_every_method_the_same_better_encoder(tmp_path, data, how):
    how = {**how, "steps": 3, "batch": 4}
    runs = [make_run(data, pretraining=how), make_run(data, "rep_mtl", REP_MTL, pretraining=how)]
    assert runs[0].pretraining_key == runs[1].pretraining_key != None  # noqa: E711
    records = jobs.run_all(runs, None, tmp_path, jobs=1)
    assert len(records) == 2
    (file,) = tmp_path.glob("*.encoder.pt")
    learned = torch.load(file, weights_only=True)
    settings = runs[0].settings
    made = loaders.LOADERS[data]()
    fresh = build(made, 0, **settings["network"]).encoder.state_dict()
    assert learned.keys() == fresh.keys()
    assert any(not torch.equal(learned[k], fresh[k]) for k in fresh)
    trainer = training.Trainer(runs[1], made, training.start_of(runs[1], None, tmp_path))
    assert_equal(trainer.network.encoder.state_dict(), learned)
    # From a file as well.
    run = make_run(data, training={"init": str(file)})
    assert_equal(training.start_of(run, None, tmp_path), learned)


def test_pretraining_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"pretraining\.kind: rotation needs images"):
        pretraining.pretrained(
            domains(), make_run("domains", pretraining={"kind": "rotation"}).settings, 0
        )
    with pytest.raises(ValueError, match=r"pretraining\.kind: expected one of task, rotation"):
        pretraining.pretrained(dense(), make_run(pretraining={"kind": "x"}).settings, 0)


def test_rotations_are_quarter_turns_of_the_square():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    found = pretraining.rotated(image.expand(4, 1, 3, 4), torch.arange(4))
    for turns in range(4):
        assert torch.equal(found[turns, 0], image[0, 0, :, :3].rot90(turns))


# --- studies ---

STUDY = """
datasets = ["small.toml"]
seeds = [0, 1, 2]

[grid]
"training.label_fraction" = [0.6, 1.0]

[override.all.training]
steps = 4

[[methods]]
name = "alone"
method = "single"

[[methods]]
name = "equal"
method = "equal"

[[methods]]
name = "Rep-MTL"
method = "rep_mtl"
options = { lambda_csa = 0.0, start_share = 0.5 }
grid = { strength = [0.1, 0.3] }
pick = true
against = "alone"
"""
SMALL = """
[data]
name = "dense"
[network]
widths = [4, 6]
strides = [2, 1]
dilations = [1, 1]
head_width = 4
[training]
steps = 6
batch = 4
log_every = 1
"""


@pytest.fixture
def study_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.replace("small.toml", str(tmp_path / "small.toml")))
    return path


def test_a_study_expands_to_its_runs(study_file):
    study = config.study(study_file)
    names = ["small [label_fraction=0.6]", "small [label_fraction=1]"]
    assert list(study.datasets) == names
    assert [study.datasets[n]["training"]["label_fraction"] for n in names] == [0.6, 1.0]
    assert all(d["training"]["steps"] == 4 for d in study.datasets.values())
    labels = [m["label"] for m in study.methods]
    assert labels == ["alone", "equal", "Rep-MTL [strength=0.1]", "Rep-MTL [strength=0.3]"]
    assert study.methods[3]["options"] == {"lambda_csa": 0.0, "start_share": 0.5, "strength": 0.3}
    runs = study.runs({n: ["segmentation", "depth"] for n in names})
    assert len(runs) == 2 * 3 * (2 + 3)
    assert sorted({str(r.task) for r in runs}) == ["None", "depth", "segmentation"]
    assert len({r.key for r in runs}) == len(runs)


def test_json_reads_like_toml(study_file):
    path = study_file.with_suffix(".json")
    path.write_text(json.dumps(config.read(study_file)))
    assert config.study(path) == config.study(study_file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds", "seedz", r"study\.toml: unknown 'seedz'; known are .*seeds"),
        ("steps = 4", "step = 4", r"training: unknown 'step'; known are .*steps"),
        ("pick = true", "picked = true", r"methods: unknown 'picked'"),
        ('name = "equal"', 'name = "alone"', "methods with different names"),
        ('against = "alone"', 'against = "one"', "against: no method is named 'one'"),
        ("seeds = [0, 1, 2]", "seeds = []", "expected 'seeds', a list that is not empty"),
    ],
)
def test_a_study_with_a_mistake(study_file, old, new, message):
    study_file.write_text(study_file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        config.study(study_file)


def test_an_empty_value_of_a_grid_has_a_name(study_file):
    grid = '"pretraining.kind" = ["", "rotation"]'
    study_file.write_text(
        study_file.read_text().replace('"training.label_fraction" = [0.6, 1.0]', grid)
    )
    assert list(config.study(study_file).datasets) == ["small [kind=none]", "small [kind=rotation]"]


def test_committed_studies_are_sound():
    pytest.importorskip("torchjd")
    paths = sorted((Path(config.__file__).parent / "configs").glob("*.toml"))
    assert {"table", "tools", "nyuv2", "cityscapes", "office31"} <= {p.stem for p in paths}
    for path in paths:
        if path.stem != "usual":
            study = config.study(path)
            for settings in study.datasets.values():
                assert settings["data"]["name"] in loaders.LOADERS
            for method in study.methods:
                if method["method"] != "single":
                    training.methods.make(method["method"], method["options"], tasks=2, steps=100)


@pytest.mark.slow
def test_the_command_from_study_to_tables_and_pictures(study_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.quality.__main__.describe", lambda device: dict.fromkeys(
        results.HEAD))  # fmt: skip
    out, work = tmp_path / "out", tmp_path / "work"
    given = [str(study_file), "--out", str(out), "--work", str(work), "--jobs", "1", "--saliency"]
    main(given)
    found = results.load(out, "quality_study")
    assert found["seeds"] == [0, 1, 2] and len(found["datasets"]) == 2
    rows = found["rows"]
    assert len(rows) == 2 * 3 * 4
    by = {(r["dataset"], r["method"], r["seed"]): r for r in rows}
    for (dataset, method, seed), row in by.items():
        assert set(row["metrics"]) == {"segmentation", "depth"}
        for base, name in (("alone", "delta_p"), ("equal", "delta_p_to_equal")):
            other = by[dataset, base, seed]
            assert row[name] == pytest.approx(delta_p(row["metrics"], other["metrics"]), abs=1e-4)
            assert row[name]["mean"] == 0 or method != base
        if method.startswith("Rep-MTL"):
            assert row["against"] == "alone" and row["delta_p_to_against"] == row["delta_p"]
        else:
            assert "against" not in row and "delta_p_to_against" not in row
    *_, last = tables.by_base(rows).split("| Δp to ")
    assert last.startswith("alone, % |") and last.count("\n| Rep-MTL") == 2
    rep = by["small [label_fraction=1]", "Rep-MTL [strength=0.3]", 2]
    assert rep["settings"] == {
        "method": "rep_mtl", "lambda_csa": 0.0, "start_share": 0.5, "strength": 0.3,
    }  # fmt: skip
    assert rep["history"]["step"] == [0, 1, 2, 3]
    ratio = rep["history"]["ratio"]
    assert ratio[:2] == [None, None] and all(r > 0 for r in ratio[2:])
    # The table has one of the grid, the better one on the validation split, and its interval.
    text = capsys.readouterr().out
    for dataset in found["datasets"]:
        values = {
            s: [by[dataset, f"Rep-MTL [strength={s}]", k] for k in range(3)] for s in (0.1, 0.3)
        }
        best = max(values, key=lambda s: sum(
            r["delta_p_to_equal_validation"]["mean"] for r in values[s]))  # fmt: skip
        part = text.split(f"### {dataset}")[1].split("###")[0]
        assert f"| Rep-MTL [strength={best}] |" in part
        assert f"| Rep-MTL [strength={0.4 - best:.1f}] |" not in part
        assert str(interval([r["delta_p"]["mean"] for r in values[best]])) in part
    names = {path.name for path in out.iterdir()}
    pictured = {f"quality_study_{p}.svg" for p in ("delta_p", "strength", "ratio")}
    assert names == {"quality_study.json", *pictured}
    assert len(list((work / "saliency").glob("*.png"))) == 2
    # A second time, nothing is trained.
    files = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    main(given)
    assert files == {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert results.load(out, "quality_study")["rows"] == rows


def test_pick_needs_a_validation_split():
    line = tables.Line("d", "m", "f", None, interval([1.0]), "", None, None, {}, None, False)
    study = config.Study("s", {}, [{"family": "f", "pick": True}], [0], False)
    with pytest.raises(ValueError, match="f: pick needs a validation split"):
        tables.picked([line], study)


def test_weights_that_were_equal_all_along_are_told():
    row = {
        "dataset": "d", "method": "Nash-MTL", "family": "Nash-MTL", "metrics": {"a": {}, "b": {}},
        "history": {"weight_share_0": [0.5, 0.5], "weight_share_1": [0.5, 0.5]},
    }  # fmt: skip
    assert tables.lines([row])[0].equal_weights
    row["history"]["weight_share_0"][1] = 0.6
    assert not tables.lines([row])[0].equal_weights


def test_the_table_has_the_exponents_and_no_base_that_was_not_trained():
    rows = [
        {
            "dataset": "d", "method": "m", "family": "m", "seed": seed, "metrics": {"a": {}},
            "delta_p_to_equal": {"mean": value}, "spectra": {"all": {"encoder": value, "a": None}},
        }
        for seed, value in enumerate((2.0, 3.0))
    ]  # fmt: skip
    to_equal, exponents = tables.by_base(rows).split("\n\n")
    assert "equal weighting" in to_equal and "+2.50 ± " in to_equal
    assert exponents.splitlines()[-1] == "| d | m | 2.50 |  |"


def test_saliency_energy_is_the_gradient(tmp_path):
    data = dense()
    network = build(data, 0, **NETWORK)
    images, energy = pictures.saliency_energy(network, data, 2)
    assert images.shape == (2, 3, 8, 8) and energy.shape == (2, 2, 8, 8)
    z = network.encoder(data.prepared(images)).detach()
    for t, task in enumerate(data.tasks):
        for i in range(2):
            one = z[i : i + 1].requires_grad_()
            target = data.splits["test"].targets[task.name][i : i + 1]
            task.kind.loss(network.head(task.name, one, (8, 8)), target).backward()
            norm = one.grad.norm(dim=1, keepdim=True)
            expected = torch.nn.functional.interpolate(norm, (8, 8), mode="bilinear")[0, 0]
            torch.testing.assert_close(energy[t, i], expected, rtol=1e-4, atol=1e-7)
            one = z = z.detach()
    with pytest.raises(ValueError, match="share their images"):
        pictures.saliency_energy(network, domains(), 2)


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_same(tmp_path):
    """Not the data sets made here, which other processes do not know: features in a file."""
    count = 60
    label, domain = np.arange(count) % 3, np.arange(count) // 3 % 4
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "office_caltech10_64.npz", label=label, domain=domain,
        split=np.arange(count) // 12 % 3, surf800=random.integers(0, 9, (count, 800)),
        class_names=np.array(list("abc")),
        domain_names=np.array(["amazon", "caltech10", "dslr", "webcam"]),
    )  # fmt: skip
    settings = config.merged(config.DEFAULTS, {
        "data": {"name": "office_caltech", "inputs": "surf"},
        "network": {"encoder": "mlp", "widths": [6], "head_width": 0}, "training": TRAINING,
    })  # fmt: skip
    runs = [
        config.Run("surf", "equal", "equal", "equal", {}, seed, None, settings) for seed in (0, 1)
    ]
    alone = jobs.run_all(runs, tmp_path, tmp_path / "one", jobs=1)
    together = jobs.run_all(runs, tmp_path, tmp_path / "two", jobs=2)
    for run in runs:
        assert together[run.key]["evaluations"] == alone[run.key]["evaluations"]


def test_tensorboard_has_training_and_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(method="rep_mtl")
    record = execute(run, tmp_path, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").rglob("events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("training/loss_depth")]
    assert losses == [
        (h["step"], pytest.approx(h["loss_depth"], rel=1e-6)) for h in record["history"]
    ]
    (miou,) = events.Scalars("test/segmentation/miou")
    assert miou.value == pytest.approx(record["evaluations"][-1]["test"]["segmentation"]["miou"])
    assert "training/ratio" in events.Tags()["scalars"]


def test_exponents_of_a_known_spectrum():
    """Weights whose eigenvalues W^T W follow a power law of exponent 2.5 (density)."""
    pytest.importorskip("weightwatcher")
    from benchmarks.quality.spectra import exponent

    layer = torch.nn.Linear(300, 300, bias=False)
    u, _, v = torch.linalg.svd(layer.weight.detach())
    quantiles = (torch.arange(300) + 0.5) / 300
    eigenvalues = quantiles ** (-1 / 1.5)
    layer.weight.data = u @ torch.diag(eigenvalues.sqrt()) @ v
    assert exponent(torch.nn.Sequential(layer)) == pytest.approx(2.5, abs=0.25)
    assert exponent(torch.nn.Sequential(torch.nn.ReLU())) is None
