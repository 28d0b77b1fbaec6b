"""The study of recommendation: a small run, and its table by hand."""

import pytest

from benchmarks import results
from benchmarks.parts.quality import recommendation_table
from benchmarks.quality import recommendation

pytest.importorskip("scipy")


def test_a_small_run(monkeypatch, tmp_path):
    monkeypatch.setattr(recommendation, "TRAINING", {"artificial": (1, 1e-4)})
    monkeypatch.setattr(recommendation, "BATCH", 256)
    recommendation.main(["--seeds", "3", "4", "--rows", "4000", "--out", str(tmp_path)])
    result = results.load(tmp_path, "quality_recommendation")
    criteria = [recommendation.ITEMS, *recommendation.CRITERIA]
    assert [(row["seed"], row["criterion"]) for row in result["rows"]] == [
        (seed, criterion) for seed in (3, 4) for criterion in criteria
    ]
    for row in result["rows"]:
        assert list(row["auc"]) == ["click", "like", "finish"]
        assert all(0 < auc < 1 for auc in row["auc"].values())
    trained = [row["auc"] for row in result["rows"] if row["criterion"] != recommendation.ITEMS]
    assert len({auc["click"] for auc in trained}) == len(trained)  # each criterion has its effect
    assert "Batches of 256 in bfloat16" in recommendation_table(result)


def test_table_by_hand():
    def row(seed: int, criterion: str, *auc: float) -> dict:
        return {
            "log": "made", "seed": seed, "criterion": criterion,
            "auc": dict(zip(("click", "like"), auc, strict=True)),
        }  # fmt: skip

    rows = [
        row(0, recommendation.EQUAL, 0.7, 0.8), row(0, "new", 0.72, 0.8),
        row(1, recommendation.EQUAL, 0.6, 0.9), row(1, "new", 0.64, 0.92),
    ]  # fmt: skip
    equal, new = recommendation.table(rows).splitlines()[2:]
    assert "click 0.6500 ± 0.0707 | like 0.8500 ± 0.0707" in equal
    # gains of 1 and 3 points: 2 ± 12.7062 / sqrt(2) * sqrt(2)
    assert "click 0.6800 ± 0.0566 | like 0.8600 ± 0.0849 | +2.00 ± 12.71" in new
