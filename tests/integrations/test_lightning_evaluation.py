"""Validation, test and prediction with Lightning, and the forms of its batches."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning import Callback, LightningDataModule
from lightning_module import TASKS, Module, PartlyLabelled, Scenes, fit, loader, module, trainer_of
from torch.utils.data import DataLoader

# Lightning gives advice on loaders and loggers, which does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_over_the_labelled_samples(tmp_path, stage):
    """Batches differ in size and number of labels; the mean is over samples, not over batches."""
    model, data = module().double(), PartlyLabelled()
    trainer = trainer_of(tmp_path)
    getattr(trainer, stage)(model, DataLoader(data, batch_size=5), verbose=False)
    with torch.no_grad():
        errors = {t: model(data.x)[t] - data.y[t] for t in TASKS}
    logged, prefix = trainer.callback_metrics, "val" if stage == "validate" else "test"
    a, b = (errors[t][data.present[t]] for t in TASKS)
    torch.testing.assert_close(logged[f"{prefix}/loss/a"].double(), a.square().mean())
    torch.testing.assert_close(logged[f"{prefix}/loss/b"].double(), b.abs().mean())
    assert set(logged) == {f"{prefix}/loss", f"{prefix}/loss/a", f"{prefix}/loss/b"}
    assert model.criterion.last.tsr is None, "the tasks alone"


def test_a_batch_without_any_label(tmp_path):
    x, y, _ = next(iter(DataLoader(PartlyLabelled(), batch_size=4)))
    none = DataLoader([(x, y, {t: torch.zeros(4, dtype=torch.bool) for t in TASKS})], None)
    model, trainer = module().double(), trainer_of(tmp_path)
    trainer.test(model, [none, loader()], verbose=False)
    assert {name.rpartition("_")[-1] for name in trainer.callback_metrics} == {"1"}
    with pytest.raises(ValueError, match="losses: expected the loss of at least one task"):
        fit(model, tmp_path, batches=none)


class TwoParts(nn.Module):
    """A head with a dict as its prediction."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(6, 2, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return {"pair": (self.layer(z), self.layer(-z)), "scale": self.scale}


def test_labels_are_chosen_in_structures_too(tmp_path):
    seen = []

    def loss(prediction, target):
        seen.append((prediction, target))
        first, second = prediction["pair"]
        return ((first - target["y"][0]).square() + second.square()).mean() * prediction["scale"]

    data, mask = Scenes(), torch.arange(4) % 2 == 0
    batch = data.x[:4], {"a": {"y": [data.y["a"][:4]], "name": "of all"}}, {"a": mask}
    torch.manual_seed(1)
    model = Module(nn.Conv2d(3, 6, 1), {"a": TwoParts()}, {"a": loss})
    trainer_of(tmp_path).test(model, DataLoader([batch], None), verbose=False)
    ((prediction, target),) = seen
    of_all_samples = model.double()(data.x[:4])["a"]
    for part, expected in zip(prediction["pair"], of_all_samples["pair"], strict=True):
        torch.testing.assert_close(part, expected[mask])
    assert prediction["scale"].shape == () and target["name"] == "of all"
    torch.testing.assert_close(target["y"][0], data.y["a"][:4][mask])
    flat = batch[0], {"a": {"y": [data.y["a"][0]]}}, {"a": mask}
    with pytest.raises(ValueError, match=r"targets\['a'\]: expected the batch of 4 as the first"):
        model.validation_step(flat, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x, y["a"]), TypeError, "batch: expected .inputs, targets. or .*list"),
        (lambda x, y: (x,), TypeError, "batch: expected .inputs, targets. or .*list of"),
        (lambda x, y: {"x": x, "y": y}, TypeError, "batch: expected .inputs, targets. .* got dict"),
        (lambda x, y: (x, y, torch.ones(4)), TypeError, "present.*expected a dict .*Tensor of"),
        (lambda x, y: (x, y, {"a": torch.ones(4)}), ValueError, r"\['a'\]: expected a bool Tensor"),
        (
            lambda x, y: (x, y, {"b": torch.ones(1, 4, dtype=torch.bool)}),
            ValueError,
            r"present\['b'\]: expected a bool Tensor of shape \(B,\) = \(4,\); got .*\(1, 4\)",
        ),
        (lambda x, y: (x, y, {"a": True}), ValueError, r"present\['a'\]: .*; got bool"),
        (lambda x, y: (x, y, {"c": None}), ValueError, r"tasks of \['a', 'b'\]; got \['c'\]"),
    ],
)
def test_batches_of_another_form_are_refused(tmp_path, change, error, message):
    x, y = next(iter(loader()))
    with pytest.raises(error, match=message):
        trainer_of(tmp_path).test(module(), DataLoader([change(x, y)], None), verbose=False)


