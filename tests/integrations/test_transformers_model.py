"""The model of several heads for Hugging Face's Trainer, against its steps written out."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers_model import (
    LOSSES,
    TIGHT,
    Sentences,
    base_of,
    encoder,
    losses_of,
    model,
    total_of,
    with_lora,
)

from repmtl_kernels import Levels, RepMTL, reference
from repmtl_kernels.integrations.transformers import (
    RepMTLModel,
    _labelled,
    token_cross_entropy,
)


@pytest.mark.parametrize("lora", [None, "inside", "outside"])
def test_gradients_of_one_batch(lora):
    """Frozen weights have none."""
    network = with_lora(model(), lora)
    batch = Sentences().batch(0, 6)
    total = network(step=0, **batch)["loss"]
    total.backward()
    again = copy.deepcopy(network)
    again.zero_grad()
    again.train()
    expected = total_of(base_of(again), batch, criterion=RepMTL(0.9, 0.7, channel_dim=-1))
    expected.backward()
    torch.testing.assert_close(total, expected, **TIGHT)
    for (name, p), q in zip(network.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is not None) == p.requires_grad, name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **TIGHT)


def test_the_total_is_equation_10():
    """The losses of the paper as printed, of sentences without padding."""
    batch = Sentences().batch(0, 4)
    shortest = int(batch["attention_mask"].sum(1).min())
    batch = {n: v[:, :shortest] if v.ndim == 2 else v for n, v in batch.items()}
    network = model()
    z = network.encoder(batch["input_ids"]).last_hidden_state
    losses = [*losses_of(network, z, batch).values()]
    saliencies = torch.stack(
        [torch.autograd.grad(loss, z, create_graph=True)[0] for loss in losses]
    )
    saliencies = saliencies.transpose(-1, -2)  # (T, B, C, N)
    expected = sum(losses) + 0.9 * reference.tsr_loss(saliencies)
    expected = expected + 0.7 * reference.csa_loss(saliencies)
    torch.testing.assert_close(network(**batch)["loss"], expected, **TIGHT)


def test_padding_does_not_count():
    """More of it leaves the total and its gradients as they are."""
    torch.manual_seed(3)
    heads = {"tag": nn.Linear(12, 5), "other": nn.Linear(12, 5)}
    network = RepMTLModel(encoder(), heads, dict.fromkeys(heads, token_cross_entropy)).double()
    results = []
    for wider in (0, 4):
        batch = Sentences(wider=wider).batch(0, 6)
        batch = {n: batch[n] for n in ("input_ids", "attention_mask", "tag")}
        batch["other"] = batch["tag"].where(batch["tag"] < 2, -100)
        total = network(step=0, **batch)["loss"]
        assert network.criterion.last.applied
        results.append((total, torch.autograd.grad(total, [*heads["tag"].parameters()])))
    torch.testing.assert_close(results[0], results[1], **TIGHT)


def test_absent_tasks():
    """A batch without the column of a task, and one whose only tags are unknown."""
    network = model()
    batch = Sentences().batch(0, 4)
    total = network(**{**batch, "kind": None})["loss"]
    torch.testing.assert_close(total, total_of(network, {**batch, "kind": None}), **TIGHT)
    del batch["score"]
    torch.testing.assert_close(network(**batch)["loss"], total_of(network, batch), **TIGHT)
    batch["tag"] = torch.full_like(batch["tag"], -100)
    total = network(**batch)["loss"]
    assert network.criterion.last.losses["tag"] == 0
    assert total.isfinite()


class TwoLevels(nn.Module):
    """Levels of which none is made from the other: attention has no second derivative."""

    def __init__(self):
        super().__init__()
        self.bert, self.fine, self.coarse = encoder(), nn.Linear(12, 8), nn.Linear(12, 6)

    def forward(self, input_ids, attention_mask):
        z = self.bert(input_ids, attention_mask).last_hidden_state
        return Levels(self.fine(z), self.coarse(z))


class OnLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(14, 5)

    def forward(self, levels):
        return self.linear(torch.cat([*levels], -1).square())


def test_levels():
    torch.manual_seed(3)
    heads = {"tag": OnLevels(), "other": OnLevels()}
    losses = dict.fromkeys(heads, token_cross_entropy)
    network = RepMTLModel(TwoLevels(), heads, losses).double()
    batch = Sentences().batch(0, 4)
    batch = {n: batch[n] for n in ("input_ids", "attention_mask", "tag")}
    batch["other"] = batch["tag"].where(batch["tag"] < 2, -100)
    total = network(**batch)["loss"]
    z = network.encoder(batch["input_ids"], batch["attention_mask"])
    mask = batch["attention_mask"].bool()
    losses = {t: token_cross_entropy(head(z), batch[t]) for t, head in heads.items()}
    expected = RepMTL(channel_dim=-1)(losses, z, positions=[mask, mask])
    torch.testing.assert_close(total, expected, **TIGHT)


def test_token_cross_entropy():
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 2, -100, 1], [-100, -100, 1, 1]])
    chosen = logits.log_softmax(-1)[labels >= 0, labels[labels >= 0]]
    torch.testing.assert_close(token_cross_entropy(logits, labels), -chosen.mean())
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x, labels), logits)
    assert token_cross_entropy(logits, torch.full_like(labels, -100)) == 0
    with pytest.raises(ValueError, match=r"labels: expected shape \(B, N\)"):
        token_cross_entropy(logits, labels[:, :3])


def test_errors_of_the_model():
    with pytest.raises(ValueError, match="losses: expected the tasks of heads, .'a'.; got .'b'"):
        RepMTLModel(nn.Identity(), {"a": nn.Identity()}, {"b": nn.MSELoss()})
    with pytest.raises(ValueError, match="heads: expected names of tasks other than 'step'"):
        RepMTLModel(nn.Identity(), {"step": nn.Identity()}, {"step": nn.MSELoss()})
    network, batch = model(), Sentences().batch(0, 4)
    network.encoder.config.return_dict = False
    with pytest.raises(TypeError, match="encoder: expected a Tensor, Levels, .* got tuple"):
        network(**batch)
    with pytest.raises(ValueError, match="criterion: expected channel_dim=-1 .* got channel_dim=1"):
        model(channel_dim=1)(**batch)

    class Shorter(nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.randn(len(input_ids), 3, 12, requires_grad=True)

    network = RepMTLModel(Shorter(), {"score": nn.Linear(12, 1)}, {"score": LOSSES["score"]})
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, N\) = \(4, 3\)"):
        network(**{n: batch[n] for n in ("input_ids", "attention_mask", "score")})
    with pytest.raises(ValueError, match="losses: expected the loss of at least one task"):
        model()(input_ids=batch["input_ids"])


def test_labels_in_any_order_of_memory():
    """Classes of pixels, the samples beside each other in memory."""
    labels = torch.full((2, 3, 4), -100).permute(2, 1, 0)
    labels[[0, 3], 1, 1] = 2
    assert _labelled([labels], 4).tolist() == [[True, False, False, True]]
