"""Training with Hugging Face's Trainer and PEFT, against the same steps written out."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers import PreTrainedModel, Trainer
from transformers_model import (
    TASKS,
    TIGHT,
    Sentences,
    assert_same_parameters,
    base_of,
    encoder,
    losses_of,
    model,
    steps_written_out,
    trainer_of,
    with_lora,
)

from repmtl_kernels import RepMTL, SaliencyMonitor
from repmtl_kernels.integrations.transformers import (
    RepMTLModel,
    RepMTLTrainer,
)

# The library's advice does not matter here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("lora", [None, "inside", "outside"])
def test_train_takes_the_steps_of_a_plain_loop(tmp_path, accumulate, every, lora):
    """With three batches a step, the last step has the fourth batch alone."""
    network = with_lora(model(every=every), lora)
    expected = steps_written_out(network, Sentences().batches(), accumulate=accumulate, epochs=2)
    before = copy.deepcopy(network)
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 2}
    trainer_of(network, tmp_path, **options).train()
    assert_same_parameters(network, expected)
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), network.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {n for n, p in before.named_parameters() if p.requires_grad}
    if lora:
        assert all("lora" in name or "heads" in name for name in changed)


def test_samples_without_a_label(tmp_path):
    """A token task lacks all of a sentence's tags, another one its class."""
    data = Sentences()
    data.columns["tag"][[1, 6]] = -100
    data.columns["kind"][[1, 2, 9]] = -100
    network = model()
    expected = steps_written_out(network, data.batches())
    trainer_of(network, tmp_path, data=data).train()
    assert_same_parameters(network, expected)


