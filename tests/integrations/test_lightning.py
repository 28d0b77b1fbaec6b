"""Training with Lightning, against the same steps written out."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning import Callback
from lightning_module import (
    TASKS,
    Module,
    PartlyLabelled,
    Scenes,
    assert_same_parameters,
    fit,
    loader,
    module,
    steps_written_out,
)
from summaries import assert_same
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from repmtl_kernels import RepMTL, SaliencyMonitor, convert_second_order
from repmtl_kernels.integrations.lightning import RepMTLModule

# Lightning gives advice on loaders and loggers, which does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_fit_takes_the_steps_of_a_plain_loop(tmp_path, accumulate, every):
    model = module(every=every)
    before = copy.deepcopy(model)
    expected = steps_written_out(model, loader(), accumulate=accumulate)
    fit(model, tmp_path, accumulate_grad_batches=accumulate)
    assert_same_parameters(model, expected)
    moved = (model.encoder[0].weight - before.encoder[0].weight.double()).norm()
    assert moved > 1e-2


def test_what_is_logged(tmp_path):
    seen = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append((dict(trainer.callback_metrics), module.criterion.last))

    model = module(every=2)
    trainer = fit(model, tmp_path, callbacks=[Keep()])
    for (metrics, last), applied in zip(seen, (True, False, True, False), strict=True):
        assert last.applied is applied
        torch.testing.assert_close(metrics["train/loss"], last.total)
        for t in TASKS:
            torch.testing.assert_close(metrics[f"train/loss/{t}"], last.losses[t])
        if applied:
            torch.testing.assert_close(metrics["train/tsr"], last.tsr)
            torch.testing.assert_close(metrics["train/csa"], last.csa)
            torch.testing.assert_close(metrics["train/ratio"], last.ratio)
            assert metrics["train/ratio"] > 0
    # Validation logs the plain losses, averaged over the loader.
    model.double()
    with torch.no_grad():
        predictions = model(Scenes().x)
        a = (predictions["a"] - Scenes().y["a"]).square().mean()
        b = (predictions["b"] - Scenes().y["b"]).abs().mean()
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["val/loss/a"], a)
    torch.testing.assert_close(logged["val/loss/b"], b)
    torch.testing.assert_close(logged["val/loss"], a + b)


def test_a_checkpoint_resumes_the_criterion(tmp_path):
    """An epoch has four steps: with every=3, a new count would regularise other steps."""
    # They are float64 from the start: Lightning loads the checkpoint before it converts them.
    uninterrupted, first, resumed = (module(every=3).double() for _ in range(3))
    fit(uninterrupted, tmp_path, max_epochs=2)
    fit(first, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    fit(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert_same_parameters(resumed, uninterrupted)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_monitor_sees_the_steps_of_a_plain_loop(tmp_path, accumulate):
    """Some observations are of batches with the regulariser, and validation has none."""
    model = module(every=2, monitor=SaliencyMonitor(every=3))
    batches = [*loader(), *loader()]
    expected = steps_written_out(model, batches, accumulate=accumulate)
    fit(model, tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    summary = model.criterion.monitor.summary()
    assert summary.history.steps.tolist() == [0, 3, 6] and summary.tasks == TASKS
    assert_same(summary, expected.criterion.monitor.summary(), 1e-9)


def test_a_checkpoint_has_the_monitor(tmp_path):
    whole, first, resumed = (module(monitor=SaliencyMonitor(every=3)).double() for _ in range(3))
    fit(whole, tmp_path, max_epochs=2)
    fit(first, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    fit(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    summary = resumed.criterion.monitor.summary()
    assert summary.history.steps.tolist() == [0, 3, 6]
    assert_same(summary, whole.criterion.monitor.summary(), 1e-9)


def test_bfloat16_mixed(tmp_path):
    model, batches = module(), loader(torch.float32)
    expected = steps_written_out(model, batches, autocast=True)
    exact = steps_written_out(model, batches)
    fit(model, tmp_path, batches=batches, precision="bf16-mixed")
    assert model.encoder[0].weight.dtype == torch.float32
    assert_same_parameters(model, expected)
    with pytest.raises(AssertionError):
        assert_same_parameters(model, exact)


def test_absent_tasks(tmp_path):
    x, y = Scenes().x, Scenes().y
    batches = [
        (x[:4], {"a": y["a"][:4], "b": None}),
        (x[4:8], {"b": y["b"][4:8]}),
        (x[8:12], {t: v[8:12] for t, v in y.items()}),
    ]
    model = module()
    expected = steps_written_out(model, batches)
    fit(model, tmp_path, batches=DataLoader(batches, batch_size=None))
    assert_same_parameters(model, expected)


def test_samples_without_a_label(tmp_path):
    """Their targets are NaN. The second batch has no label of b, the third has all of a."""
    batches = list(DataLoader(PartlyLabelled(), batch_size=4))
    batches[2][2].pop("a")
    batches[2][1]["a"] = batches[2][1]["a"].nan_to_num()
    batches[3][2]["a"] = None
    batches[3][1]["a"] = batches[3][1]["a"].nan_to_num()
    model = module()
    expected = [(x, y, {t: m for t, m in p.items() if m is not None}) for x, y, p in batches]
    expected = steps_written_out(model, expected)
    fit(model, tmp_path, batches=DataLoader(batches, batch_size=None))
    assert_same_parameters(model, expected)


def test_a_step_that_has_not_called_the_criterion(tmp_path):
    class Pretrained(Module):
        def training_step(self, batch, batch_idx):
            return self(batch[0])["a"].square().mean()

        def validation_step(self, batch, batch_idx):
            pass

    model = Pretrained(nn.Conv2d(3, 6, 1), {"a": nn.Conv2d(6, 2, 1)}, {"a": nn.MSELoss()})
    fit(model, tmp_path)
    assert model.criterion.last is None


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, z):
        return checkpoint(self.body, z, use_reentrant=False)

    def body(self, z):
        return self.last(nn.functional.relu(self.norm(self.first(z))))


def test_heads_that_use_checkpointing(tmp_path):
    torch.manual_seed(1)
    model = Module(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()),
        {t: convert_second_order(Checkpointed()) for t in TASKS},
        {"a": nn.MSELoss(), "b": nn.functional.l1_loss},
        # Without a floor, positions with almost no saliency amplify rounding errors.
        RepMTL(0.9, 0.7, tsr_floor=0.1),
        second_order=False,
    )
    expected = steps_written_out(model, loader())
    fit(model, tmp_path)
    assert_same_parameters(model, expected)
    model.second_order = True
    expected = steps_written_out(model, loader())
    with pytest.warns(UserWarning, match="a checkpointed function within the context"):
        fit(model, tmp_path)
    assert_same_parameters(model, expected)


def test_heads_and_losses_are_of_the_same_tasks():
    with pytest.raises(ValueError, match="losses: expected the tasks of heads, .'a'.; got .'b'"):
        RepMTLModule(nn.Identity(), {"a": nn.Identity()}, {"b": nn.MSELoss()})
