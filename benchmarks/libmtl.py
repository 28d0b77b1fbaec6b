"""Rep-MTL against Nash-MTL and FairGrad as LibMTL runs them: ``python -m benchmarks.libmtl PATH``.

PATH is a checkout of LibMTL. Its weightings train the networks of the step benchmark as its Trainer
does with ``rep_grad=False``, in the settings of its own command line. Left out are what all methods
share there: loading, metrics, and the records of the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks import report, results
from benchmarks.__main__ import unclean
from benchmarks.machine import describe, slug
from benchmarks.methods import DEFAULT, EQUAL_WEIGHTING, METHODS, EqualWeighting, Work
from benchmarks.networks import NETWORKS, task_loss
from benchmarks.output import say
from benchmarks.part import Run
from benchmarks.parts import libmtl as part
from benchmarks.parts import steps
from benchmarks.phases import Unmarked

# LibMTL's weightings and torchjd, which is measured beside them, need these.
PACKAGES = ("cvxpy", "ecos", "qpsolvers", "scipy", "torchjd")
ECOS_FAILED = "Nash_MTL: its solver ECOS found no weights, and LibMTL hides why"


def imported(checkout: Path) -> None:
    """Make ``LibMTL.weighting``, ``LibMTL.architecture`` and ``LibMTL.config`` importable.

    The package itself also imports models and a Trainer, which need torchvision and
    torch_geometric. So a module without them stands in its place.

    Raises:
        ValueError: there is no LibMTL in ``checkout``.
        ModuleNotFoundError: a package is not installed.
    """
    package = checkout / "LibMTL"
    if not (package / "weighting" / "abstract_weighting.py").is_file():
        raise ValueError(
            f"path: expected a checkout of LibMTL, with LibMTL/weighting in it, got {checkout}"
        )
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}")
    stand_in = ModuleType("LibMTL")
    stand_in.__path__ = [str(package)]
    sys.modules["LibMTL"] = stand_in


def settings(weighting: str) -> dict:
    """Return the options of a weighting that LibMTL's command line has where none is given."""
    config = importlib.import_module("LibMTL.config")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        options, *_ = config.prepare_args(config.LibMTL_args.parse_args(["--weighting", weighting]))
    return options["weight_args"]


class OfLibmtl(EqualWeighting):
    """A weighting of LibMTL on the model that LibMTL makes of encoder and heads."""

    marked = False

    def __init__(self, weighting: str) -> None:
        self.weighting = weighting
        self.settings = settings(weighting)
        self.model: nn.Module | None = None
        self.gradients_of: list[Tensor] = []  # the Trainer keeps them and sets them to zero

    def gradients(self, work: Work, marks: Unmarked) -> None:
        if self.model is None:
            self.model = model(self.weighting, work)
            self.gradients_of = [torch.zeros_like(p) for p in work.model.parameters()]
        losses = self.losses(work)
        for p, gradient in zip(work.model.parameters(), self.gradients_of, strict=True):
            p.grad = gradient.zero_()
        weights = self.model.backward(losses, **self.settings)
        if self.weighting == "Nash_MTL" and (weights == 1).all():  # those it starts from
            raise RuntimeError(ECOS_FAILED)

    def losses(self, work: Work) -> Tensor:
        """Return the losses in one tensor, as the Trainer fills and stacks it."""
        losses = torch.zeros(len(work.tasks), device=work.device)
        images = work.batch.images
        with work.autocast():
            shared = self.model(images[0]) if len(images) == 1 else {}
            for t, task in enumerate(work.tasks):
                outputs = shared or self.model(images[t], task)
                losses[t] = task_loss(task, outputs[task], work.batch.labels[task])
        return torch.stack([losses]).squeeze(0)


def model(weighting: str, work: Work) -> nn.Module:
    """Return what LibMTL's Trainer makes: hard parameter sharing and the weighting in one class."""
    sharing = importlib.import_module("LibMTL.architecture").HPS
    weightings = importlib.import_module("LibMTL.weighting")
    both = type("MTLmodel", (sharing, getattr(weightings, weighting)), {})
    made = both(
        work.tasks,
        lambda: work.model.encoder,
        work.model.heads,
        rep_grad=False,
        multi_input=len(work.batch.images) > 1,
        device=work.device,
    )
    made.init_param()
    return made


def commit(checkout: Path) -> str:
    try:
        return subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=checkout, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.libmtl",
        description="Measures Rep-MTL's step against Nash-MTL's and FairGrad's of LibMTL.",
    )
    add = parser.add_argument
    add("checkout", type=Path, metavar="PATH", help="folder of a LibMTL checkout")
    add("--out", type=Path, metavar="DIR",
        help="write libmtl.json there; default: benchmarks/results/<machine>, with the tables of "
        "the documents")  # fmt: skip
    add("--seconds", type=float, metavar="N", default=300, help="about how long; default: 300")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        imported(options.checkout)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    device = torch.device(options.device)
    torch.set_num_threads(os.cpu_count() or 1)
    head = describe(device)
    notes = unclean(head)
    say("".join(f"WARNING: {note}: these times are not clean\n" for note in notes))
    folder = options.out or results.RESULTS / slug(device)
    deadline = time.monotonic() + options.seconds
    run = Run(part.PART.name, device, head, folder, deadline=deadline, notes=notes)
    measure(run, options.checkout)
    say(f"\n{part.table(results.load(folder, run.name))}")
    if options.out is None:
        report.refresh_documents()


def measure(run: Run, checkout: Path) -> None:
    """Measure the networks, each with its share of the time."""
    weightings = {name: name.removeprefix(part.PREFIX) for name in part.OF_LIBMTL}
    makers = {name: METHODS[name] for name in (EQUAL_WEIGHTING, DEFAULT)}
    makers |= {name: partial(_make, weighting) for name, weighting in weightings.items()}
    makers |= {name: METHODS[name] for name in part.OF_TORCHJD}
    of_weightings = {weighting: settings(weighting) for weighting in weightings.values()}
    run.more = {"libmtl_commit": commit(checkout), "settings": of_weightings}
    precision = steps.PRECISIONS[run.device.type][0]
    steps.measure(
        run,
        [steps.Case(network.scaled(run.device.type), precision, makers) for network in NETWORKS],
    )


def _make(weighting: str, tasks: int) -> OfLibmtl:
    return OfLibmtl(weighting)


if __name__ == "__main__":
    main()
