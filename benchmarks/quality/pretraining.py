"""A network for a data set, and an encoder that learns to undo rotations before the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.networks import ASPP, ENCODERS, Flat, Model, classifier, token_classifier
from benchmarks.quality.data import Dataset, stream

TURNS = 4


def build(
    dataset: Dataset,
    seed: int,
    *,
    encoder: str = "residual",
    head_width: int = 32,
    head_dilations: Sequence[int] = (1, 2, 3),
    cut: int | None = None,
    levels: bool = False,
    **options,
) -> Model:
    """Return the network; its first weights depend on the seed alone, task by task.

    cut: the representation is the output of so many of the encoder's layers, and the other layers
        are the neck; None: of all. levels: the neck's output is a level of the representation too.
    """
    example = dataset.prepared(dataset.splits["train"].of(dataset.names[0])[:2])
    torch.manual_seed(stream(seed, "encoder"))
    shared = ENCODERS[encoder](example.shape[1], **options)
    if cut is not None and not 0 < cut < len(shared):
        raise ValueError(f"network.cut: expected 1 to {len(shared) - 1}; got {cut}")
    if levels and cut is None:
        raise ValueError("network.levels: expected false without network.cut; got true")
    with torch.no_grad():
        z = shared.eval()(example)
    shared.train()
    heads, neck = {}, None
    for task in dataset.tasks:
        torch.manual_seed(stream(seed, "head", task.name))
        if task.kind.dense:
            head = ASPP(z.shape[1], task.kind.channels, head_width, head_dilations, small=True)
            task.kind.centre(head.project[-1].bias, dataset.splits["train"].targets[task.name])
            heads[task.name] = head
        elif dataset.of_tokens:
            heads[task.name] = token_classifier(z.shape[-1], task.kind.channels, width=head_width)
        else:
            heads[task.name] = classifier(
                z.shape[1], task.kind.channels, width=head_width, spatial=z.ndim == 4
            )
    if cut is not None:
        shared, neck = shared[:cut], shared[cut:]
    return Model(shared, heads, neck, levels)


def pretrained(
    dataset: Dataset, settings: dict, seed: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return the encoder's state after it learned by how many quarter turns images were rotated.

    The head is linear, so that all that was learned is in the encoder.
    """
    how = settings["pretraining"]
    if how["kind"] != "rotation":
        raise ValueError(f"pretraining.kind: expected rotation; got {how['kind']!r}")
    encoder = build(dataset, seed, **settings["network"]).encoder
    images = dataset.prepared(dataset.splits["train"].inputs[:2])
    with torch.no_grad():
        channels = encoder.eval()(images).shape[1]
    torch.manual_seed(stream(seed, "pretraining"))
    network = nn.Sequential(encoder.train(), Flat(), nn.Linear(channels, TURNS)).to(device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=how["lr"], weight_decay=how["weight_decay"]
    )
    size = dataset.batch_size(how["batch"])
    for step in range(how["steps"]):
        batch = dataset.batch(step, size, stream(seed, "pretraining"))
        x = dataset.prepared(batch.inputs.to(device))
        turns = torch.randint(TURNS, (len(x),))
        loss = cross_entropy(network(rotated(x, turns)), turns.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.state_dict()


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each image by its number of quarter turns; a rectangle keeps its largest square."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    square = images[:, :, top : top + side, left : left + side]
    return torch.stack(
        [image.rot90(int(n), (1, 2)) for image, n in zip(square, turns, strict=True)]
    )
