"""Sentences with labels for each word, from a small file written here."""

from __future__ import annotations

import pytest
import torch

from benchmarks.minilm import PADDING
from benchmarks.quality import treebank
from benchmarks.quality.data import Dataset
from benchmarks.quality.tasks import UNLABELLED, Task

PIECES = {"[CLS]": [2], "[SEP]": [3], "[UNK]": [1], "\x02": []}
# "1-2" is one token of two words, and "4.1" a word that was left out.
CONTRACTED = """\
# text = don't go up there
1-2	don't	_	_	_	_	_	_	_	_
1	do	do	AUX	VBP	Mood=Ind	3	aux	_	_
2	n't	not	PART	RB	_	3	advmod	_	_
3	go	go	VERB	VB	Mood=Ind	0	root	_	_
4	upwards	up	ADV	RB	_	3	advmod	_	_
4.1	gone	go	VERB	VBN	_	_	_	_	_
5	there	there	ADV	RB	_	3	advmod	_	_
"""
SHORT = "1	hi	hi	INTJ	UH	_	0	discourse	_	_\n"


def pieces(word: str) -> list[int]:
    """Three letters are a piece."""
    if word in PIECES:
        return PIECES[word]
    return [10 + len(word[k : k + 3]) for k in range(0, len(word), 3)]


def load(train: str = CONTRACTED, test: str = CONTRACTED, length: int = 12, **options) -> Dataset:
    """Return the data set of so many equal sentences that each part has some."""
    dev = "\n".join([train] * 5) + "\n"
    return treebank.dataset(dev, test + "\n", pieces, length, **options)


def labels(data: Dataset, task: str, part: str = "test", sentence: int = 0) -> list[int]:
    return data.splits[part].targets[task][sentence].tolist()


def test_words_are_those_with_labels():
    (words,) = treebank.sentences(CONTRACTED)
    assert [w.form for w in words] == ["do", "n't", "go", "upwards", "there"]
    assert [w.labels["head"] for w in words] == ["+2", "+1", "root", "-1", "-2"]
    assert words[0].labels == {"upos": "AUX", "deprel": "aux", "feats": "Mood=Ind", "head": "+2"}


def test_labels_are_at_the_first_piece_of_each_word():
    data = load()
    found = data.splits["test"].inputs[0].tolist()
    assert found == [2, 12, 13, 12, 13, 13, 11, 13, 12, 3, PADDING, PADDING]
    no = UNLABELLED
    # ADV 0, AUX 1, PART 2, VERB 3.
    assert labels(data, "upos") == [no, 1, 2, 3, 0, no, no, 0, no, no, no, no]
    assert labels(data, "deprel") == [no, 1, 0, 2, 0, no, no, 0, no, no, no, no]
    assert {t.name: t.kind.classes for t in data.tasks} == {
        "upos": 4, "deprel": 3, "feats": 2, "head": 5
    }  # fmt: skip


@pytest.mark.parametrize(("length", "words"), [(12, 5), (9, 5), (8, 4), (7, 4), (4, 2), (3, 1)])
def test_long_sentences_are_cut_and_end_as_others_do(length, words):
    data = load(length=length)
    ids = data.splits["test"].inputs[0]
    assert ids.shape == (length,) and ids[0] == 2 and ids[ids != PADDING][-1] == 3
    for task in treebank.TASKS:
        assert sum(label != UNLABELLED for label in labels(data, task)) == words


def test_classes_are_those_of_the_training_part_and_others_are_never_right():
    unseen = CONTRACTED.replace("AUX", "X").replace("\t3\taux", "\t3\taux:pass")
    data = load(test=unseen)
    for task in ("upos", "deprel"):
        kind = next(t.kind for t in data.tasks if t.name == task)
        target = data.splits["test"].targets[task]
        assert target[0, 1] == kind.classes, "beyond those of the output"
        # All words that can be right are right.
        best = torch.nn.functional.one_hot(target.clamp(0, kind.classes - 1), kind.classes)
        assert kind.evaluate([(best.float(), target)]) == {"accuracy": pytest.approx(80)}


def test_rare_features_are_one_class():
    common = {f"common {k}": k for k in range(2)}
    found = treebank.numbered([*list(common) * 5, "rare 1", *["rare 2"] * 4], 5)
    assert found == {**common, "rare 1": 2, "rare 2": 2} and treebank.count(found) == 3
    assert treebank.numbered(["b", "a"], 1) == {"a": 0, "b": 1}


def test_a_far_head_counts_as_ten_words_away():
    row = "30	a	a	X	X	_	3	dep	_	_".split("\t")
    assert treebank.word_of(row).labels["head"] == "-10"
    assert treebank.word_of([*row[:6], "40", *row[7:]]).labels["head"] == "+10"


def test_a_word_without_pieces_is_unknown():
    data = load(CONTRACTED.replace("go\tgo", "\x02\tgo"), SHORT.replace("hi\thi", "\x02\thi"))
    assert data.splits["test"].inputs[0].tolist() == [2, 1, 3] + [PADDING] * 9


def test_parts_share_no_sentence_and_are_the_same_in_every_run():
    def numbers(word: str) -> list[int]:
        return PIECES.get(word) or [100 + int(word)] * (1 + int(word) % 5)

    text = "\n".join(SHORT.replace("hi", f"{k}", 1) for k in range(20))
    data, again = (treebank.dataset(text, text, numbers, 12, tests=7) for _ in range(2))
    found = {part: s.inputs[:, 1].tolist() for part, s in data.splits.items()}
    assert {part: len(ids) for part, ids in found.items()} == {
        "train": 16, "validation": 4, "test": 7
    }  # fmt: skip
    assert sorted(found["train"] + found["validation"]) == list(range(100, 120))
    assert all(torch.equal(again.splits[p].inputs, s.inputs) for p, s in data.splits.items())
    for split in data.splits.values():
        assert treebank.lengths(split.inputs).diff().min() >= 0, "short sentences are first"


def test_numbers_of_pieces_stay_integers_and_padding_has_no_position():
    data = load()
    batch = data.batch(0, 2, 0)
    assert data.prepared(batch.inputs) is batch.inputs and data.channel_dim == -1
    assert torch.equal(data.positions(batch.inputs), batch.inputs != PADDING)
    assert data.only("feats").of_tokens


def test_the_loss_is_the_mean_over_labelled_tokens():
    kind = Task.of("upos", "tokens", 3).kind
    output, targets = torch.randn(2, 4, 3), torch.tensor([[0, -1, 2, -1], [-1, -1, 1, -1]])
    there = targets != UNLABELLED
    expected = torch.nn.functional.cross_entropy(output[there], targets[there])
    torch.testing.assert_close(kind.loss(output, targets), expected)


def test_a_length_without_room_is_an_error():
    with pytest.raises(ValueError, match="length: expected at least 3 pieces; got 2"):
        load(length=2)
