"""One training run: from settings to metrics."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import SCALES, Model
from benchmarks.peers import Forward
from benchmarks.quality import loaders, methods
from benchmarks.quality.config import Run
from benchmarks.quality.data import Dataset, Split, stream
from benchmarks.quality.files import write
from benchmarks.quality.pretraining import build, pretrained
from repmtl_kernels import Levels

EVALUATION_BATCH = 64


def loaded(run: Run, folder: Path | None) -> Dataset:
    """Return the run's data set, with the scale of images that its encoder expects."""
    data = loaders.load(folder=folder, seed=run.seed, **run.settings["data"])
    return replace(data, fixed_scale=SCALES.get(run.settings["network"].get("encoder")))


def prepare(run: Run, folder: Path | None) -> Dataset:
    data = loaded(run, folder)
    if (split := run.settings["evaluation"]["split"]) not in data.splits:
        raise ValueError(
            f"evaluation.split: expected one of {', '.join(data.splits)}; got {split!r}"
        )
    data = data.with_fraction(run.settings["training"]["label_fraction"], run.seed)
    if run.task is None:
        return data
    return data.only(*([run.task] if isinstance(run.task, str) else run.task))


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
            run.method,
            run.options,
            len(dataset.tasks),
            self.settings["steps"],
            dataset.channel_dim,
        )
        if "cut" in run.settings["network"] and not self.method.takes_neck:
            raise ValueError(f"network.cut: expected none with {run.label}, got one")
        self.optimizer = torch.optim.Adam(
            self.groups(),
            lr=self.settings["lr"],
            weight_decay=self.settings["weight_decay"],
        )
        self.size = dataset.batch_size(self.settings["batch"])
        self.history: list[dict] = []
        # Dropout's, the only random numbers that a step draws from the global generator.
        torch.manual_seed(stream(run.seed, "training"))

    def groups(self) -> list[dict]:
        """Return what is trained; new heads may need a higher rate than a pretrained encoder."""
        network, factor = self.network, self.settings["head_lr_factor"]
        before = [*network.encoder.parameters(), *network.neck.parameters()]
        return [
            {"params": [p for p in parameters if p.requires_grad], "factor": factor}
            for parameters, factor in ((before, 1.0), (network.heads.parameters(), factor))
        ]

    def train_step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.settings, step)
        batch = self.dataset.batch(step, self.size, self.run.seed)
        if self.settings["flip"]:
            batch = flipped(batch, stream(self.run.seed, "flip", step))
        forward = self.forward(batch)
        self.optimizer.zero_grad()
        self.method.backward(forward)
        self.optimizer.step()
        if step % self.settings["log_every"] == 0:
            ratio = self.method.ratio
            self.history.append({"step": step, "ratio": None if ratio is None else float(ratio)})

    def forward(self, batch: Split) -> Forward:
        """Return losses and representations; in multi-input learning each task has its own."""
        data, network = self.dataset, self.network
        inputs = [batch.of(task) for task in (data.names if data.multi_input else data.names[:1])]
        z = [network.encoder(data.prepared(x.to(self.device))) for x in inputs]
        losses = []
        with self.method.heads_context():
            features = [network.neck(each) for each in z]
            of_tasks = features if data.multi_input else features * len(data.tasks)
            for task, mine in zip(data.tasks, of_tasks, strict=True):
                target = batch.targets[task.name].to(self.device)
                output = network.head(task.name, mine, target.shape[-2:])
                losses.append(task.kind.loss(output, target))
        if network.levels:
            z = [Levels(*both) for both in zip(z, features, strict=True)]
        heads = [network.heads[t] for t in data.names]
        return Forward(network.encoder, heads, losses, z, data.positions(inputs[0]))

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each task on the split that the study names."""
        self.network.eval()
        data, split = self.dataset, self.dataset.splits[self.run.settings["evaluation"]["split"]]
        pairs: dict[str, list] = {name: [] for name in data.names}
        # Tasks with one input in common also share its representation.
        for names in [[name] for name in data.names] if data.multi_input else [data.names]:
            parts = [split.of(names[0]), *(split.targets[name] for name in names)]
            batches = zip(*(x.split(EVALUATION_BATCH) for x in parts), strict=True)
            for inputs, *targets in batches:
                z = self.network.encoder(data.prepared(inputs.to(self.device)))
                features = self.network.neck(z)
                for name, target in zip(names, targets, strict=True):
                    output = self.network.head(name, features, target.shape[-2:])
                    pairs[name].append((output, target.to(self.device)))
        return {task.name: task.kind.evaluate(pairs[task.name]) for task in data.tasks}


def learning_rate(settings: dict, step: int) -> float:
    """Return the rate, halved at each of these shares of the steps."""
    halvings = sum(step >= share * settings["steps"] for share in settings["halve_at"])
    return settings["lr"] * 0.5**halvings


def flipped(batch: Split, seed: int) -> Split:
    """Mirror half of the samples of dense tasks left to right; a normal's x changes its sign."""
    x_sign = torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    targets = {
        task: mirror(target, seed, x_sign if target.shape[1:-2] == (3,) else None)
        for task, target in batch.targets.items()
    }
    return Split(mirror(batch.inputs, seed), targets)


def mirror(values: Tensor, seed: int, factor: Tensor | None = None) -> Tensor:
    chosen = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.5
    turned = values.flip(-1) if factor is None else values.flip(-1) * factor
    return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), turned, values)


def execute(
    run: Run, folder: Path | None, work: Path, *, device: str = "cpu", spectra: bool = False
) -> dict:
    """Return the record of a run: from its file where it is done, else by training."""
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
        "metrics": trainer.evaluate(),
        **trainer.method.findings(),
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
        data = loaded(run, folder)
        weights = pretrained(data, run.settings, run.seed, device)
        write(path, lambda path: torch.save(weights, path))
    return torch.load(path, weights_only=True, map_location="cpu")


def exponents(network: Model) -> dict[str, float | None]:
    """Return the mean power-law exponent of the encoder's layers and of each head's."""
    parts = {"encoder": nn.Sequential(network.encoder, network.neck), **network.heads}
    return {name: exponent(module) for name, module in parts.items()}


def exponent(module: nn.Module) -> float | None:
    """Return the fitted exponent of the weights' spectra; None: no layer is large enough."""
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    details = weightwatcher.WeightWatcher(model=module).analyze()
    if "alpha" not in details:
        return None
    alphas = [a for a in details["alpha"].tolist() if math.isfinite(a) and a > 0]
    return round(sum(alphas) / len(alphas), 4) if alphas else None
