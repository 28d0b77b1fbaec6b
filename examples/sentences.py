"""Data and encoders of finetune_minilm.py: sentences with several labels each.

The code needs the folder `benchmarks` for real sentences, not for artificial ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel

from repmtl_kernels.integrations.transformers import token_cross_entropy

# At the end of the path, so that the installed package is found before the sources, which may have
# no compiled library.
sys.path.append(str(Path(__file__).parents[1]))

UNLABELLED = -100
Samples = list[dict[str, Tensor]]


class Task(NamedTuple):
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[np.ndarray, np.ndarray], float]


class Corpus(NamedTuple):
    tasks: dict[str, Task]
    train: Samples
    test: Samples
    encoder: Callable[[], nn.Module]


def collate(samples: Samples) -> dict[str, Tensor]:
    """Return a batch in which short sentences are filled up, with an attention mask."""
    filler = {"input_ids": 0, "token_type_ids": 0}
    batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if first.ndim:
            batch[name] = pad_sequence(values, True, filler.get(name, UNLABELLED))
        else:
            batch[name] = torch.stack(values)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    known = labels != UNLABELLED
    return float((logits.argmax(-1) == labels)[known].mean())


def correlation(predictions: np.ndarray, targets: np.ndarray) -> float:
    return float(np.corrcoef(predictions[:, 0], targets)[0, 1])


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(prediction.squeeze(1), target)


def artificial(folder: None = None) -> Corpus:
    """Return sentences of random words; the tasks are quotient and remainder of a word's number."""
    words, divisor = 60, 5
    generator = torch.Generator().manual_seed(0)

    def sentence() -> dict[str, Tensor]:
        length = int(torch.randint(5, 13, (), generator=generator))
        ids = torch.randint(1, words, (length,), generator=generator)
        return {"input_ids": ids, "quotient": ids // divisor, "remainder": ids % divisor}

    config = BertConfig(
        vocab_size=words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
    )
    tasks = {
        "quotient": Task(words // divisor, token_cross_entropy, accuracy),
        "remainder": Task(divisor, token_cross_entropy, accuracy),
    }
    train, test = ([sentence() for _ in range(count)] for count in (1024, 256))
    return Corpus(tasks, train, test, lambda: BertModel(config, False))


def ud_ewt(folder: Path) -> Corpus:
    """Return English EWT: part of speech, relation, features and distance of the head, by word."""
    from benchmarks.minilm import minilm
    from benchmarks.quality import tasks, treebank

    data = treebank.ud_ewt(folder, length=32, test=400)
    outputs = {task: count_of(data.splits["train"].targets[task]) for task in data.names}

    def samples(part: str) -> Samples:
        split = data.splits[part]
        rows = []
        for i, ids in enumerate(split.inputs):
            there = ids != 0
            row = {"input_ids": ids[there]}
            for task, targets in split.targets.items():
                labels = targets[i][there].long()
                # Nor is there a label where no training word has that one.
                unknown = (labels == tasks.UNLABELLED) | (labels >= outputs[task])
                row[task] = labels.masked_fill(unknown, UNLABELLED)
            rows.append(row)
        return rows

    of_words = {t: Task(n, token_cross_entropy, accuracy) for t, n in outputs.items()}
    return Corpus(of_words, samples("train"), samples("test"), lambda: minilm(32).bert)


def count_of(labels: Tensor) -> int:
    return int(labels.max()) + 1


def sick(folder: Path) -> Corpus:
    """Return SICK: how related two sentences are, and whether one follows from the other."""
    from benchmarks.minilm import minilm, pieces

    cut = pieces()
    judgments = {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}

    def samples(name: str) -> Samples:
        text = (folder / "text" / "sick2014" / name).read_text(encoding="utf-8")
        rows = []
        for line in text.splitlines()[1:]:
            _, first, second, score, judgment = line.split("\t")[:5]
            first, second = ([*cut(sentence), *cut("[SEP]")] for sentence in (first, second))
            first = [*cut("[CLS]"), *first]
            rows.append(
                {
                    "input_ids": torch.tensor([*first, *second]),
                    "token_type_ids": torch.tensor([0] * len(first) + [1] * len(second)),
                    "relatedness": torch.tensor((float(score) - 1) / 4),
                    "entailment": torch.tensor(judgments[judgment]),
                }
            )
        return rows

    of_pairs = {
        "relatedness": Task(1, squares, correlation),
        "entailment": Task(3, nn.functional.cross_entropy, accuracy),
    }
    train, test = samples("SICK_train.txt"), samples("SICK_test_annotated.txt")
    return Corpus(of_pairs, train, test[:400], lambda: Pooled(minilm(128).bert))


class Pooled(nn.Module):
    """The mean of an encoder's tokens, ``(B, C)``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert, self.config = bert, bert.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        z = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        there = attention_mask[..., None]
        return (z * there).sum(1) / there.sum(1)


CORPORA = {"artificial": artificial, "ud_ewt": ud_ewt, "sick": sick}
