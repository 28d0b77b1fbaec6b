"""One training run: from settings to metrics, resumable at any checkpoint."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality import loaders, methods
from benchmarks.quality.config import Run
from benchmarks.quality.data import Dataset, Split, stream
from benchmarks.quality.networks import Network, build
from benchmarks.quality.pretraining import pretrained

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
EVALUATION_BATCH = 64


def prepare(run: Run, folder: Path | None) -> Dataset:
    """The data set that a run trains on."""
    data = loaders.load(folder=folder, seed=run.seed, **run.settings["data"])
    data = data.with_fraction(run.settings["training"]["label_fraction"], run.seed)
    return data if run.task is None else data.only(run.task)


class Trainer:
    """A run in progress."""

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        encoder: dict[str, Tensor] | None,
        device: str = "cpu",
    ) -> None:
        self.run, self.dataset, self.device = run, dataset, device
        self.settings = run.settings["training"]
        self.network = build(dataset, run.seed, **run.settings["network"])
        if encoder is not None:
            self.network.encoder.load_state_dict(encoder)
        self.network.to(device)
        self.method = methods.make(
            run.method, run.options, tasks=len(dataset.tasks), steps=self.settings["steps"]
        )
        self.optimizer = optimizer(self.network, self.settings)
        self.size = dataset.batch_size(self.settings["batch"])
        self.step = 0
        self.history: list[dict] = []
        self.evaluations: list[dict] = []
        self.seconds = 0.0
        # Dropout's, the only random numbers that a step draws from the global generator.
        torch.manual_seed(stream(run.seed, "training"))

    def train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        batch, present = self.dataset.batch(self.step, self.size, self.run.seed)
        if self.settings["flip"]:
            batch = flipped(self.dataset, batch, stream(self.run.seed, "flip", self.step))
        z = self.encode(batch)
        losses = self.losses(batch, present, z)
        self.optimizer.zero_grad()
        self.method.backward(losses, z, self.network, present)
        if self.settings["clip"]:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings["clip"])
        self.optimizer.step()
        if self.step % self.settings["log_every"] == 0:
            values = {f"loss_{t}": loss.detach() for t, loss in losses.items() if loss is not None}
            values |= self.method.values()
            self.history.append({"step": self.step, **{k: float(v) for k, v in values.items()}})
        self.step += 1

    def encode(self, batch: Split):
        """The representation; in multi-input learning one per task."""
        if self.dataset.multi_input:
            return {
                task: self.network.encoder(self.dataset.prepared(batch.of(task).to(self.device)))
                for task in self.dataset.names
            }
        inputs = batch.of(self.dataset.names[0]).to(self.device)
        return self.network.encoder(self.dataset.prepared(inputs))

    def losses(self, batch: Split, present: dict[str, Tensor], z) -> methods.Losses:
        found: methods.Losses = {}
        with self.method.heads_context():
            for task in self.dataset.tasks:
                target = batch.targets[task.name].to(self.device)
                if not present[task.name].any():
                    found[task.name] = None
                    continue
                mine = z[task.name] if isinstance(z, dict) else z
                output = self.network.head(task.name, mine, target.shape[-2:])
                found[task.name] = task.kind.loss(output, target)
        return found

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, dict[str, float]]:
        """Metrics of each task."""
        self.network.eval()
        found = {}
        for task in self.dataset.tasks:
            pairs = []
            for inputs, target in self.dataset.chunks(split, task.name, EVALUATION_BATCH):
                z = self.network.encoder(self.dataset.prepared(inputs.to(self.device)))
                output = self.network.head(task.name, z, target.shape[-2:])
                pairs.append((output, target.to(self.device)))
            found[task.name] = task.kind.evaluate(pairs)
        self.network.train()
        return found

    def state(self) -> dict:
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state(),
            "random": torch.get_rng_state(),
            "history": self.history,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        for name in ("step", "history", "evaluations", "seconds"):
            setattr(self, name, state[name])
        if self.step:
            self.method.load_state(state["method"])


def optimizer(network: nn.Module, settings: dict) -> torch.optim.Optimizer:
    if settings["optimizer"] not in OPTIMIZERS:
        raise ValueError(
            f"training.optimizer: expected one of {', '.join(OPTIMIZERS)}; got "
            f"{settings['optimizer']!r}"
        )
    kind = OPTIMIZERS[settings["optimizer"]]
    return kind(network.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])


def learning_rate(settings: dict, step: int) -> float:
    """Halved at each of these shares of the steps."""
    halvings = sum(step >= share * settings["steps"] for share in settings["halve_at"])
    return settings["lr"] * 0.5**halvings


def flipped(dataset: Dataset, batch: Split, seed: int) -> Split:
    """Half of the samples mirrored left to right; a normal's x changes its sign."""
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
    run: Run,
    folder: Path | None,
    work: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 0,
    tensorboard: bool = False,
    spectra: bool = False,
    keep_network: bool = False,
    stop_at: int | None = None,
) -> dict | None:
    """The record of a run: from its file where it is done, else by training from its checkpoint.

    spectra: with the exponents of the weights' spectra; keep_network: with the weights in a file.
    stop_at: a step to stop at after its checkpoint, as an interruption would; then returns None.
    """
    done, weights = work / f"{run.key}.json", weights_file(run, work)
    if done.exists() and (weights.exists() or not keep_network):
        record = json.loads(done.read_text())
        if "spectra" in record or not spectra:
            return record
    dataset = prepare(run, folder)
    trainer = Trainer(run, dataset, start_of(run, folder, work, device), device)
    checkpoint = work / f"{run.key}.pt"
    if checkpoint.exists():
        trainer.load_state(torch.load(checkpoint, weights_only=False))
    steps = run.settings["training"]["steps"]
    every = max(1, steps // max(1, run.settings["training"]["evaluations"]))
    before, used = trainer.seconds, time.process_time()
    while trainer.step < steps:
        trainer.train_step()
        if trainer.step % every == 0 or trainer.step == steps:
            splits = [s for s in ("validation", "test") if s in dataset.splits]
            found = {split: trainer.evaluate(split) for split in splits}
            trainer.evaluations.append({"step": trainer.step, **found})
        trainer.seconds = before + time.process_time() - used
        stop = trainer.step == stop_at
        if stop or (checkpoint_every and trainer.step % checkpoint_every == 0):
            write(checkpoint, lambda path: torch.save(trainer.state(), path))
        if stop:
            return None
    record = {
        "key": run.key,
        "run": str(run),
        "cpu_seconds": round(trainer.seconds, 2),
        "history": trainer.history,
        "evaluations": trainer.evaluations,
    }
    if spectra:
        from benchmarks.quality.spectra import exponents

        record["spectra"] = exponents(trainer.network)
    if tensorboard:
        log_to_tensorboard(record, work / "tensorboard" / str(run).replace(": ", "/"))
    if keep_network:
        write(weights, lambda path: torch.save(trainer.network.state_dict(), path))
    write(done, lambda path: path.write_text(json.dumps(record)))
    checkpoint.unlink(missing_ok=True)
    return record


def weights_file(run: Run, work: Path) -> Path:
    return work / f"{run.key}.network.pt"


def trained(run: Run, dataset: Dataset, work: Path) -> Network:
    """The network of a finished run that kept it."""
    network = build(dataset, run.seed, **run.settings["network"])
    state = torch.load(weights_file(run, work), weights_only=True, map_location="cpu")
    network.load_state_dict(state)
    return network


def start_of(
    run: Run, folder: Path | None, work: Path, device: str = "cpu"
) -> dict[str, Tensor] | None:
    """The encoder's weights that the run starts from; None: its own random ones."""
    init = run.settings["training"]["init"]
    if init and run.pretraining_key:
        raise ValueError("training.init: expected none beside pretraining, got both")
    if init:
        return torch.load(init, weights_only=True, map_location="cpu")
    if run.pretraining_key is None:
        return None
    path = work / f"{run.pretraining_key}.encoder.pt"
    if not path.exists():
        data = loaders.load(folder=folder, seed=run.seed, **run.settings["data"])
        weights = pretrained(data, run.settings, run.seed, device)
        write(path, lambda path: torch.save(weights, path))
    return torch.load(path, weights_only=True, map_location="cpu")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """All or nothing: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    save(partial)
    partial.replace(path)


def log_to_tensorboard(record: dict, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for entry in record["history"]:
            for name, value in entry.items():
                if name != "step":
                    writer.add_scalar(f"training/{name}", value, entry["step"])
        for entry in record["evaluations"]:
            for split in (s for s in entry if s != "step"):
                for task, values in entry[split].items():
                    for name, value in values.items():
                        writer.add_scalar(f"{split}/{task}/{name}", value, entry["step"])
