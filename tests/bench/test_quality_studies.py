"""Studies, from their files to rows, tables and pictures, on small data sets made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quality_data import TRAINING, dense, domains

from benchmarks import results
from benchmarks.quality import config, loaders, studies, tables, training
from benchmarks.quality.__main__ import main


@pytest.fixture(autouse=True)
def made_data(monkeypatch):
    monkeypatch.setitem(loaders.LOADERS, "dense", dense)
    monkeypatch.setitem(loaders.LOADERS, "domains", domains)


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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds", "seedz", r"study\.toml: unknown 'seedz'; known are .*seeds"),
        ("steps = 4", "step = 4", r"training: unknown 'step'; known are .*steps"),
        ('against = "alone"', 'beside = "alone"', r"methods: unknown 'beside'"),
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
    configs = Path(config.__file__).parent / "configs"
    paths = sorted(configs.glob("*.toml"))
    assert {"table", "bench", "doom"} <= {p.stem for p in paths}
    assert {"doom", "tools", "potholes"} <= {p.stem for p in configs.glob("data/*.toml")}
    for path in paths:
        study = config.study(path)
        for settings in study.datasets.values():
            assert settings["data"]["name"] in loaders.LOADERS
        for method in study.methods:
            if method["method"] != "single":
                training.methods.make(method["method"], method["options"], 2, 100)


def test_a_study_and_a_data_set_may_have_one_name():
    assert list(config.study(config.find("doom")).datasets) == ["doom"]
    assert "datasets" not in config.read(config.find("doom", "data"))


@pytest.mark.slow
def test_the_command_from_study_to_tables_and_pictures(study_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.quality.__main__.describe", lambda *_: {"commit": ""})
    out, work = tmp_path / "out", tmp_path / "work"
    given = [str(study_file), "--out", str(out), "--work", str(work), "--jobs", "1"]
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
            assert row[name] == pytest.approx(
                tables.delta_p(row["metrics"], other["metrics"]), abs=1e-4
            )
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
    text = capsys.readouterr().out
    assert tables.by_base(rows) in text
    names = {path.name for path in out.iterdir()}
    pictured = {f"quality_study_{p}.svg" for p in ("delta_p", "strength", "ratio")}
    assert names == {"quality_study.json", *pictured}
    # A second time, nothing is trained.
    files = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    main(given)
    assert files == {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert results.load(out, "quality_study")["rows"] == rows


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
    assert to_equal == tables.to_equal(rows)
    assert exponents.splitlines()[-1] == "| d | m | 2.50 |  |"


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
        "data": {"name": "office_caltech"},
        "network": {"encoder": "mlp", "widths": [6], "head_width": 0}, "training": TRAINING,
    })  # fmt: skip
    runs = [
        config.Run("surf", "equal", "equal", "equal", {}, seed, None, settings) for seed in (0, 1)
    ]
    alone = studies.run_all(runs, 1, folder=tmp_path, work=tmp_path / "one")
    together = studies.run_all(runs, 2, folder=tmp_path, work=tmp_path / "two")
    for run in runs:
        assert together[run.key]["metrics"] == alone[run.key]["metrics"]


def test_exponents_of_a_known_spectrum():
    """Weights whose eigenvalues W^T W follow a power law of exponent 2.5 (density)."""
    pytest.importorskip("weightwatcher")
    from benchmarks.quality.training import exponent

    layer = torch.nn.Linear(300, 300, bias=False)
    u, _, v = torch.linalg.svd(layer.weight.detach())
    quantiles = (torch.arange(300) + 0.5) / 300
    eigenvalues = quantiles ** (-1 / 1.5)
    layer.weight.data = u @ torch.diag(eigenvalues.sqrt()) @ v
    assert exponent(torch.nn.Sequential(layer)) == pytest.approx(2.5, abs=0.25)
    assert exponent(torch.nn.Sequential(torch.nn.ReLU())) is None
