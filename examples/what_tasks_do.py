"""See what the tasks of a network do to each other: four tasks on rendered scenes, in a minute.

pip install '.[study,plot]'; PYTHONPATH=. python examples/what_tasks_do.py

It leaves report.html and three pictures in the folder build/what_tasks_do. The first run renders
the scenes, which takes two more minutes. For a first look, --quick does with a quarter of them and
half of the steps.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.quality import doom
from repmtl_kernels import (
    RepMTL,
    SaliencyMonitor,
    plot_affinity,
    plot_history,
    plot_saliency,
    task_saliencies,
)

STEPS, BATCH, CHANNELS = 300, 16, 16
OUT = Path("build") / "what_tasks_do"


def scenes(views: dict[str, np.ndarray], split: str) -> dict[str, Tensor]:
    """Return images and labels of every second pixel, 56 x 80."""
    mine = views["split"] == list(doom.SPLITS).index(split)
    image, seg, depth, normal = (
        torch.from_numpy(views[key][mine][:, ::2, ::2])
        for key in ("image", "seg", "depth", "normal")
    )
    return {
        "image": image.movedim(-1, 1) / 255,
        "segmentation": seg.long(),
        "depth": depth[:, None] / 255,
        "normals": normal.movedim(-1, 1) / 127,
    }


def head(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, outputs, 1),
        nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
    )


def losses_of(heads: nn.ModuleDict, z: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {task: branch(z) for task, branch in heads.items()}
    seen = batch["depth"] > 0  # the sky has no depth, and no normal
    normals = F.normalize(out["normals"], dim=1)
    return {
        "segmentation": F.cross_entropy(out["segmentation"], batch["segmentation"]),
        "depth": (out["depth"] - batch["depth"]).abs()[seen].mean(),
        "normals": 1 - (normals * batch["normals"]).sum(1, keepdim=True)[seen].mean(),
        "colour": F.l1_loss(out["colour"], batch["image"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the scenes")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    views = doom.load(OUT / "quarter.npz", doom.maps()[::4]) if quick else doom.load()
    train, test = scenes(views, "train"), scenes(views, "test")
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, CHANNELS, 3, padding=1),
    )
    sizes = {"segmentation": len(doom.CLASSES), "depth": 1, "normals": 3, "colour": 3}
    heads = nn.ModuleDict({task: head(outputs) for task, outputs in sizes.items()})

    # Every fourth call, where the criterion takes the saliencies anyway.
    monitor = SaliencyMonitor(every=4)
    criterion = RepMTL(monitor=monitor)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=2e-3)
    for _ in (bar := tqdm(range(STEPS // 2 if quick else STEPS), desc="training", unit="step")):
        rows = torch.randint(len(train["image"]), (BATCH,))
        batch = {key: values[rows] for key, values in train.items()}
        z = encoder(batch["image"])
        with criterion.second_order():
            losses = losses_of(heads, z, batch)
        total = criterion(losses, z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        bar.set_postfix_str(f"loss {total.item():.2f}")

    summary = monitor.summary()
    monitor.report(OUT / "report.html", title="Four tasks on rendered scenes")
    plot_affinity(summary).savefig(OUT / "affinity.png", dpi=110)
    plot_history(summary).savefig(OUT / "history.png", dpi=110)
    bright = test["image"].mean((1, 2, 3)).argsort(descending=True)
    few = {key: values[bright[:60:20]] for key, values in test.items()}
    z = encoder(few["image"])
    losses = losses_of(heads, z, few)
    saliencies = dict(zip(losses, task_saliencies(losses, z), strict=True))
    plot_saliency(few["image"], saliencies).savefig(OUT / "saliency.png", dpi=110)
    for t, task in enumerate(summary.tasks):
        with_others = ", ".join(
            f"{other} {summary.cosine[t, u]:+.2f}"
            for u, other in enumerate(summary.tasks)
            if u != t
        )
        print(f"{task}: {summary.norm_share[t]:.0%} of the length; cosine with {with_others}")
    print(f"report: {OUT / 'report.html'}")


if __name__ == "__main__":
    main()
