"""Pictures of a study's results, and of the tasks' saliencies over images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.plots import STYLE
from benchmarks.progress import say
from benchmarks.quality import tables
from benchmarks.quality.data import Dataset
from benchmarks.quality.delta import Interval, interval
from benchmarks.quality.networks import Network
from benchmarks.results import load
from repmtl_kernels import task_saliencies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"


def draw(folder: Path, what: str) -> list[Path]:
    """The pictures that the rows of ``folder/what.json`` allow; returns the files."""
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed: no pictures")
        return []
    import matplotlib

    rows = load(folder, what)["rows"]
    with matplotlib.rc_context(STYLE):
        figures = {
            "delta_p": delta_figure(rows),
            "strength": strength_figure(rows),
            "ratio": ratio_figure(rows),
        }
    return [
        _save(figure, folder / f"{what}_{name}.svg")
        for name, figure in figures.items()
        if figure is not None
    ]


def delta_figure(rows: list[dict]) -> Figure | None:
    """`Delta_p` to equal weighting of every method with its interval; a panel per data set."""
    found = [line for line in tables.lines(rows) if line.to_equal is not None]
    datasets = list(dict.fromkeys(line.dataset for line in found))
    if not datasets:
        return None
    methods = list(dict.fromkeys(line.method for line in found))
    figure, panels = _panels(datasets, height=0.8 + 0.28 * len(methods))
    for axes, dataset in zip(panels, datasets, strict=True):
        here = {line.method: line.to_equal for line in found if line.dataset == dataset}
        places = [methods.index(method) for method in here]
        axes.axvline(0, color="#808080", linewidth=1)
        axes.errorbar(
            [i.mean for i in here.values()], places, xerr=_halves(here.values()), fmt="o",
            color="#4c78a8", capsize=3, markersize=4,
        )  # fmt: skip
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlabel("Δp to equal weighting, %")
    return figure


def strength_figure(rows: list[dict]) -> Figure | None:
    """`Delta_p` to equal weighting against the one number that a family's grid varies."""
    curves: dict[str, dict[str, dict[float, list[float]]]] = {}
    varied: dict[str, str] = {}
    for row in rows:
        if "delta_p_to_equal" in row:
            values = curves.setdefault(row["family"], {}).setdefault(row["dataset"], {})
            option = varied.setdefault(row["family"], _varied(rows, row["family"]))
            if option:
                x = row["settings"][option]
                values.setdefault(x, []).append(row["delta_p_to_equal"]["mean"])
    curves = {family: values for family, values in curves.items() if varied[family]}
    if not curves:
        return None
    datasets = list(dict.fromkeys(dataset for values in curves.values() for dataset in values))
    figure, panels = _panels(datasets, height=2.8)
    for axes, dataset in zip(panels, datasets, strict=True):
        axes.axhline(0, color="#808080", linewidth=1)
        for marker, (family, values) in zip(MARKERS, curves.items(), strict=False):
            points = sorted(values.get(dataset, {}).items())
            found = [interval(deltas) for _, deltas in points]
            xs = [x for x, _ in points]
            label = f"{family}, {varied[family]}"
            axes.errorbar(
                xs, [i.mean for i in found], yerr=_halves(found), fmt=f"{marker}-", capsize=3,
                label=label, markersize=4,
            )  # fmt: skip
        if all(x > 0 for values in curves.values() for x in values.get(dataset, {})):
            axes.set_xscale("log")
        axes.set_xlabel("strength")
    panels[0].set_ylabel("Δp to equal weighting, %")
    panels[0].legend(fontsize=7)
    return figure


def _varied(rows: list[dict], family: str) -> str:
    """The option, a number, whose value alone tells the settings of a family apart."""
    settings = []
    for row in rows:
        if row["family"] == family and row["settings"] not in settings:
            settings.append(row["settings"])
    options = {
        name for s in settings for name in s if any(o.get(name) != s[name] for o in settings)
    }
    if len(options) != 1:
        return ""
    (option,) = options
    values = [s.get(option) for s in settings]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return option if numbers else ""


