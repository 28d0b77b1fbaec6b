"""``python -m benchmarks.quality STUDY...``: trains what the studies list. See ``--help``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks import ceilings, results
from benchmarks.machine import ROOT, describe, slug
from benchmarks.quality import config, loaders, pictures
from benchmarks.quality.studies import run_study

WORK = ROOT / "build" / "quality"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Trains what the studies list, several seeds each, and compares the methods.",
    )
    add = parser.add_argument
    add("studies", nargs="+", metavar="STUDY",
        help="a TOML file, or the name of one in benchmarks/quality/configs")  # fmt: skip
    add("--seeds", type=int, nargs="+", help="instead of the study's")
    add_places(parser)
    return parser.parse_args(words)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options for where the data are, where runs train, and where results go."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR",
        help=f"folder of the data sets; default: ${loaders.FOLDER_VARIABLE}")  # fmt: skip
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--out", type=Path, metavar="DIR",
        help="folder of results and pictures; default: benchmarks/results/<machine>")  # fmt: skip
    add("--work", type=Path, metavar="DIR", default=WORK,
        help="folder of finished runs, which are not trained again; empty it after a change of the "
        "code. Default: build/quality")  # fmt: skip


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    for name in options.studies:
        study = config.study(config.find(name), options.seeds)
        out = options.out or results.RESULTS / slug(device)
        folder = loaders.data_folder(options.data)
        where = {"folder": folder, "work": options.work, "device": options.device}
        run_study(study, describe(device, ceilings.of(device)), out, jobs=options.jobs, **where)
        pictures.draw(out, f"quality_{study.name}")


if __name__ == "__main__":
    main()
