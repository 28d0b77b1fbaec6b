"""One training run: from settings to metrics."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import Model
from benchmarks.quality import loaders, methods
from benchmarks.quality.config import Run
from benchmarks.quality.data import Dataset, Split, stream
from benchmarks.quality.pretraining import build, pretrained

EVALUATION_BATCH = 64


def prepare(run: Run, folder: Path | None) -> Dataset:
    """Return the data set that a run trains on."""
    data = loaders.load(folder=folder, seed=run.seed, **run.settings["data"])
    data = data.with_fraction(run.settings["training"]["label_fraction"], run.seed)
    return data if run.task is None else data.only(run.task)


class Trainer:
    """A run in progress."""

    def __init__(
        self, run: Run, dataset: Dataset, encoder: dict[str, Tensor] | None, device: str = "cpu"
    ) -> None:
        self.run, self.dataset, self.device = run, dataset, device
        self.settings = run.settings["training"]
        self.network = build(dataset, run.seed, **run.settings["network"])
        if encoder is not None:
            self.network.encoder.load_state_dict(encoder)
        self.network.to(device)
        self.method = methods.make(
            run.method, run.options, len(dataset.tasks), self.settings["steps"]
        )
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=self.settings["lr"],
            weight_decay=self.settings["weight_decay"],
        )
        self.size = dataset.batch_size(self.settings["batch"])
        self.history: list[dict] = []
        # Dropout's, the only random numbers that a step draws from the global generator.
        torch.manual_seed(stream(run.seed, "training"))

    def train_step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step)
        batch = self.dataset.batch(step, self.size, self.run.seed)
        if self.settings["flip"]:
            batch = flipped(self.dataset, batch, stream(self.run.seed, "flip", step))
        z = self.encode(batch)
        losses = self.losses(batch, z)
        self.optimizer.zero_grad()
        self.method.backward(losses, z, self.network)
        self.optimizer.step()
        if step % self.settings["log_every"] == 0:
            values = {k: float(v) for k, v in self.method.values().items()}
            self.history.append({"step": step, **values})

    def encode(self, batch: Split) -> methods.Representation:
        """Return the representation; in multi-input learning one for each task."""
        data = self.dataset

        def one(task: str) -> Tensor:
            return self.network.encoder(data.prepared(batch.of(task).to(self.device)))

        return {task: one(task) for task in data.names} if data.multi_input else one(data.names[0])

    def losses(self, batch: Split, z: methods.Representation) -> methods.Losses:
        losses = {}
        with self.method.heads_context():
            for task in self.dataset.tasks:
                target = batch.targets[task.name].to(self.device)
                mine = z[task.name] if isinstance(z, dict) else z
                output = self.network.head(task.name, mine, target.shape[-2:])
                losses[task.name] = task.kind.loss(output, target)
        return losses

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, dict[str, float]]:
        """Return the metrics of each task."""
        self.network.eval()
        metrics = {}
        for task in self.dataset.tasks:
            pairs = []
            for inputs, target in self.dataset.chunks(split, task.name, EVALUATION_BATCH):
                z = self.network.encoder(self.dataset.prepared(inputs.to(self.device)))
                output = self.network.head(task.name, z, target.shape[-2:])
                pairs.append((output, target.to(self.device)))
            metrics[task.name] = task.kind.evaluate(pairs)
        return metrics


def learning_rate(settings: dict, step: int) -> float:
    """Return the rate, halved at each of these shares of the steps."""
    halvings = sum(step >= share * settings["steps"] for share in settings["halve_at"])
    return settings["lr"] * 0.5**halvings


def flipped(dataset: Dataset, batch: Split, seed: int) -> Split:
    """Mirror half of the samples left to right; a normal's x changes its sign."""
    if dataset.multi_input:
        inputs = {t: mirror(x, stream(seed, t)) for t, x in batch.inputs.items()}
        return Split(inputs, batch.targets)
    targets = {}
    for task in dataset.tasks:
        target = batch.targets[task.name]
        if task.kind.dense:
            x_sign = torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
            normals = target.ndim == 4 and target.shape[1] == 3
            target = mirror(target, seed, x_sign if normals else None)
        targets[task.name] = target
    return Split(mirror(batch.inputs, seed), targets)


def mirror(values: Tensor, seed: int, factor: Tensor | None = None) -> Tensor:
    chosen = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.5
    turned = values.flip(-1) if factor is None else values.flip(-1) * factor
    return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), turned, values)


def execute(
    run: Run, folder: Path | None, work: Path, *, device: str = "cpu", spectra: bool = False
) -> dict:
    """Return the record of a run: from its file where it is done, else by training.

    spectra: with the exponents of the weights' spectra.
    """
    done = work / f"{run.key}.json"
    if done.exists():
        record = json.loads(done.read_text())
        if "spectra" in record or not spectra:
            return record
    dataset = prepare(run, folder)
    began = time.process_time()
    trainer = Trainer(run, dataset, start_of(run, folder, work, device), device)
    for step in range(run.settings["training"]["steps"]):
        trainer.train_step(step)
    record = {
        "run": str(run),
        "history": trainer.history,
        "test": trainer.evaluate("test"),
        "cpu_seconds": round(time.process_time() - began, 2),
    }
    if spectra:
        record["spectra"] = exponents(trainer.network)
    write(done, lambda path: path.write_text(json.dumps(record)))
    return record


def start_of(
    run: Run, folder: Path | None, work: Path, device: str = "cpu"
) -> dict[str, Tensor] | None:
    """Return the encoder's weights that the run starts from; None: its own random ones."""
    if run.pretraining_key is None:
        return None
    path = work / f"{run.pretraining_key}.encoder.pt"
    if not path.exists():
        data = loaders.load(folder=folder, seed=run.seed, **run.settings["data"])
        weights = pretrained(data, run.settings, run.seed, device)
        write(path, lambda path: torch.save(weights, path))
    return torch.load(path, weights_only=True, map_location="cpu")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write all or nothing: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    save(partial)
    partial.replace(path)


def exponents(network: Model) -> dict[str, float | None]:
    """Return the mean power-law exponent of the encoder's layers and of each head's."""
    parts = {"encoder": network.encoder, **network.heads}
    return {name: exponent(module) for name, module in parts.items()}


def exponent(module: nn.Module) -> float | None:
    """Return the exponent of the weights' spectra as weightwatcher fits it.

    None: no layer is large enough.
    """
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    details = weightwatcher.WeightWatcher(model=module).analyze()
    if "alpha" not in details:
        return None
    alphas = [a for a in details["alpha"].tolist() if math.isfinite(a) and a > 0]
    return round(sum(alphas) / len(alphas), 4) if alphas else None
