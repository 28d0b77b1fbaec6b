"""Data of recommendation.py: logs of who was shown what, with several kinds of feedback a row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.2


class Log(NamedTuple):
    """Rows of one part of a log. Fields are ids from 1 on, the user's and the item's first."""

    fields: Tensor  # (rows, fields); 0 is an id that no row of the training part has
    labels: Tensor  # (rows, tasks), 0 or 1; NaN where there is no label

    def to(self, device: torch.device) -> Log:
        return Log(self.fields.to(device), self.labels.to(device))


class Data(NamedTuple):
    tasks: tuple[str, ...]
    sizes: list[int]  # how many ids each field has, with the 0
    train: Log
    test: Log


def last_rows(users: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Return which rows are the last fifth of their user's by time, so that each user has a past.

    Rows drawn at random would let a model learn from the days that it is tested on.
    """
    users = np.unique(users, return_inverse=True)[1]
    order = np.lexsort((time, users))
    counts = np.bincount(users)
    first = np.cumsum(counts) - counts
    place = np.empty(len(users))
    place[order] = np.arange(len(users)) - first[users[order]]
    return place >= (1 - HELD_OUT) * counts[users]


def split(tasks: dict[str, np.ndarray], fields: list[np.ndarray], held_out: np.ndarray) -> Data:
    """Number the values of each field that the training part has, from 1 on."""
    columns, sizes = [], []
    for field in fields:
        values = np.unique(field, return_inverse=True)[1]
        known = np.bincount(values[~held_out], minlength=values.max() + 1) > 0
        columns.append(np.where(known, np.cumsum(known), 0)[values])
        sizes.append(int(known.sum()) + 1)
    rows = torch.from_numpy(np.stack(columns, 1))
    labels = torch.from_numpy(np.stack(list(tasks.values()), 1)).float()
    parts = (Log(rows[part], labels[part]) for part in (~held_out, held_out))
    return Data(tuple(tasks), sizes, *parts)


def artificial(rows: int, seed: int) -> Data:
    """Return a log of videos: click, and like and finish where there was a click.

    The three have interest in common. A lurid title brings clicks, and videos that nobody finishes.
    Few videos have most of the rows, and others are popular in the end than in the beginning.
    """
    rng = np.random.default_rng(seed)
    users, items, latent = 1000, 1500, 6
    country, topic = rng.integers(10, size=users), rng.integers(30, size=items)
    taste = rng.normal(size=(10, latent))[country] + rng.normal(size=(users, latent))
    content = rng.normal(size=(30, latent))[topic] + rng.normal(size=(items, latent))
    lurid, quality, length = rng.normal(size=(3, items))

    skew = 1 / np.arange(10, items + 10)
    early, late = (rng.permutation(skew) / skew.sum() for _ in range(2))
    time = np.sort(rng.random(rows))
    user = rng.integers(users, size=rows)
    item = np.where(
        rng.random(rows) < time,
        rng.choice(items, size=rows, p=late),
        rng.choice(items, size=rows, p=early),
    )
    hour = rng.integers(24, size=rows)

    def happens(logit: np.ndarray) -> np.ndarray:
        return (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)

    interest = (taste[user] * content[item]).sum(1) / latent**0.5
    evening = np.where(hour >= 18, 0.3, 0.0)
    click = happens(interest + lurid[item] + evening - 0.5)
    shown_only = np.where(click == 1, 0.0, np.nan)
    tasks = {
        "click": click,
        "like": happens(interest + quality[item] - 1.5) + shown_only,
        "finish": happens(interest - lurid[item] - length[item]) + shown_only,
    }
    return split(tasks, [user, item, country[user], topic[item], hour], last_rows(user, time))


def movielens(folder: Path, seed: int) -> Data:
    """Read ratings.csv and movies.csv of MovieLens (20M and later, and latest-small).

    For each rating the log has a second row of the same user, with a film that is drawn from the
    ratings of the same part. It counts as not seen, and has no rating. A popular film is as often
    not seen as seen, so that its popularity alone says nothing.
    """
    columns = np.loadtxt(folder / "ratings.csv", delimiter=",", skiprows=1, ndmin=2)
    user, film, rating, time = columns.T
    held_out = last_rows(user, time)
    drawn = film.copy()
    rng = np.random.default_rng(seed)
    for part in (held_out, ~held_out):
        drawn[part] = rng.choice(np.unique(film[part]), part.sum())
    film = np.concatenate([film, drawn])
    none = np.full(len(rating), np.nan)
    tasks = {
        "seen": np.repeat([1.0, 0.0], len(rating)),
        "liked": np.concatenate([rating >= 4, none]),
        "loved": np.concatenate([rating >= 5, none]),
    }
    with open(folder / "movies.csv", encoding="utf-8", newline="") as file:
        genres_of = {int(row["movieId"]): row["genres"] for row in csv.DictReader(file)}
    genres = np.array([genres_of[int(number)] for number in film])
    return split(tasks, [np.tile(user, 2), film, genres], np.tile(held_out, 2))


def kuairand(folder: Path, seed: int) -> Data:
    """Read log_standard_*.csv of KuaiRand (Pure or 1K). All of it is read; ``seed`` is not used."""
    names = (
        "user_id", "video_id", "time_ms", "hourmin", "duration_ms", "tab",
        "is_click", "is_like", "long_view",
    )  # fmt: skip
    parts = []
    for path in sorted(folder.glob("log_standard_*.csv")):
        with open(path, encoding="utf-8") as file:
            header = file.readline().strip().split(",")
            places = [header.index(name) for name in names]
            parts.append(np.loadtxt(file, delimiter=",", usecols=places, ndmin=2))
    user, video, time, hourmin, duration, tab, click, like, long_view = np.concatenate(parts).T
    # Classes of length: each is 1.4 times as long as the one before.
    length = np.floor(2 * np.log2(1 + duration / 1000))
    tasks = {"click": click, "like": like, "long view": long_view}
    fields = [user, video, tab, length, hourmin // 100]
    return split(tasks, fields, last_rows(user, time))


def read(folder: Path | None, rows: int, seed: int) -> Data:
    """Return the log in ``folder``, or without one an artificial log of so many rows."""
    if folder is None:
        return artificial(rows, seed)
    if (folder / "ratings.csv").is_file():
        return movielens(folder, seed)
    if any(folder.glob("log_standard_*.csv")):
        return kuairand(folder, seed)
    raise ValueError(
        f"--data: expected a folder with ratings.csv or log_standard_*.csv, got {folder}"
    )
