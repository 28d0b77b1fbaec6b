"""A small BERT with three tasks, its sentences, and the steps of a Trainer written out."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, TrainingArguments

from repmtl_kernels import RepMTL
from repmtl_kernels.integrations.transformers import (
    RepMTLModel,
    RepMTLTrainer,
    token_cross_entropy,
)

TASKS = ("tag", "kind", "score")
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
LENGTH, WORDS, TAGS, KINDS = 7, 20, 5, 3


class First(nn.Module):
    """A head on the first token of a sentence."""

    def __init__(self, outputs):
        super().__init__()
        self.linear = nn.Linear(12, outputs)

    def forward(self, z):
        return self.linear(torch.tanh(z.mean(1) + z[:, 0]))


def squares(prediction, target):
    return (prediction.squeeze(1) - target).square().mean()


LOSSES = {"tag": token_cross_entropy, "kind": nn.functional.cross_entropy, "score": squares}


def encoder():
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def model(dtype=torch.float64, **options):
    torch.manual_seed(1)
    heads = {"tag": nn.Linear(12, TAGS), "kind": First(KINDS), "score": First(1)}
    criterion = RepMTL(**{"lambda_tsr": 0.9, "lambda_csa": 0.7, "channel_dim": -1, **options})
    return RepMTLModel(encoder(), heads, LOSSES, criterion).to(dtype)


def with_lora(network, where):
    """Return the network with adapters around its encoder ("inside") or itself ("outside")."""
    torch.manual_seed(2)
    if where == "inside":
        network.encoder = get_peft_model(network.encoder, LoraConfig(**LORA))
    elif where == "outside":
        heads = [f"heads.{task}" for task in network.heads]
        network = get_peft_model(network, LoraConfig(**LORA, modules_to_save=heads))
    network = network.double()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:  # zero in the beginning: half of all gradients would be
            nn.init.normal_(parameter, std=0.1)
    return network


class Sentences(torch.utils.data.Dataset):
    """Sentences of different lengths with padding; the tags of some words are unknown."""

    def __init__(self, count=16, wider=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)

        def draw(below, *shape):
            return torch.randint(below, shape, generator=generator)

        there = torch.arange(LENGTH) < 3 + draw(LENGTH - 2, count)[:, None]
        tag = draw(TAGS, count, LENGTH)
        tag[~there | (draw(4, count, LENGTH) == 0)] = -100
        tag[:, 1] = 1  # each sentence has a word with a tag
        pad = (0, wider)
        self.columns = {
            "input_ids": nn.functional.pad((1 + draw(WORDS - 1, count, LENGTH)) * there, pad),
            "attention_mask": nn.functional.pad(there.long(), pad),
            "tag": nn.functional.pad(tag, pad, value=-100),
            "kind": draw(KINDS, count),
            "score": torch.randn(count, generator=generator, dtype=dtype),
        }

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, i):
        return {name: values[i] for name, values in self.columns.items()}

    def batch(self, start, stop):
        return {name: values[start:stop] for name, values in self.columns.items()}

    def batches(self, size=4):
        return [self.batch(k, k + size) for k in range(0, len(self), size)]


def collate(samples):
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


def arguments(folder, **options):
    options = {
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        **options,
    }
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        **options,
    )


def trainer_of(model, folder, *, data=None, trainer=RepMTLTrainer, others=None, **options):
    data = Sentences() if data is None else data
    return trainer(
        model,
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        **(others or {}),
    )


def losses_of(network, z, batch):
    return {
        t: None if batch.get(t) is None else LOSSES[t](head(z), batch[t])
        for t, head in network.heads.items()
    }


def total_of(network, batch, step=None, criterion=None):
    """Return the criterion's total, written out."""
    mask = batch["attention_mask"]
    z = network.encoder(batch["input_ids"], attention_mask=mask).last_hidden_state
    present = torch.ones(len(TASKS), len(z), dtype=torch.bool)
    for t, row in zip(TASKS, present, strict=True):
        if batch.get(t) is not None and t != "score":
            row &= (batch[t] != -100).reshape(len(z), -1).any(1)
    criterion = criterion or network.criterion
    return criterion(losses_of(network, z, batch), z, present, positions=mask == 1, step=step)


def base_of(network):
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def steps_written_out(
    network, batches, *, accumulate=1, epochs=1, autocast=None, scaler=None, sgd=False
):
    """Return a copy of the network after these steps, AdamW's (or SGD's) as the Trainer has it."""
    network = copy.deepcopy(network).train()
    base = base_of(network)
    base.criterion.scaler = scaler
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    if sgd:
        optimizer = torch.optim.SGD(trained, lr=0.02)
    step = 0
    for _ in range(epochs):
        for first in range(0, len(batches), accumulate):
            of_step = batches[first : first + accumulate]
            for batch in of_step:
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    total = total_of(base, batch, step)
                total = total / len(of_step)
                (total if scaler is None else scaler.scale(total)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            step += 1
    return network


def assert_same_parameters(network, expected, **tolerance):
    ours, theirs = dict(network.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        options = tolerance or TIGHT
        torch.testing.assert_close(
            parameter, theirs[name], **options, msg=lambda text, name=name: f"{name}: {text}"
        )
