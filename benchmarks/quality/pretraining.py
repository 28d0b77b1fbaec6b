"""What an encoder learns before the tasks: one of them, rotations, or to remove noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.quality.data import Dataset, stream
from benchmarks.quality.networks import Flat, Network, build

KINDS = ("task", "rotation", "denoising")
TURNS = 4


def pretrained(
    dataset: Dataset, settings: dict, seed: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """The encoder's state after its first training, on the training inputs alone."""
    how = settings["pretraining"]
    if how["kind"] not in KINDS:
        raise ValueError(
            f"pretraining.kind: expected one of {', '.join(KINDS)}; got {how['kind']!r}"
        )
    dataset = dataset.with_fraction(how["label_fraction"], seed)
    if how["kind"] == "task":
        dataset = dataset.only(how["task"])
    network = build(dataset, seed, **settings["network"])
    torch.manual_seed(stream(seed, "pretraining"))
    extra = None if how["kind"] == "task" else _extra_head(how["kind"], dataset, network)
    network.to(device)
    if extra is not None:
        extra.to(device)
    parameters = [*network.encoder.parameters(), *(extra or network.heads).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=how["lr"], weight_decay=how["weight_decay"])
    size = dataset.batch_size(how["batch"])
    for step in range(how["steps"]):
        batch, _ = dataset.batch(step, size, stream(seed, "pretraining"))
        if how["kind"] == "task":
            (task,) = dataset.tasks
            target = batch.targets[task.name].to(device)
            z = network.encoder(dataset.prepared(batch.of(task.name).to(device)))
            loss = task.kind.loss(network.head(task.name, z, target.shape[-2:]), target)
        else:
            inputs = [dataset.prepared(batch.of(task).to(device)) for task in dataset.names]
            x = torch.cat(inputs) if dataset.multi_input else inputs[0]
            if how["kind"] == "rotation":
                turns = torch.randint(TURNS, (len(x),))
                loss = cross_entropy(extra(network.encoder(rotated(x, turns))), turns.to(device))
            else:
                loss = _denoising(extra, network, x, how["noise"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.encoder.state_dict()


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Each image by so many quarter turns; a rectangle keeps its largest square."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    square = images[:, :, top : top + side, left : left + side]
    return torch.stack(
        [image.rot90(int(n), (1, 2)) for image, n in zip(square, turns, strict=True)]
    )


def _denoising(head: nn.Module, network: Network, x: Tensor, noise: float) -> Tensor:
    """Mean squared error of the clean input, at the representation's resolution."""
    z = network.encoder(x + noise * torch.randn_like(x))
    clean = x if z.ndim == 2 else nn.functional.adaptive_avg_pool2d(x, z.shape[2:])
    return mse_loss(head(z), clean)


def _extra_head(kind: str, dataset: Dataset, network: Network) -> nn.Module:
    """Linear, so that what was learned is in the encoder."""
    example = dataset.prepared(dataset.splits["train"].of(dataset.names[0])[:2])
    spatial = example.ndim == 4
    with torch.no_grad():
        z = network.encoder.eval()(example)
    network.encoder.train()
    if kind == "rotation":
        if not spatial:
            raise ValueError("pretraining.kind: rotation needs images, got features")
        flat = [] if z.ndim == 2 else [Flat()]
        return nn.Sequential(*flat, nn.Linear(z.shape[1], TURNS))
    if z.ndim == 2 and spatial:
        raise ValueError("pretraining.kind: denoising of images needs network.pool = false")
    if spatial:
        return nn.Conv2d(z.shape[1], example.shape[1], 1)
    return nn.Linear(z.shape[1], example.shape[1])
