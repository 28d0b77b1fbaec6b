"""The logs that examples/recommendation.py reads or makes, and the AUC that it prints."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Return a module of the example by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_the_last_fifth_of_each_user_is_held_out(example):
    users, time = np.array([7, 3] * 5), np.array([5, 0, 4, 1, 3, 2, 2, 3, 1, 4])
    held_out = example("interactions").last_rows(users, time)
    assert held_out.nonzero()[0].tolist() == [0, 9]


def test_movielens(example, tmp_path):
    ratings = [(user, 10 * user + n, 2.5 + n / 2, 100 - n) for user in (1, 2) for n in range(6)]
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in ratings)]
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    films = [
        f'{film},"A, B (1999)",{"Drama" if film % 2 else "War|Drama"}' for _, film, *_ in ratings
    ]
    (tmp_path / "movies.csv").write_text("\n".join(["movieId,title,genres", *films]) + "\n")
    data = example("interactions").read(tmp_path, 0, seed=0)
    assert data.tasks == ("seen", "liked", "loved")
    # Time runs backwards, so the first rating of each user is the last one.
    assert (len(data.train.fields), len(data.test.fields)) == (20, 4)
    seen = data.train.labels[:, 0] == 1
    assert seen.sum() == 10
    assert data.train.labels[~seen, 1:].isnan().all()
    assert data.train.labels[seen, 1].tolist() == [0, 0, 1, 1, 1] * 2
    assert data.train.labels[seen, 2].tolist() == [0, 0, 0, 0, 1] * 2
    assert data.sizes == [3, 11, 3]
    # The films of these ratings are in no row of the training part.
    assert (data.test.fields[:, 1] == 0).all()
    assert (data.test.fields[:, [0, 2]] > 0).all()


def test_kuairand(example, tmp_path):
    columns = (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
        "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
        "is_profile_enter,is_rand,tab"
    )
    for name, day in (("4_08_to_4_21", 1), ("4_22_to_5_08", 2)):
        lines = [
            f"{user},{n},2022042{day},{100 * n + user},{1000 * day + n},{n % 2},0,0,0,0,0,{n // 4},"
            f"9,{1000 * n},0,0,0,0,1"
            for user in (5, 6)
            for n in range(5)
        ]
        path = tmp_path / f"log_standard_{name}_pure.csv"
        path.write_text("\n".join([columns, *lines]) + "\n")
    data = example("interactions").read(tmp_path, 0, seed=0)
    assert data.tasks == ("click", "like", "long view")
    assert data.test.fields[:, :2].tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]
    assert data.test.labels.tolist() == [[1, 0, 0], [0, 0, 1]] * 2
    assert data.sizes == [3, 6, 2, 5, 6]


def test_a_folder_without_a_log(example, tmp_path):
    with pytest.raises(ValueError, match="--data: expected a folder with ratings.csv or log_stand"):
        example("interactions").read(tmp_path, 0, seed=0)


def test_the_artificial_log(example):
    data = example("interactions").read(None, 20_000, seed=0)
    click, like, finish = data.train.labels.T
    assert torch.equal(like.isnan(), click == 0)
    assert torch.equal(finish.isnan(), click == 0)
    counts = torch.bincount(data.train.fields[:, 1]).sort(descending=True).values
    assert counts[: len(counts) // 10].sum() > 0.4 * counts.sum()
    # A lurid title brings clicks, and videos that are not finished: the rates of items conflict.
    items, known = data.train.fields[:, 1], click == 1
    clicks = torch.bincount(items, click) / torch.bincount(items)
    finished = torch.bincount(items[known], finish[known]) / torch.bincount(items[known])
    often = torch.bincount(items) > 30
    assert torch.corrcoef(torch.stack([clicks[often], finished[often]]))[0, 1] < -0.1


def test_auc_counts_pairs(example):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60, 1), generator=generator).float()
    labels = torch.randint(2, (60, 1), generator=generator).float()
    labels[::7] = torch.nan
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None] - negative
    expected = (difference > 0).float().mean() + (difference == 0).float().mean() / 2
    assert example("recommendation").aucs(scores, labels) == pytest.approx([expected.item()])


def test_the_block_of_the_guide_is_complete(monkeypatch, tmp_path, capsys):
    guide = (EXAMPLES.parent / "docs" / "recommendation.md").read_text(encoding="utf-8")
    block = guide.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "recommendation.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    first, last = (
        float(line.split("'click': ")[1].split(",")[0]) for line in (lines[0], lines[-1])
    )
    assert len(lines) == 3 and last < first
    assert "click" in (tmp_path / "report.html").read_text(encoding="utf-8")
