"""Training with Hugging Face's Trainer on two processes, against one process with all samples."""

import copy
import os
import tempfile

import pytest
import ranks
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers_model import (
    LOSSES,
    TASKS,
    Sentences,
    assert_same_parameters,
    base_of,
    losses_of,
    model,
    trainer_of,
    with_lora,
)

from repmtl_kernels import RepMTL

pytestmark = [ranks.needs_gloo, pytest.mark.slow]


def whole_batches(network, data, accumulate):
    """Return the network after the same steps of one process, whose batches are those of both."""
    network = copy.deepcopy(network).train()
    base = base_of(network)
    criterion, applied = RepMTL(0.9, 0.7, channel_dim=-1, every=2), []
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    for number, batch in enumerate(data.batches(8)):
        mask = batch["attention_mask"]
        z = base.encoder(batch["input_ids"], attention_mask=mask).last_hidden_state
        losses = losses_of(base, z, batch)
        # The mean over the ranks of the means over their own labelled tokens.
        halves = [
            LOSSES["tag"](base.heads["tag"](part), tags)
            for part, tags in zip(z.split(4), batch["tag"].split(4), strict=True)
        ]
        losses["tag"] = sum(halves) / 2
        step = number // accumulate
        (criterion(losses, z, positions=mask == 1, step=step) / accumulate).backward()
        if criterion.last.applied:
            applied.append(criterion.last)
        if number % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return network, applied


def check_training(rank):
    # Accelerate asks for an address, though the group exists already.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", **address)
    for lora, accumulate in ((None, 2), ("outside", 1)):
        network = with_lora(model(every=2, group="world"), lora)
        data = Sentences(count=32)
        expected, applied = whole_batches(network, data, accumulate)
        with tempfile.TemporaryDirectory() as folder:
            options = {"gradient_accumulation_steps": accumulate, "ddp_backend": "gloo"}
            trainer = trainer_of(network, folder, data=data, **options)
            trainer.train()
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            evaluated = trainer.evaluate()
        assert trainer.args.world_size == 2
        assert_same_parameters(network, expected)
        assert len(logs) == 4 // accumulate
        assert {f"loss_{task}" for task in TASKS} | {"tsr", "csa"} <= logs[0].keys()
        if accumulate == 1:  # the last step with the regulariser is the third
            assert abs(logs[2]["csa"] - applied[-1].csa.item()) < 1e-6
        assert evaluated["eval_loss"] > 0


CHECKS = ranks.checks_in(globals())


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_on_two_ranks(name, outcomes):
    ranks.assert_passed(name, outcomes)