def ratio_figure(rows: list[dict]) -> Figure | None:
    """The regulariser's gradient over the tasks', at the representation, during training."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        if any(value is not None for value in row.get("history", {}).get("ratio", [])):
            found.setdefault(row["dataset"], {}).setdefault(row["method"], []).append(
                row["history"]
            )
    if not found:
        return None
    figure, panels = _panels(list(found), height=2.8)
    for axes, methods in zip(panels, found.values(), strict=True):
        for method, histories in methods.items():
            points = []
            for k, step in enumerate(histories[0]["step"]):
                ratios = [h["ratio"][k] for h in histories if h["ratio"][k] is not None]
                points += [(step, statistics.median(ratios))] if ratios else []
            axes.plot(*zip(*points, strict=True), label=method, linewidth=1.2)
        axes.set_yscale("log")
        axes.set_xlabel("step")
    panels[0].set_ylabel("gradient ratio (median of seeds)")
    panels[0].legend(fontsize=7)
    return figure


def saliency_energy(network: Network, dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """Images ``(n, C, H, W)``, and each task's ``norm_c(dL_t/dZ)`` over them, ``(T, n, H, W)``.

    Of the first test samples; the losses are sums over samples.
    """
    if dataset.multi_input:
        raise ValueError("dataset: expected one whose tasks share their images")
    test = dataset.splits["test"]
    images = test.inputs[:count]
    network.eval()
    z = network.encoder(dataset.prepared(images)).detach().requires_grad_()
    if z.ndim != 4:
        raise ValueError(f"network: expected a representation with positions, got {z.ndim} axes")
    losses = []
    for task in dataset.tasks:
        target = test.targets[task.name][:count]
        output = network.head(task.name, z, target.shape[-2:])
        losses.append(task.kind.loss(output, target) * len(images))
    energy = [s.detach().square().sum(1, keepdim=True).sqrt() for s in task_saliencies(losses, z)]
    full = [interpolate(e, images.shape[2:], mode="bilinear").squeeze(1) for e in energy]
    return images, torch.stack(full)


def plot_saliency(
    networks: dict[str, Network], dataset: Dataset, path: Path, count: int = 3
) -> Path:
    """Saves a picture: for each image and method, each task's saliency energy over the image."""
    from matplotlib.figure import Figure

    columns = len(dataset.tasks)
    height, width = dataset.splits["test"].inputs.shape[2:]
    size = 1.6 * (1 + columns * len(networks)), 1.7 * count * height / width + 0.4
    figure = Figure(figsize=size)
    panels = figure.subplots(count, 1 + columns * len(networks), squeeze=False)
    for m, (method, network) in enumerate(networks.items()):
        images, energy = saliency_energy(network, dataset, count)
        low, high = images.float().amin(), images.float().amax()
        shown = ((images.float() - low) / (high - low)).movedim(1, -1).numpy()
        for row in range(count):
            panels[row][0].imshow(shown[row], cmap="gray")
            for t, task in enumerate(dataset.names):
                axes = panels[row][1 + m * columns + t]
                axes.imshow(shown[row], cmap="gray")
                axes.imshow(energy[t, row].numpy(), cmap="magma", alpha=0.75)
                if row == 0:
                    axes.set_title(f"{method}\n{task}", fontsize=7)
    for axes in panels.flat:
        axes.set_axis_off()
    return _save(figure, path)


def _panels(titles: list[str], height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 2.6 * len(titles), height))
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="y", labelleft=k == 0 or height < 3, labelsize=8)
    return figure, panels


def _halves(intervals: Iterable[Interval]) -> list[float]:
    return [0.0 if math.isnan(i.half) else i.half for i in intervals]


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        # SVG keeps a date unless told otherwise; PNG does not know the word.
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=metadata, bbox_inches="tight", dpi=130)
    return path
