"""The study of groups: its data sets, groups and table, on small data made here."""

from __future__ import annotations

import itertools

import pytest
import torch
from quality_data import TRAINING, dense, make_run

from benchmarks import results
from benchmarks.parts.quality import grouping_table
from benchmarks.quality import config, grouping, loaders, related, tox21, training
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.tables import delta_p, interval
from benchmarks.quality.tasks import KINDS, Task
from repmtl_kernels import group_tasks, task_saliencies

pytest.importorskip("sklearn")

# --- tasks made in groups ---


def digits() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    splits = {
        part: Split(
            torch.rand(count, 1, 8, 8, generator=generator),
            {t: torch.randint(10, (count,), generator=generator) for t in ("left", "right")},
        )
        for part, count in (("train", 40), ("test", 20))
    }
    return Dataset(tuple(Task.of(t, "classification", 10) for t in ("left", "right")), splits)


def test_questions_about_digits():
    made, again, other = (related.questions(digits(), seed) for seed in (0, 0, 1))
    assert made.names == [t for group in grouping.CASES[0].made for t in group]
    assert [t.kind.classes for t in made.tasks] == [10, 2, 2, 10, 2, 2, 10, 2]
    for part, split in digits().splits.items():
        targets = made.splits[part].targets
        for side, labels in split.targets.items():
            for k, digit in enumerate(labels.tolist()):
                answers = [int(targets[f"{side}_{q}"][k]) for q in ("digit", "parity", "large")]
                assert answers == [digit, digit % 2, int(digit > 4)]
        permuted = targets["permuted_digit"]
        assert permuted.sort().values.equal(split.targets["left"].sort().values)
        assert not permuted.equal(split.targets["left"])
        assert targets["permuted_parity"].equal(permuted % 2)
        assert permuted.equal(again.splits[part].targets["permuted_digit"])
        assert not permuted.equal(other.splits[part].targets["permuted_digit"])


