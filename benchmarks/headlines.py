"""Three figures for the first page of the documentation, from two result files."""

from __future__ import annotations

from pathlib import Path

from benchmarks.output import by, machine_of, on_gpu, where
from benchmarks.parts.kernels import FORWARD_BACKWARD, REFERENCE
from benchmarks.parts.steps import by_network
from benchmarks.results import load

# The shape and the network that the figures are for: the middle one of the field's benchmarks.
SHAPE = NETWORK = "cityscapes"
TITLE = "Cityscapes"


def table(folder: Path) -> str | None:
    """Return a list of three figures, None where a result file or a figure is missing."""
    losses, steps = load(folder, "kernels"), load(folder, "steps")
    if losses is None or steps is None:
        return None
    rows = where(
        losses["rows"],
        function="csa_loss",
        direction=FORWARD_BACKWARD,
        layout="contiguous",
        graph=False,
        error=None,
    )
    mine, judge = (
        by(where(rows, backend=backend), "shape")
        for backend in (losses["default_backend"], REFERENCE)
    )
    methods = by_network(steps).get(NETWORK, {})
    needed = [methods.get(name) for name in ("rep_mtl_default", "nash_mtl")]
    if SHAPE not in mine.keys() & judge.keys() or not all(needed):
        return None
    faster = {shape: judge[shape]["ms"] / mine[shape]["ms"] for shape in mine.keys() & judge.keys()}
    own, nash = (row["ratio_to_ew"] for row in needed)
    memory, before = mine[SHAPE]["peak_mb"], judge[SHAPE]["peak_mb"]
    lines = [
        f"- **{faster[SHAPE]:.3g}x** as fast: `csa_loss`, forward and backward, against the "
        f"equations as printed, at {TITLE} size; {min(faster.values()):.2g}x to "
        f"{max(faster.values()):.3g}x over {len(faster)} shapes",
        f"- **{memory:.3g} MB** of extra memory at its peak, where the equations as printed take "
        f"{before:.3g} MB",
        f"- **{own:.3g}x** the time of equal weighting: a training step with `RepMTL()` as it "
        f"comes, {TITLE} heads; Nash-MTL takes {nash:.3g}x",
    ]
    caption = f"Losses: {machine_of(losses)}. Step: {machine_of(steps)}."
    if not on_gpu(losses):
        caption += " The batches are scaled to fit a CPU."
    return "\n".join([*lines, "", f"{caption} [All measurements](benchmarks.md)"])
