"""Tox21: twelve assays of one set of molecules, each a task, with labels missing here and there."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.data import Dataset, Split, stream
from benchmarks.quality.files import located
from benchmarks.quality.tasks import UNLABELLED, Task

FILE = "tabular/tox21.csv"
ASSAYS = (
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma",
    "SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53",
)  # fmt: skip
LABELS = {"0": 0, "1": 1, "N/A": UNLABELLED, "": UNLABELLED}
LENGTH = 4  # letters of a LINGO
SHARES = {"test": 0.2, "validation": 0.2}  # of the molecules; the others are for training


class Molecule(NamedTuple):
    smiles: str
    labels: list[int]  # of the assays


@lru_cache(maxsize=2)
def tox21(folder: Path | None, *, seed: int, features: int = 1024) -> Dataset:
    """Load the assays; the seed decides on the split, and one molecule is in one split only.

    features: the number of LINGOs (Vidal et al., 2005), the most frequent ones of the training
        molecules. A molecule's features are the logarithms of 1 plus their counts in it.
    """
    path = located(folder, FILE, "tox21", "the labels of the Tox21 challenge, with SMILES")
    with path.open(newline="", encoding="utf-8") as file:
        return dataset(file, seed, features)


def dataset(lines: Iterable[str], seed: int, features: int) -> Dataset:
    """Return the data set of a table: the labels of the assays, a name, and SMILES."""
    molecules = [
        Molecule(smiles, [LABELS[label] for label in labels])
        for *labels, _, smiles in csv.reader(line for line in lines if line[0] != "#")
    ]
    places = split_of(sorted({m.smiles for m in molecules}), seed)
    parts = {
        part: [m for m in molecules if places[m.smiles] == part] for part in ("train", *SHARES)
    }
    counts = Counter(lingo for m in parts["train"] for lingo in lingos(m.smiles))
    # Parts with equal counts come in the order of their letters, whatever the order of the file.
    frequent = sorted(counts, key=lambda lingo: (-counts[lingo], lingo))[:features]
    columns = {lingo: k for k, lingo in enumerate(frequent)}
    splits = {}
    for part, chosen in parts.items():
        labels = torch.tensor([m.labels for m in chosen], dtype=torch.int8)
        inputs = torch.stack([encoded(m.smiles, columns) for m in chosen])
        splits[part] = Split(inputs, dict(zip(ASSAYS, labels.unbind(1), strict=True)))
    return Dataset(tuple(Task.of(assay, "binary") for assay in ASSAYS), splits)


def split_of(smiles: list[str], seed: int) -> dict[str, str]:
    """Return the split of each molecule."""
    generator = torch.Generator().manual_seed(stream(seed, "tox21"))
    order = torch.randperm(len(smiles), generator=generator).tolist()
    places, done = dict.fromkeys(smiles, "train"), 0
    for part, share in SHARES.items():
        count = round(share * len(smiles))
        places |= {smiles[k]: part for k in order[done : done + count]}
        done += count
    return places


def lingos(smiles: str) -> list[str]:
    """Return all substrings of four letters; chlorine and bromine are one letter, rings are 0."""
    text = re.sub(r"\d", "0", smiles.replace("Cl", "L").replace("Br", "R"))
    return [text[k : k + LENGTH] for k in range(len(text) - LENGTH + 1)]


def encoded(smiles: str, columns: dict[str, int]) -> Tensor:
    values = torch.zeros(len(columns))
    for lingo in lingos(smiles):
        if lingo in columns:
            values[columns[lingo]] += 1
    return values.log1p()