def rgbd() -> Dataset:
    """Three tasks; the labels of the last image are missing."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for part, count in (("train", 30), ("test", 3)):
        normals = torch.nn.functional.normalize(torch.randn(count, 3, 8, 8, generator=generator))
        targets = {
            "segmentation": torch.randint(4, (count, 8, 8), generator=generator).to(torch.int8),
            "depth": 1 + torch.rand(count, 1, 8, 8, generator=generator),
            "normals": normals,
        }
        targets["segmentation"][-1], targets["depth"][-1], targets["normals"][-1] = -1, 0, 0
        images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        splits[part] = Split(images, targets)
    return Dataset(tuple(Task.of(t, t, 4) for t in grouping.DENSE), splits)


def test_noisy_copies():
    plain, made = rgbd(), related.with_copies(rgbd(), 0)
    assert {t for group in grouping.CASES[1].made for t in group} == set(made.names)
    train, test = (made.splits[part].targets for part in ("train", "test"))
    for task in grouping.DENSE:
        clean, noisy = train[task], train[f"noisy_{task}"]
        assert clean.equal(plain.splits["train"].targets[task])
        assert noisy.dtype == clean.dtype and noisy[-1].equal(clean[-1])
        assert test[f"noisy_{task}"].equal(test[task])
    changed = (train["noisy_segmentation"] != train["segmentation"])[:-1].float().mean()
    assert changed == pytest.approx(0.3 * 3 / 4, abs=0.03)  # a random class may be the same
    logarithm = (train["noisy_depth"] / train["depth"])[:-1].log()
    assert logarithm.std() == pytest.approx(0.3, abs=0.03) and logarithm.mean().abs() < 0.03
    lengths = train["noisy_normals"][:-1].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    cosine = (train["noisy_normals"] * train["normals"]).sum(1)[:-1]
    assert 0.7 < cosine.mean() < 0.95


# --- Tox21 ---

TABLE = """#1,2
#names
1,0,N/A,0,0,0,0,0,0,0,0,1,TOX1,CCCl
0,,N/A,0,0,0,0,0,0,0,0,0,TOX2,c1ccccc1Br
"""


def test_lingos():
    """Two letters of an element are one, ring closures are 0, short molecules have none."""
    assert tox21.lingos("CCCl") == [] and tox21.lingos("CCCCl") == ["CCCL"]
    assert tox21.lingos("C1CC2Br") == ["C0CC", "0CC0", "CC0R"]


def test_tox21(tmp_path):
    (tmp_path / "tabular").mkdir()
    rows = [f"{k % 2},{'0,' * 10}N/A,TOX{k},{'C' * (4 + k // 2)}" for k in range(20)]
    (tmp_path / "tabular" / "tox21.csv").write_text(TABLE + "\n".join(rows) + "\n")
    data = loaders.load("tox21", tmp_path, 0, features=3)
    assert data.names == list(tox21.ASSAYS) and not data.multi_input
    counts = {part: len(split.inputs) for part, split in data.splits.items()}
    assert sum(counts.values()) == 22 and 2 <= counts["test"] <= 4 <= counts["train"]
    labels = torch.cat([split.targets["NR-AR-LBD"] for split in data.splits.values()])
    assert sorted(labels.tolist()) == [-1] + 21 * [0]
    # Two rows for each molecule of the chains: both are in one split.
    chains = [set(split.inputs[:, 0].tolist()) - {0.0} for split in data.splits.values()]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(chains, 2))
    assert data.splits["train"].inputs[:, 0].max() == pytest.approx(
        torch.log1p(torch.tensor(float(max(round(2.718281828**x) - 1 for x in chains[0]))))
    )
    other = loaders.load("tox21", tmp_path, 1, features=3)
    assert not other.splits["test"].inputs.equal(data.splits["test"].inputs)
    loaders.LOADERS["tox21"].cache_clear()


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    torch.manual_seed(0)
    outputs, labels = torch.randn(20, 1), torch.randint(-1, 2, (20,), dtype=torch.int8)
    outputs[3] = outputs[4]
    pairs = list(zip(outputs.split(6), labels.split(6), strict=True))
    ones, zeros = (outputs[labels == label, 0].tolist() for label in (1, 0))
    order = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in zeros]
    found = KINDS["binary"](0).evaluate(pairs)
    assert found == {"auc": pytest.approx(100 * sum(order) / len(order))}


def test_binary_loss_is_the_mean_over_labels():
    outputs = torch.randn(5, 1, dtype=torch.float64)
    labels = torch.tensor([0, -1, 1, 1, -1], dtype=torch.int8)
    likely = torch.sigmoid(outputs[:, 0])
    expected = -((1 - likely[0]).log() + likely[2].log() + likely[3].log()) / 3
    torch.testing.assert_close(KINDS["binary"](0).loss(outputs, labels), expected)


# --- the study ---


def test_a_run_of_some_tasks():
    run = make_run(task=("segmentation", "depth"))
    assert str(run) == "dense: segmentation + depth, seed 0" and run.key != make_run().key
    data = dense().only("depth", "segmentation")
    assert data.names == ["segmentation", "depth"] and not data.multi_input


def test_watched_cosines(tmp_path, monkeypatch):
    """They are of steps 0 and 2 of 6, and the training is that without a look at them."""
    monkeypatch.setitem(loaders.LOADERS, "dense", dense)
    watched = make_run(method="watched", options={"every": 2, "until_share": 0.5})
    record = training.execute(watched, None, tmp_path)
    plain = training.execute(make_run(), None, tmp_path)
    assert record["metrics"] == plain["metrics"] and "cosine" not in plain
    trainer = training.Trainer(make_run(), training.prepare(make_run(), None), None)
    cosines = []
    for step in range(3):
        if step % 2 == 0:
            forward = trainer.forward(trainer.dataset.batch(step, trainer.size, 0))
            s, u = (x.detach().flatten(1).double() for x in
                    task_saliencies(forward.losses, forward.representations[0]))  # fmt: skip
            norms = s.norm(dim=1) * u.norm(dim=1)
            cosines += ((s * u).sum(1) / norms)[norms > 0].tolist()
        trainer.train_step(step)
    assert record["cosine"][0][1] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


NAMES = ["a", "b", "c", "d", "e"]


def test_random_groups_differ_and_have_the_sizes():
    like = (("a", "b"), ("c", "d"), ("e",))
    drawn = grouping.random_groups(NAMES, like, 0, 14)  # all others
    assert len({like, *drawn}) == 15
    for groups in drawn:
        assert sorted(map(len, groups)) == [1, 2, 2]
        assert groups == grouping.ordered(NAMES, groups) and sorted(sum(groups, ())) == NAMES
    assert drawn == grouping.random_groups(NAMES, like, 0, 14)
    assert drawn != grouping.random_groups(NAMES, like, 1, 14)


def test_the_score_is_that_of_group_tasks():
    cosine = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    cosine = cosine + cosine.T
    found = group_tasks(cosine, 3, names=NAMES)
    for grouped in (found, found.next_best):
        score = grouping.score(cosine.tolist(), NAMES, grouped.groups)
        assert score == pytest.approx(grouped.score)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A study of two data sets with three tasks, each for two networks."""

    def three(folder=None, *, seed=0):
        data = related.with_copies(rgbd(), seed)
        return data.only("segmentation", "depth", "noisy_depth")

    settings = {"data": {"name": "three"}, "network": make_run().settings["network"]}
    settings = config.merged(config.DEFAULTS, settings | {"training": TRAINING})
    monkeypatch.setitem(loaders.LOADERS, "three", three)
    monkeypatch.setattr(config, "of_dataset", lambda file: settings)
    made = (("segmentation",), ("depth", "noisy_depth"))
    cases = (
        grouping.Case("first", 2, made, ("segmentation", "depth")), grouping.Case("second", 2),
    )  # fmt: skip
    monkeypatch.setattr(grouping, "CASES", cases)
    monkeypatch.setattr(grouping, "DRAWS", 2)
    monkeypatch.setattr(grouping, "describe", lambda *_: {"commit": ""})
    monkeypatch.setattr(grouping.ceilings, "of", lambda device: None)
    return tmp_path


