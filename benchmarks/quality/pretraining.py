"""A network for a data set, and what its encoder learns before the tasks.

That is one of the tasks, rotations, or to remove noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.networks import ASPP, ENCODERS, Flat, Model, classifier
from benchmarks.quality.data import Dataset, stream

KINDS = ("task", "rotation", "denoising")
TURNS = 4


def build(
    dataset: Dataset,
    seed: int,
    *,
    encoder: str = "residual",
    head_width: int = 32,
    head_dilations: Sequence[int] = (1, 2, 3),
    **options,
) -> Model:
    """Return the network for a data set.

    The weights of the encoder and of each head depend on the seed alone: multi-task and single-task
    runs of one seed start from the same weights.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"network.encoder: expected one of {', '.join(ENCODERS)}; got {encoder!r}")
    example = dataset.prepared(dataset.splits["train"].of(dataset.names[0])[:2])
    torch.manual_seed(stream(seed, "encoder"))
    shared = ENCODERS[encoder](example.shape[1], **options)
    with torch.no_grad():
        z = shared.eval()(example)
    shared.train()
    heads = {}
    for task in dataset.tasks:
        torch.manual_seed(stream(seed, "head", task.name))
        if task.kind.dense:
            head = ASPP(z.shape[1], task.kind.channels, head_width, head_dilations, small=True)
            task.kind.centre(head.project[-1].bias, dataset.splits["train"].targets[task.name])
            heads[task.name] = head
        else:
            heads[task.name] = classifier(
                z.shape[1], task.kind.channels, width=head_width, spatial=z.ndim == 4
            )
    return Model(shared, heads)


def pretrained(
    dataset: Dataset, settings: dict, seed: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return the encoder's state after its first training, on the training inputs alone."""
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
    """Turn each image by its number of quarter turns; a rectangle keeps its largest square."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    square = images[:, :, top : top + side, left : left + side]
    return torch.stack(
        [image.rot90(int(n), (1, 2)) for image, n in zip(square, turns, strict=True)]
    )


def _denoising(head: nn.Module, network: Model, x: Tensor, noise: float) -> Tensor:
    """Return the mean squared error of the clean input, at the representation's resolution."""
    z = network.encoder(x + noise * torch.randn_like(x))
    clean = x if z.ndim == 2 else nn.functional.adaptive_avg_pool2d(x, z.shape[2:])
    return mse_loss(head(z), clean)


def _extra_head(kind: str, dataset: Dataset, network: Model) -> nn.Module:
    """Return a linear head, so that all that was learned is in the encoder."""
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
