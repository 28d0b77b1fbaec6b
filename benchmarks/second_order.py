"""What ``second_order()`` gains: the same Rep-MTL step with and without it, in turns.

Counted in convolutions, an exact step costs a head 6 for each one of its forward where equal
weighting costs 3; the encoder costs 3 in both. So the step can't be faster than equal weighting's
plus once more that one's time in the heads; the regulariser's own time comes on top.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import rounded
from benchmarks.memory import peak_extra_bytes
from benchmarks.networks import Network
from benchmarks.progress import say, track
from benchmarks.steps import (
    EQUAL_WEIGHTING,
    PRECISIONS,
    Case,
    EqualWeighting,
    RepMTLMethod,
    Work,
    labels,
    settings,
)
from benchmarks.timing import Timing, side_by_side
from repmtl_kernels._training.strength import BETWEEN

PLAIN, FAST = "rep_mtl", "rep_mtl_second_order"
METHODS = {
    EQUAL_WEIGHTING: EqualWeighting,
    PLAIN: RepMTLMethod,
    FAST: partial(RepMTLMethod, fast=True),
}
# The same on a call that measures the ratio of the gradients.
MEASURED = {
    PLAIN: partial(RepMTLMethod, measured=True),
    FAST: partial(RepMTLMethod, fast=True, measured=True),
}
# Maps as large as NYUv2's, heads as wide as DeepLabV3's; a narrow encoder on a CPU.
NETWORK = Network(
    "aspp", {"segmentation": 13, "depth": 1, "normals": 3}, 8, 288, 384,
    dilations=(6, 12, 18), on_cpu={"batch": 2, "base": 8, "head_width": 256},
)  # fmt: skip
QUICK = {"height": 96, "width": 128}
MIN_ROUNDS, MAX_ROUNDS = 3, 30
PHASE_STEPS = 2


class Convolutions(TorchDispatchMode):
    """Counts convolutions: forward ones, gradients of inputs and gradients of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter(forward=0, input=0, weight=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.counts["forward"] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            for_input, for_weight, _ = args[-1]
            self.counts["input"] += for_input
            self.counts["weight"] += for_weight
        return func(*args, **(kwargs or {}))


def measure(device: torch.device, *, quick: bool, deadline: float) -> tuple[list[dict], list[str]]:
    """Rows for the three methods in each precision, and notes on what was left out.

    deadline: ``time.monotonic()`` when it should be over.
    """
    rows, notes = [], []
    network = NETWORK.scaled(device.type)
    if quick:
        network = replace(network, **QUICK)
    planned = [Case(network, precision) for precision in PRECISIONS[device.type]]
    for done, case in enumerate(track(planned[: 1 if quick else None], "second order")):
        now = time.monotonic()
        if rows and now > deadline:
            notes.append(f"left out for time: second order in {case.precision.name}")
            say(notes[-1])
            continue
        share = (deadline - now) / (len(planned) - done)
        rows += measure_case(case, device, deadline=now + share)
    return rows, notes


def measure_case(case: Case, device: torch.device, *, deadline: float) -> list[dict]:
    with settings(case.precision):
        work = Work(case, device)
        methods = {name: make() for name, make in METHODS.items()}
        counts, peaks = {}, {}
        for name, method in methods.items():
            work.step(method)  # the first looks for operations without a second derivative
            with Convolutions() as counter:
                work.step(method)
            counts[name] = per_head_convolution(counter.counts, work)
            peaks[name] = peak_extra_bytes(partial(work.step, method), device) / 1e6
        seconds = deadline - time.monotonic()  # the first steps were warm-up as well
        # The rest is for the phases: steps whose time counts have no marks in them.
        timings = side_by_side(
            {name: partial(work.step, method) for name, method in methods.items()}
            | {(name, "measured"): partial(work.step, make()) for name, make in MEASURED.items()},
            device,
            seconds=0.6 * seconds,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
        )
        steps = [
            {name: work.phases(method) for name, method in methods.items()}
            for _ in range(PHASE_STEPS)
        ]
    phases = {
        name: {p: statistics.median(step[name][p] for step in steps) for p in steps[0][name]}
        for name in methods
    }
    floor = floor_ms(timings[EQUAL_WEIGHTING], phases[EQUAL_WEIGHTING])
    rows = [
        labels(case, name)
        | figures(timings[name], timings, phases[name], phases[PLAIN], floor)
        | {"peak_mb": float(f"{peaks[name]:.5g}"), "convolutions_per_head_layer": counts[name]}
        | measurement(timings[name], timings.get((name, "measured")))
        for name in methods
    ]
    for row in rows:
        say(f"  {summary_line(row)}")
    return rows


def per_head_convolution(counts: Counter, work: Work) -> float:
    """Convolutions of the step for each one of the heads' forward."""
    encoder, heads = (
        sum(isinstance(layer, _ConvNd) for layer in module.modules())
        for module in (work.model.encoder, work.model.heads)
    )
    # Nobody asks for the gradient at the images.
    return (sum(counts.values()) - (3 * encoder - 1)) / heads


def floor_ms(base: Timing, phases: dict[str, float]) -> float:
    """The count of convolutions, in equal weighting's times."""
    return base.ms + phases["heads_forward"] + phases["heads_backward"]


def figures(
    timing: Timing,
    timings: dict[str, Timing],
    phases: dict[str, float],
    plain_phases: dict[str, float],
    floor: float,
) -> dict:
    own = phases.get("regularizer", 0.0)
    found = {
        "steps_per_s": 1e3 / timing.ms,
        "spread": timing.spread / timing.ms,
        "ratio_to_ew": timing.ms / timings[EQUAL_WEIGHTING].ms,
        "ratio_to_plain": timing.ms / timings[PLAIN].ms,
        "heads_ratio_to_plain": in_heads(phases) / in_heads(plain_phases),
        # Without the regulariser's own time; equal weighting has no second order.
        "ratio_to_floor": (timing.ms - own) / floor if own else None,
    }
    return rounded(found) | {"rounds": timing.rounds, "phases": rounded(phases)}


def measurement(timing: Timing, measured: Timing | None) -> dict:
    """The share that a measurement of the ratio adds to its step, and to a step on average."""
    if measured is None:
        return {"measurement": None, "measurement_on_average": None}
    share = measured.ms / timing.ms - 1
    return rounded({"measurement": share, "measurement_on_average": share / BETWEEN})


def in_heads(phases: dict[str, float]) -> float:
    return sum(phases.get(name, 0.0) for name in ("heads_forward", "saliencies", "heads_backward"))


def summary_line(row: dict) -> str:
    line = f"{row['method']}: {row['steps_per_s']:.4g} steps/s, "
    line += f"{row['convolutions_per_head_layer']:.3g} convolutions per convolution of a head, "
    line += f"{row['ratio_to_ew']:.3g} x the time of equal weighting"
    if row["ratio_to_floor"] is not None:
        line += f", {row['ratio_to_plain']:.3g} x that without second_order "
        line += f"({row['heads_ratio_to_plain']:.3g} x in the heads), "
        line += f"{row['ratio_to_floor']:.3g} x the floor, "
        line += f"a measurement of the ratio {row['measurement']:.1%} of the step "
        line += f"({row['measurement_on_average']:.1%} on average)"
    return f"{line}, {row['peak_mb']:.4g} MB"
