"""Pictures of task saliencies: ``python -m benchmarks.quality.saliency STUDY``. See ``--help``.

Two methods of a study train from the same weights on the same batches. The picture has some test
images, and beside each of them where the gradient of each task's loss at the shared representation
is large, for both methods.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.machine import slug
from benchmarks.output import say
from benchmarks.quality import config, loaders
from benchmarks.quality.__main__ import WORK
from benchmarks.quality.config import Run
from benchmarks.quality.training import Trainer, prepare, start_of
from repmtl_kernels import task_saliencies
from repmtl_kernels._monitor import map_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = 4
DPI = 110
NAME_WIDTH = 24  # letters in a line


class Maps(NamedTuple):
    """The saliencies of test images under one method.

    maps: by task, ``(n, H, W)``, from 0 to 1 at the largest value of each map.
    size: height and width of the representation, which they were upsampled from.
    """

    maps: dict[str, Tensor]
    size: tuple[int, int]


def chosen_runs(study: config.Study, dataset: str, methods: Sequence[str], seed: int) -> list[Run]:
    """Return the runs of the methods with this seed.

    Raises:
        ValueError: the study has no such data set or method, or a method trains single tasks.
    """
    labels = [m["label"] for m in study.methods if m["method"] != config.SINGLE]
    for what, value, known in (
        ("dataset", dataset, list(study.datasets)),
        *(("methods", method, labels) for method in methods),
    ):
        if value not in known:
            raise ValueError(f"{what}: expected one of {', '.join(known)}; got {value!r}")
    by_label = {m["label"]: m for m in study.methods}
    return [
        Run(dataset, label, m["family"], m["method"], m["options"], seed, None,
            study.datasets[dataset])
        for label, m in ((label, by_label[label]) for label in methods)
    ]  # fmt: skip


def trained(run: Run, folder: Path | None, work: Path, device: str = "cpu") -> Trainer:
    """Return the trainer of a run at its end."""
    trainer = Trainer(run, prepare(run, folder), start_of(run, folder, work, device), device)
    for step in range(run.settings["training"]["steps"]):
        trainer.train_step(step)
    return trainer


def labelled(trainer: Trainer, count: int) -> Tensor:
    """Return the rows of test images with a label in every task, evenly over the split.

    Raises:
        ValueError: the tasks don't share their images, e.g. since inputs are texts, or these have
            fewer than ``count`` rows.
    """
    data = trainer.dataset
    if data.multi_input or data.of_tokens:
        raise ValueError("dataset: expected one whose tasks share their images")
    test = data.splits["test"]
    valid = [task.kind.valid(test.targets[task.name]) for task in data.tasks]
    there = torch.stack([of_task.reshape(len(of_task), -1).any(1) for of_task in valid])
    rows = there.all(0).nonzero().flatten()
    if len(rows) < count:
        raise ValueError(f"images: expected at most {len(rows)}, got {count}")
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def maps(trainer: Trainer, rows: Tensor) -> Maps:
    """Return the saliencies of these test images, averaged over channels, in evaluation mode."""
    data = trainer.dataset
    batch = data.splits["test"].take(dict.fromkeys(data.names, rows))
    trainer.network.eval()
    forward = trainer.forward(batch)
    (z,) = forward.representations
    found = {}
    for task, saliency in zip(data.names, task_saliencies(forward.losses, z), strict=True):
        found[task] = map_grid.relative_maps(saliency, batch.inputs.shape[-2:])
    return Maps(found, tuple(z.shape[2:]))


def figure(images: Tensor, of_methods: dict[str, Maps], caption: str) -> Figure:
    """Return the images ``(n, C, H, W)``, C is 1 or 3, and beside each its maps, task by task."""
    groups = {
        task: [
            map_grid.Column(textwrap.fill(method, NAME_WIDTH), found.maps[task])
            for method, found in of_methods.items()
        ]
        for task in next(iter(of_methods.values())).maps
    }
    return map_grid.draw(images, groups, images_are="test image", caption=caption)


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG with 256 colours, a quarter as large as one with all."""
    from PIL import Image

    with io.BytesIO() as file:
        drawn.savefig(file, dpi=DPI, bbox_inches="tight", pad_inches=0.05)
        # The colours of the images count as much as those of the maps, which cover more.
        few = Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.saliency",
        description="Draws the task saliencies of test images after training by two methods.",
    )
    add = parser.add_argument
    add("study", metavar="STUDY",
        help="a TOML file, or the name of one in benchmarks/quality/configs")  # fmt: skip
    add(
        "--dataset", required=True, metavar="NAME", help="one of the study's, as its tables name it"
    )
    add("--methods", required=True, nargs=2, metavar="NAME", help="two of the study's, as above")
    add("--seed", type=int, help="default: the study's first")
    add("--images", type=int, default=IMAGES, help=f"how many; default: {IMAGES}")
    add("--data", type=Path, metavar="DIR",
        help=f"folder of the data sets; default: ${loaders.FOLDER_VARIABLE}")  # fmt: skip
    add("--out", type=Path, metavar="DIR",
        help="folder of the picture; default: benchmarks/results/<machine>")  # fmt: skip
    add("--work", type=Path, metavar="DIR", default=WORK,
        help="folder of encoders that were trained before; default: build/quality")  # fmt: skip
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    torch.set_num_threads(1)
    study = config.study(config.find(options.study))
    seed = study.seeds[0] if options.seed is None else options.seed
    folder = loaders.data_folder(options.data)
    of_methods, images = {}, None
    for run in chosen_runs(study, options.dataset, options.methods, seed):
        say(f"training {run}")
        trainer = trained(run, folder, options.work)
        rows = labelled(trainer, options.images)
        images = trainer.dataset.splits["test"].inputs[rows]
        of_methods[run.label] = maps(trainer, rows)
    height, width = of_methods[run.label].size
    caption = (
        "Maps: |dL/dZ| of the task's loss L at the shared representation Z, the mean over "
        f"channels, upsampled from {height} x {width}.\nBright is where a change of Z changes the "
        "loss most, black is where it changes nothing; each map has its own scale.\n"
        f"{run.dataset}, {run.settings['training']['steps']} steps, seed {seed}."
    )
    out = options.out or results.RESULTS / slug(torch.device("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"quality_{study.name}_saliency_{run.settings['data']['name']}.png"
    save(figure(images, of_methods, caption), path)
    say(f"picture: {path}")


if __name__ == "__main__":
    main()
