"""Universal Dependencies: four labels for each word of a sentence, as four tasks on one input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import minilm
from benchmarks.quality.data import Dataset, Split, stream
from benchmarks.quality.files import located
from benchmarks.quality.tasks import UNLABELLED, Task

FILES = {part: f"text/ud_english_ewt/en_ewt-ud-{part}.conllu" for part in ("dev", "test")}
TASKS = ("upos", "deprel", "feats", "head")
# Labels with fewer words than this in the training part are one class together.
FEWEST = {"feats": 5}
FARTHEST = 10  # a head that is farther away counts as this far
VALIDATION_SHARE = 0.2


class Word(NamedTuple):
    form: str
    labels: dict[str, str]  # by task


Sentence = list[Word]


@lru_cache(maxsize=1)
def ud_ewt(folder: Path | None, *, length: int = 32, test: int | None = None) -> Dataset:
    """Load English EWT: part of speech, relation, features, and where the head is.

    Training and validation sentences are 80 and 20 % of the dev file, test sentences are from the
    test file. A sentence has the pieces of MiniLM between ``[CLS]`` and ``[SEP]``. Labels are at
    the first piece of each word.

    length: of a sentence in pieces; longer ones are cut.
    test: the number of test sentences, drawn once for all seeds; None: all.
    """
    source = "from Universal Dependencies' English EWT"
    paths = [located(folder, FILES[part], "ud_ewt", source) for part in ("dev", "test")]
    dev, tested = (path.read_text(encoding="utf-8") for path in paths)
    return dataset(dev, tested, minilm.pieces(), length, test)


def dataset(
    dev: str, test: str, pieces: Callable[[str], list[int]], length: int, tests: int | None = None
) -> Dataset:
    """Return the data set of the contents of two CoNLL-U files."""
    if length < 3:
        raise ValueError(f"length: expected at least 3 pieces; got {length}")
    known, tested = shuffled(sentences(dev)), shuffled(sentences(test))
    cut = round(VALIDATION_SHARE * len(known))
    parts = {"train": known[cut:], "validation": known[:cut], "test": tested[:tests]}
    classes = {
        task: numbered((w.labels[task] for s in parts["train"] for w in s), FEWEST.get(task, 1))
        for task in TASKS
    }
    splits = {part: split(chosen, classes, pieces, length) for part, chosen in parts.items()}
    return Dataset(tuple(Task.of(t, "tokens", count(classes[t])) for t in TASKS), splits)


def sentences(text: str) -> Iterator[Sentence]:
    """Yield the sentences' words; tokens of several words and words left out have no labels."""
    for block in text.split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if line and line[0] != "#"]
        # "1-2" is a token of two words, "1.1" a word that was left out.
        words = [word_of(row) for row in rows if row[0].isdigit()]
        if words:
            yield words


def word_of(row: list[str]) -> Word:
    number, form, _, upos, _, feats, head, deprel = row[:8]
    away = max(-FARTHEST, min(FARTHEST, int(head) - int(number)))
    where = "root" if head == "0" else f"{away:+d}"
    return Word(form, {"upos": upos, "deprel": deprel, "feats": feats, "head": where})


def shuffled(found: Iterable[Sentence]) -> list[Sentence]:
    """Return them in an order that is the same in every run: the files are sorted by genre."""
    found = list(found)
    generator = torch.Generator().manual_seed(stream(0, "ud_ewt"))
    return [found[k] for k in torch.randperm(len(found), generator=generator).tolist()]


def numbered(labels: Iterable[str], fewest: int) -> dict[str, int]:
    """Return the class of each label; those with fewer words than `fewest` share the last one."""
    counts = Counter(labels)
    common = sorted(label for label, times in counts.items() if times >= fewest)
    classes = {label: k for k, label in enumerate(common)}
    return {label: classes.get(label, len(common)) for label in counts}


def count(classes: dict[str, int]) -> int:
    return max(classes.values()) + 1


def split(
    chosen: list[Sentence],
    classes: dict[str, dict[str, int]],
    pieces: Callable[[str], list[int]],
    length: int,
) -> Split:
    """Return pieces ``(n, length)`` and classes of the same shape, by task.

    A label that no training word has gets a class beyond those of the output: it is never right.
    """
    inputs: list[list[int]] = []
    targets: dict[str, list[list[int]]] = {task: [] for task in TASKS}
    unseen = {task: count(classes[task]) for task in TASKS}
    for sentence in chosen:
        ids, places = cut(sentence, pieces, length)
        inputs.append(ids)
        for task in TASKS:
            row = [UNLABELLED] * length
            for place, word in zip(places, sentence, strict=False):  # words at the end are cut
                row[place] = classes[task].get(word.labels[task], unseen[task])
            targets[task].append(row)
    tensors = {task: torch.tensor(rows) for task, rows in targets.items()}
    return by_length(Split(torch.tensor(inputs), tensors))


def cut(
    sentence: Sentence, pieces: Callable[[str], list[int]], length: int
) -> tuple[list[int], list[int]]:
    """Return a sentence's pieces with padding, and the place of each word's first piece."""
    ids, places = pieces("[CLS]"), []
    for word in sentence:
        if len(ids) > length - 2:
            break
        places.append(len(ids))
        # A word of control characters only has no piece of its own.
        ids = ids + (pieces(word.form) or pieces("[UNK]"))
    ids = ids[: length - 1] + pieces("[SEP]")
    return ids + [minilm.PADDING] * (length - len(ids)), places


def by_length(split: Split) -> Split:
    """Return the short sentences first: an evaluation's batches then have little padding."""
    order = lengths(split.inputs).argsort(stable=True)
    return Split(split.inputs[order], {task: t[order] for task, t in split.targets.items()})


def lengths(inputs: Tensor) -> Tensor:
    return (inputs != minilm.PADDING).sum(1)
