"""A module for Lightning, its data, and its training steps written out."""

import copy

import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from repmtl_kernels import RepMTL
from repmtl_kernels.integrations.lightning import RepMTLModule

TASKS = ("a", "b")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


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
    """Every third sample has no label of a. Only the samples in ``of_b`` have a label of b."""

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
            with model.criterion.second_order():  # in 16 bits it rounds elsewhere than PyTorch
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