@pytest.mark.parametrize("lora", [None, "inside", "outside"])
@pytest.mark.parametrize("restore", [False, True])
def test_a_checkpoint_resumes_the_criterion(tmp_path, lora, restore):
    """Four batches an epoch: with every=3, a new count would regularise other steps."""
    options = {
        "save_strategy": "epoch",
        "num_train_epochs": 2,
        "restore_callback_states_from_checkpoint": restore,
    }

    def made():
        monitor = SaliencyMonitor(every=3)
        return with_lora(model(every=3, strength=0.1, clip=2.0, monitor=monitor), lora)

    once, resumed = made(), made()
    trainer_of(once, tmp_path, **options).train()
    state = base_of(once).criterion.get_extra_state()
    assert state[0] == 8
    trainer = trainer_of(resumed, tmp_path / "again", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert_same_parameters(resumed, once)
    torch.testing.assert_close(trainer.criterion.get_extra_state(), state, **TIGHT)
    kept = json.loads((tmp_path / "again/checkpoint-8/trainer_state.json").read_text())
    numbers = kept["stateful_callbacks"]["RepMTLState"]["attributes"]["numbers"]
    torch.testing.assert_close(numbers, state.tolist())
    seen, expected = (base_of(n).criterion.monitor.summary() for n in (resumed, once))
    assert seen.history.steps.tolist() == expected.history.steps.tolist() == [0, 3, 6]
    torch.testing.assert_close(seen.cosine, expected.cosine, **TIGHT)


def test_a_checkpoint_from_before_the_criterion(tmp_path):
    class Plain(Trainer):
        label_names = None

    network = model(every=3)
    trainer = trainer_of(
        network,
        tmp_path,
        trainer=Plain,
        save_strategy="epoch",
        label_names=[*TASKS],
        remove_unused_columns=False,
    )
    trainer.train()
    path = tmp_path / "checkpoint-4"
    assert "RepMTLState" not in (path / "trainer_state.json").read_text()
    trainer = trainer_of(model(every=3), tmp_path, save_strategy="epoch", num_train_epochs=2)
    trainer.train(resume_from_checkpoint=str(path))
    # The count of four is in the weights of the whole model.
    assert trainer.criterion.get_extra_state()[0] == 8


def test_a_second_training_begins_with_step_0(tmp_path):
    network = model(every=2, monitor=SaliencyMonitor(every=1))
    trainer = trainer_of(network, tmp_path, max_steps=1)
    trainer.train()
    trainer.train()
    assert trainer.criterion.get_extra_state()[0] == 2
    assert trainer.criterion.monitor.summary().history.steps.tolist() == [0, 1]


def test_models_that_the_trainer_makes(tmp_path):
    """Each training has a new one, whose criterion begins anew."""
    made = []

    def make():
        made.append(model(every=2))
        return made[-1]

    trainer = trainer_of(None, tmp_path, others={"model_init": make}, max_steps=3)
    for _ in range(2):
        trainer.train()
        assert trainer.criterion is made[-1].criterion
        assert trainer.criterion.get_extra_state()[0] == 3
    expected = steps_written_out(model(every=2), Sentences().batches()[:3])
    assert_same_parameters(made[-1], expected)


def test_evaluation(tmp_path):
    """It has no graph, does not count, and gives predictions and labels by task."""
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        right = prediction.predictions["kind"].argmax(1) == prediction.label_ids["kind"]
        return {"kind": right.mean()}

    network, data = model(), Sentences()
    trainer = trainer_of(network, tmp_path, others={"compute_metrics": metrics}, max_steps=1)
    first = trainer.evaluate()
    network.eval()
    z = network.encoder(
        data.columns["input_ids"], attention_mask=data.columns["attention_mask"]
    ).last_hidden_state
    for task in TASKS:
        expected = network.heads[task](z).detach()
        torch.testing.assert_close(torch.from_numpy(seen[0].predictions[task]), expected, **TIGHT)
        np.testing.assert_array_equal(seen[0].label_ids[task], data.columns[task])
    sums = []
    for batch in data.batches():
        z = network.encoder(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        sums.append(sum(loss.item() for loss in losses_of(network, z, batch).values()))
    assert first["eval_loss"] == pytest.approx(np.mean(sums))
    assert 0 <= first["eval_kind"] <= 1
    assert trainer.criterion.get_extra_state()[0] == 0
    assert not trainer.criterion.last.total.requires_grad
    trainer.train()
    trainer.evaluate()
    assert trainer.criterion.get_extra_state()[0] == 1
    # Without labels there are predictions alone.
    inputs = [{n: s[n] for n in ("input_ids", "attention_mask")} for s in data]
    done = trainer.predict(inputs)
    assert done.label_ids is None
    assert {t: p.shape for t, p in done.predictions.items()} == {
        t: p.shape for t, p in seen[0].predictions.items()
    }


@pytest.mark.parametrize("lora", [None, "outside"])
def test_bfloat16(tmp_path, lora):
    data = Sentences(dtype=torch.float32)
    network = with_lora(model(), lora).float()
    expected = steps_written_out(network, data.batches(), autocast=torch.bfloat16, sgd=True)
    exact = steps_written_out(network, data.batches(), sgd=True)
    trainer = trainer_of(network, tmp_path, data=data, bf16=True, optim="sgd")
    trainer.train()
    assert trainer.criterion.last.applied
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert_same_parameters(network, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_same_parameters(network, exact, rtol=1e-5, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_scaler_of_accelerate(tmp_path):
    network = model().float()
    data = Sentences(dtype=torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    expected = steps_written_out(network, data.batches(), scaler=scalers[0], sgd=True)
    seen = []

    class Seeing(RepMTL):
        def forward(self, *args, **kwargs):
            seen.append(self.scaler)
            return super().forward(*args, **kwargs)

    network.criterion = Seeing(0.9, 0.7, channel_dim=-1)
    trainer = trainer_of(network, tmp_path, data=data, optim="sgd")
    trainer.accelerator.scaler = scalers[1]
    trainer.train()
    assert all(s is scalers[1] for s in seen) and len(seen) == 4
    assert network.criterion.scaler is None
    assert_same_parameters(network, expected, rtol=1e-5, atol=1e-6)
    network.criterion.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="criterion: expected scaler=None"):
        trainer.train()


def test_what_is_logged(tmp_path):
    network = model(every=2)
    steps = []

    class Keep(RepMTLTrainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            if self.model.training:
                steps.append(self.criterion.last)
            return result

    # The batches of an evaluation between two steps are no part of it.
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(network, tmp_path, trainer=Keep, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and len(steps) == 4
    for entry, of_step in zip(logs, (steps[:2], steps[2:]), strict=True):
        for task in TASKS:
            mean = np.mean([step.losses[task].item() for step in of_step])
            assert entry[f"loss_{task}"] == pytest.approx(mean, rel=1e-6)
        assert entry["loss"] == pytest.approx(
            np.mean([step.total.item() for step in of_step]), rel=1e-6
        )
    assert all(step.applied for step in steps[:2])
    assert not any(step.applied for step in steps[2:])
    assert logs[0]["tsr"] == pytest.approx(np.mean([s.tsr.item() for s in steps[:2]]), rel=1e-6)
    assert logs[0]["csa"] == pytest.approx(np.mean([s.csa.item() for s in steps[:2]]), rel=1e-6)
    assert logs[0]["ratio"] == pytest.approx(steps[1].ratio.item())
    assert not {"tsr", "csa", "ratio"} & logs[1].keys()


class Own(PreTrainedModel):
    """A model of a user, with a label that has the library's own name."""

    _supports_sdpa = True

    def __init__(self, config, network):
        super().__init__(config)
        self.network = network

    def forward(self, input_ids, attention_mask, labels=None, score=None, step=None, **others):
        network = self.network
        z = network.encoder(input_ids, attention_mask).last_hidden_state
        batch = {"tag": labels, "score": score}
        losses = losses_of(network, z, batch)
        loss = network.criterion(losses, z, positions=attention_mask.bool(), step=step)
        return {"loss": loss}


def test_a_model_of_ones_own(tmp_path):
    """Its forward takes keywords, and would be asked to count the labels of a whole step."""
    network = model(every=2)
    data = Sentences()
    data.columns["labels"] = data.columns.pop("tag")
    data.columns.pop("kind")
    own = Own(network.encoder.config, network)
    expected = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.0)
    for step in range(2):
        for batch in data.batches()[2 * step : 2 * step + 2]:
            mask = batch["attention_mask"]
            z = expected.encoder(batch["input_ids"], mask).last_hidden_state
            losses = losses_of(expected, z, {**batch, "tag": batch["labels"]})
            (expected.criterion(losses, z, positions=mask.bool(), step=step) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer_of(own, tmp_path, data=data, gradient_accumulation_steps=2).train()
    assert_same_parameters(network, expected)


@pytest.mark.parametrize("lora", [None, "outside"])
def test_activation_checkpointing_of_the_encoder(tmp_path, lora):
    network = with_lora(model(), lora)
    expected = steps_written_out(network, Sentences().batches())
    trainer_of(network, tmp_path, activation_checkpointing=True).train()
    assert base_of(network).encoder.is_activation_checkpointing
    assert_same_parameters(network, expected)


@pytest.mark.slow
def test_a_compiled_model(tmp_path):
    network = model(every=2)
    expected = steps_written_out(network, Sentences().batches())
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer_of(network, tmp_path, **options).train()
    assert_same_parameters(network, expected)


def test_errors_of_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="model: expected one RepMTL among its modules, got 0"):
        trainer_of(WithoutCriterion(), tmp_path)
    with pytest.raises(ValueError, match="model: expected a forward with a parameter step"):
        trainer_of(encoder(), tmp_path)
    with pytest.raises(ValueError, match="args: expected label_smoothing_factor=0"):
        trainer_of(model(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func: expected None"):
        trainer_of(model(), tmp_path, others={"compute_loss_func": lambda *_: None})
    with pytest.raises(ValueError, match="has not called it"):
        trainer_of(NotCalling(), tmp_path, remove_unused_columns=False).train()

    class Anything(nn.Module):
        def forward(self, **inputs):
            return torch.zeros(1)

    network = RepMTLModel(Anything(), {"a": nn.Identity()}, {"a": nn.MSELoss()})
    with pytest.raises(ValueError, match="args: expected remove_unused_columns=False"):
        trainer_of(network, tmp_path).train()


class WithoutCriterion(nn.Module):
    def forward(self, step=None):
        pass


class NotCalling(nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion, self.linear = RepMTL(), nn.Linear(2, 1)

    def forward(self, step=None, **batch):
        return {"loss": self.linear(torch.zeros(2)).sum()}
