"""Training with Lightning, against the same steps written out."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning import Callback, LightningDataModule, Trainer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from repmtl_kernels import RepMTL, convert_second_order
from repmtl_kernels.integrations.lightning import RepMTLModule

TASKS = ("a", "b")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
# Lightning's advice on loaders and loggers, which is not about this package.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Module(RepMTLModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def module(**options):
    torch.manual_seed(1)
    return Module(
        encoder=nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()),
        heads={
            t: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 2, 1))
            for t in TASKS
        },
        losses={"a": nn.MSELoss(), "b": nn.functional.l1_loss},
        criterion=RepMTL(**{"lambda_tsr": 0.9, "lambda_csa": 0.7, **options}),
    )


class Scenes(Dataset):
    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.x, *y = torch.randn(3, 16, 3, 5, 6, generator=generator).to(dtype)
        self.y = dict(zip(TASKS, (each[:, :2] for each in y), strict=True))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], {t: y[i] for t, y in self.y.items()}


class PartlyLabelled(Scenes):
    """Every third sample has no label of a, only the samples ``of_b`` have one of b."""

    def __init__(self, of_b=(0, 1, 8, 9, 10, 12), dtype=torch.float64):
        super().__init__(dtype)
        at = torch.arange(16)
        self.present = {"a": at % 3 > 0, "b": torch.isin(at, torch.tensor(of_b))}
        for t, mask in self.present.items():
            self.y[t][~mask] = torch.nan

    def __getitem__(self, i):
        return *super().__getitem__(i), {t: bool(mask[i]) for t, mask in self.present.items()}


def loader(dtype=torch.float64):
    return DataLoader(Scenes(dtype), batch_size=4)


def trainer_of(tmp_path, **options):
    options = {"precision": "64-true", "max_epochs": 1, "logger": False, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **options,
    )


def fit(model, tmp_path, *, batches=None, ckpt_path=None, **options):
    trainer = trainer_of(tmp_path, **options)
    batches = loader() if batches is None else batches
    trainer.fit(model, batches, val_dataloaders=batches, ckpt_path=ckpt_path)
    return trainer


def steps_written_out(model, batches, *, accumulate=1, autocast=False):
    model = copy.deepcopy(model).to(next(iter(batches))[0].dtype)
    optimizer = model.configure_optimizers()
    for i, (x, targets, *present) in enumerate(batches, 1):
        mask = {t: torch.ones(len(x), dtype=torch.bool) for t in TASKS}
        mask |= present[0] if present else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            z = model.encoder(x)
            errors = {
                t: (model.heads[t](z).type_as(x) - targets[t])[mask[t]]
                for t in TASKS
                if targets.get(t) is not None and mask[t].any()
            }
            losses = {
                t: e.square().mean() if t == "a" else e.abs().mean() for t, e in errors.items()
            }
            mask = torch.stack([mask[t] for t in losses]) if present else None
            total = model.criterion(losses, z, mask)
        (total / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same_parameters(got, expected):
    for name, p in expected.named_parameters():
        torch.testing.assert_close(dict(got.named_parameters())[name], p, **TIGHT)


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
    # Validation: the plain losses, averaged over the loader.
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
    """Four steps an epoch: with every=3, a count that starts anew regularises other steps."""
    # In float64 already: Lightning loads the checkpoint before it converts the module.
    whole, first, resumed = (module(every=3).double() for _ in range(3))
    fit(whole, tmp_path, max_epochs=2)
    fit(first, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    fit(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert_same_parameters(resumed, whole)


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
    """With NaN for targets; the second batch has no label of b, the third all of a."""
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


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_over_the_labelled_samples(tmp_path, stage):
    """Batches of unequal size and with unequally many labels: the mean over samples weighs them."""
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
    """A head whose prediction is no Tensor."""

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
    whole = model.double()(data.x[:4])["a"]
    for part, of_all in zip(prediction["pair"], whole["pair"], strict=True):
        torch.testing.assert_close(part, of_all[mask])
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
    # Forms without masks, some of them those of a subclass with steps of its own.
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
    """An encoder of a Tensor, or of two in a list, tuple or dict."""

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
    found = trainer_of(tmp_path).predict(model, batches)
    for (form, (_, inputs)), predictions in zip(forms.items(), found, strict=True):
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
    # A process of its own: to fork one that has threads is not safe.
    code = f"""
import pathlib
import test_lightning
test_lightning.data_parallel(pathlib.Path({str(tmp_path)!r}))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def data_parallel(folder):
    """Odd samples, which are those of rank 1, have no label of b: its metrics are of rank 0."""
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
            found = torch.load(folder / f"{i}-{rank}")
            for t in TASKS:
                torch.testing.assert_close(found[t], predictions[t][samples])


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
        # Without a floor, positions of almost no saliency multiply every rounding.
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