@pytest.mark.slow
def test_the_command_from_runs_to_the_table(small, capsys):
    words = ["--seeds", "0", "1", "--jobs", "1", "--out", str(small / "out")]
    grouping.main([*words, "--work", str(small / "work")])
    rows = results.load(small / "out", "quality_grouping")["rows"]
    kinds = [row["grouping"] for row in rows if (row["dataset"], row["seed"]) == ("first", 1)]
    assert kinds == ["all together", "found", "made", "random", "random"]
    assert len(rows) == 2 * (5 + 4)
    for row in rows:
        others = {"noisy_depth"} if row["dataset"] == "second" else set()
        assert set(row["metrics"]) == {"segmentation", "depth"} | others
    (base, found, *_) = rows
    assert found["groups"] == [
        list(group) for group in group_tasks(
            torch.tensor(base["cosine"]), 2, names=["segmentation", "depth", "noisy_depth"]
        ).groups
    ]  # fmt: skip
    # A group's metrics are those of a network that trains on its tasks alone.
    for group in found["groups"]:
        task = tuple(group) if len(group) > 1 else group[0]
        run = config.Run("", "", "", "equal", {}, 0, task, config.of_dataset(None))
        metrics = training.execute(run, None, small / "again")["metrics"]
        assert all(metrics[t] == found["metrics"][t] for t in group if t in found["metrics"])
    text = capsys.readouterr().out
    assert grouping.table(rows) in text
    files = {path: path.stat().st_mtime_ns for path in (small / "work").iterdir()}
    grouping.main([*words, "--work", str(small / "work")])
    assert files == {path: path.stat().st_mtime_ns for path in (small / "work").iterdir()}


def made_rows() -> list[dict]:
    """Two seeds; accuracies of all together, found, made and two random groupings."""
    rows = []
    accuracies = ((50.0, 60.0, 60.0, 55.0, 40.0), (40.0, 50.0, 46.0, 44.0, 38.0))
    for seed, values in enumerate(accuracies):
        made = [["a", "b"], ["c"]] if seed == 0 else [["a"], ["b", "c"]]
        drawn = [["a"], ["b", "c"]], [["a", "c"], ["b"]]
        groupings = ([["a", "b", "c"]], [["a", "b"], ["c"]], made, *drawn)
        kinds = ("all together", "found", "made", "random", "random")
        for what, groups, score, value in zip(
            kinds, groupings, (0, 3, 3 if seed == 0 else 1, 1, 2), values, strict=True
        ):
            row = {"dataset": "data", "seed": seed, "networks": 2, "grouping": what}
            row |= {"groups": groups, "score": score}
            rows.append(row | {"metrics": {"a": {"accuracy": value}}})
    return rows


def test_the_table_by_hand():
    """Scores of 0, 3, 1, 2 and gains of 0, 20, 10, -20 have a rank correlation of 1 - 6 * 6 / 60.

    So do the gains of the second seed: 0, 25, 10, -5.
    """
    rows = made_rows()
    header, _, line = grouping.table(rows).splitlines()
    assert header.count("|") == line.count("|") == 9
    found = interval([20.0, 25.0])
    made, drawn = interval([20.0, 15.0]), interval([(10 - 20) / 2, (10 - 5) / 2])
    to_random = interval([
        (100 * 5 / 55 + 100 * 20 / 40) / 2, (100 * 6 / 44 + 100 * 12 / 38) / 2,
    ])  # fmt: skip
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[:3] == ["data", "2", "1 of 2"]
    assert cells[3:7] == [str(found), str(made), str(drawn), str(to_random)]
    assert cells[7] == str(interval([0.4, 0.4]))
    base, first = rows[0], rows[1]
    assert delta_p(first["metrics"], base["metrics"])["mean"] == pytest.approx(20)


def test_the_caption():
    head = {
        "machine": {"cpu": "a CPU", "threads": 1}, "versions": {"torch": "2"}, "dirty": False,
        "commit": "0" * 40, "date": "2026-01-01T00:00:00", "seeds": [0, 1],
    }  # fmt: skip
    text = grouping_table({**head, "rows": made_rows()})
    assert text.startswith(grouping.table(made_rows())) and "over 2 seeds" in text