def test_masks_stay_on_the_host():
    model = module()
    x, y, present = next(iter(DataLoader(PartlyLabelled(), batch_size=4)))
    for batch in ([x, y, present], (x, y, present)):
        moved = model.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert moved[0].is_meta and all(target.is_meta for target in moved[1].values())
        assert all(mask is present[t] for t, mask in moved[2].items())
        assert not isinstance(moved[2], dict), "DistributedDataParallel moves what is in a dict"
    # These forms have no masks; a subclass with its own steps may have any form.
    for batch in ([x, y], (x, y, None), {"x": x}, [x, x, x], (x, y, x), (x, y, {"weight": x})):
        moved = model.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert type(moved) is type(batch)
        assert all(v.is_meta for v in torch.utils._pytree.tree_leaves(moved) if v is not None)


def test_no_warning_beside_a_data_module(tmp_path):
    class Data(LightningDataModule):
        def test_dataloader(self):
            return loader()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*overrid")
        (logged,) = trainer_of(tmp_path).test(module(), datamodule=Data(), verbose=False)
    assert logged.keys() == {"test/loss", "test/loss/a", "test/loss/b"}


class AnyInput(nn.Module):
    """An encoder that takes a Tensor, or several in a list, tuple or dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 1)

    def forward(self, x):
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else [x]
        return self.layer(sum(parts))


def test_predict_takes_batches_and_bare_inputs(tmp_path):
    torch.manual_seed(1)
    model = Module(AnyInput(), {t: nn.Conv2d(6, 2, 1) for t in TASKS}, dict.fromkeys(TASKS))
    x, y = Scenes().x[:3], {}
    forms = {
        "inputs and targets": ((x, y), x),
        "a list of them": ([x, {"a": None}], x),
        "with masks": ((x, y, {"a": torch.zeros(3, dtype=torch.bool)}), x),
        "a Tensor": (x, x),
        "a list of one": ([x], x),
        "a pair of Tensors": ((x, -3 * x), -2 * x),
        "a list of three": ([x, x, x], 3 * x),
        "a dict": ({"left": x, "right": x}, 2 * x),
        "a dict of inputs, and targets": (({"left": x, "right": x}, y), 2 * x),
    }
    batches = DataLoader([batch for batch, _ in forms.values()], batch_size=None)
    by_batch = trainer_of(tmp_path).predict(model, batches)
    for (form, (_, inputs)), predictions in zip(forms.items(), by_batch, strict=True):
        assert predictions.keys() == set(TASKS), form
        for t in TASKS:
            expected = model.heads[t](model.encoder.layer(inputs))
            torch.testing.assert_close(predictions[t], expected, msg=form)


def test_several_loaders(tmp_path):
    model, loaders = module(), [loader(), DataLoader(Scenes(), batch_size=8)]
    trainer = trainer_of(tmp_path)
    for stage in ("validate", "test"):
        first, second = getattr(trainer, stage)(model, loaders, verbose=False)
        assert [*first.values()] == pytest.approx([*second.values()])
    assert [len(each) for each in trainer.predict(model, loaders)] == [4, 2]


def test_test_and_predict_in_bfloat16_mixed(tmp_path):
    model, trainer = module(), trainer_of(tmp_path, precision="bf16-mixed")
    batches = DataLoader(PartlyLabelled(dtype=torch.float32), batch_size=4)
    (logged,) = trainer.test(model, batches, verbose=False)
    (exact,) = trainer_of(tmp_path, precision="32-true").test(model, batches, verbose=False)
    assert logged != exact and logged == pytest.approx(exact, rel=2e-2)
    predictions = trainer.predict(model, batches)
    assert {p[t].dtype for p in predictions for t in TASKS} == {torch.bfloat16}


class KeepPredictions(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        torch.save(outputs, self.folder / f"{batch_idx}-{trainer.global_rank}")


@pytest.mark.slow
@pytest.mark.slow_cpu
def test_data_parallel(tmp_path):
    # It runs in its own process, because to fork a process with threads is not safe.
    code = f"""
import pathlib
import test_lightning_evaluation
test_lightning_evaluation.data_parallel(pathlib.Path({str(tmp_path)!r}))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def data_parallel(folder):
    """Rank 1 gets the odd samples. They have no label of b, so only rank 0 has losses of b."""
    model, data = module().double(), PartlyLabelled(of_b=(0, 2, 8, 14))
    with torch.no_grad():
        predictions = model(data.x)
    a, b = ((predictions[t] - data.y[t])[data.present[t]] for t in TASKS)
    ddp = {"devices": 2, "strategy": "ddp_fork", "callbacks": [KeepPredictions(folder)]}
    trainer, batches = trainer_of(folder, **ddp), DataLoader(data, batch_size=4)
    (logged,) = trainer.test(model, batches, verbose=False)
    assert logged["test/loss/a"] == pytest.approx(a.square().mean().item(), rel=1e-6)
    assert logged["test/loss/b"] == pytest.approx(b.abs().mean().item(), rel=1e-6)
    trainer.predict(model, batches, return_predictions=False)
    for rank in (0, 1):
        for i in (0, 1):
            samples = torch.arange(16)[rank::2][4 * i : 4 * i + 4]
            saved = torch.load(folder / f"{i}-{rank}")
            for t in TASKS:
                torch.testing.assert_close(saved[t], predictions[t][samples])
