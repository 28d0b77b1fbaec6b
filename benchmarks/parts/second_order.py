"""The gain of ``second_order()``: the same Rep-MTL step with and without it, in turns.

Counted in convolutions, an exact step costs a head 6 for each one of its forward where equal
weighting costs 3; the encoder costs 3 in both. So the step can't be faster than equal weighting's
plus once more that one's time in the heads; the regulariser's own time comes on top.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import peak_extra_bytes
from benchmarks.methods import EQUAL_WEIGHTING, EqualWeighting, RepMTLMethod, Work
from benchmarks.networks import Network
from benchmarks.output import captioned, of_rows, on_gpu, say
from benchmarks.part import Part, Run
from benchmarks.parts.steps import PRECISIONS, Case, architectures, figures, settings, timed
from benchmarks.results import rounded
from repmtl_kernels._training.strength import BETWEEN

PLAIN, FAST = "rep_mtl", "rep_mtl_second_order"
# Also measured: the same on a call that measures the ratio of the gradients.
MEASURED = " measured"
METHODS = {
    EQUAL_WEIGHTING: EqualWeighting,
    PLAIN: RepMTLMethod,
    FAST: partial(RepMTLMethod, fast=True),
    PLAIN + MEASURED: partial(RepMTLMethod, measured=True),
    FAST + MEASURED: partial(RepMTLMethod, fast=True, measured=True),
}
TITLES = {
    EQUAL_WEIGHTING: "equal weighting",
    PLAIN: "Rep-MTL, plain PyTorch's double backward",
    FAST: "Rep-MTL, `second_order()`",
}
# Maps as large as NYUv2's, heads as wide as DeepLabV3's; a narrow encoder on a CPU.
NETWORK = Network(
    "aspp", {"segmentation": 13, "depth": 1, "normals": 3}, 8, 288, 384,
    dilations=(6, 12, 18), on_cpu={"batch": 2, "base": 8, "head_width": 256},
)  # fmt: skip
QUICK = {"height": 96, "width": 128}


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


def measure(run: Run) -> None:
    network = NETWORK.scaled(run.device.type)
    precisions = PRECISIONS[run.device.type]
    if run.quick:
        network, precisions = replace(network, **QUICK), precisions[:1]
    share = run.left / len(precisions)
    run.each([Case(network, p) for p in precisions], partial(measure_case, run, share))


def measure_case(run: Run, seconds: float, case: Case) -> list[dict]:
    deadline = time.monotonic() + seconds
    ready, counts = {}, {}
    with settings(case.precision):
        work = Work(case.network, case.precision.dtype, run.device)
        for name, make in METHODS.items():
            method, began = make(), time.monotonic()
            work.cycle(method)  # the first looks for operations without a second derivative
            with Convolutions() as counter:
                work.cycle(method)
            counts[name] = per_head_convolution(counter.counts, work)
            peak_mb = peak_extra_bytes(partial(work.cycle, method), run.device) / 1e6
            ready[name] = method, peak_mb, (time.monotonic() - began) / 3
        timings, phases = timed(ready, work, deadline)
    base, plain = timings[EQUAL_WEIGHTING], timings[PLAIN]
    of_base = phases[EQUAL_WEIGHTING]
    floor_ms = base.ms + of_base["heads_forward"] + of_base["heads_backward"]
    rows = []
    for name in TITLES:
        ms, own = timings[name].ms, phases[name].get("regularizer", 0.0)
        share = timings[name + MEASURED].ms / ms - 1 if own else None
        more = {
            "ratio_to_plain": ms / plain.ms,
            "heads_ratio_to_plain": in_heads(phases[name]) / in_heads(phases[PLAIN]),
            # Without the regulariser's own time; equal weighting has no second order.
            "ratio_to_floor": (ms - own) / floor_ms if own else None,
            "convolutions_per_head_layer": counts[name],
            # The share that a measurement of the ratio adds to its step, and to a step on average.
            "measurement": share,
            "measurement_on_average": share / BETWEEN if own else None,
        }
        row = figures(timings[name], base, ready[name][1]) | rounded(more)
        rows.append(case.labels(name) | row | {"phases": rounded(phases[name])})
        say(f"  {name}: {row}")
    return rows


def per_head_convolution(counts: Counter, work: Work) -> float:
    """Return the convolutions of the step for each one of the heads' forward."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    encoder, heads = (
        sum(isinstance(layer, kinds) for layer in module.modules())
        for module in (work.model.encoder, work.model.heads)
    )
    # Nothing needs the gradient at the images.
    return (sum(counts.values()) - (3 * encoder - 1)) / heads


def in_heads(phases: dict[str, float]) -> float:
    return sum(phases.get(name, 0.0) for name in ("heads_forward", "saliencies", "heads_backward"))


def table(result: dict) -> str:
    """Return a step with and without ``second_order()``, against what its convolutions allow."""
    rows = []
    for row in result["rows"]:
        cells = {
            "method": TITLES[row["method"]],
            "convolutions per convolution of a head": f"{row['convolutions_per_head_layer']:.3g}",
            "time of a step": f"{row['ratio_to_ew']:.2f}x",
            "against plain PyTorch": f"{1 / row['ratio_to_plain']:.2f}x faster",
            "in the heads alone": f"{1 / row['heads_ratio_to_plain']:.2f}x faster",
            "of the floor": f"{row['ratio_to_floor'] or 0:.2f}x",
            "a measurement of the ratio": f"{row['measurement'] or 0:.0%}, "
            f"{row['measurement_on_average'] or 0:.1%} on average",
        }
        if row["ratio_to_floor"] is None:  # equal weighting
            cells |= dict.fromkeys(list(cells)[3:], "")
        dtype = {"dtype": row["dtype"]} if on_gpu(result) else {}
        rows.append(dtype | cells | {"peak memory": f"{row['peak_mb']:.4g} MB"})
    text = (
        f"{architectures(result)}, 3 x 3 convolutions of dilation 6, 12 and 18 with batch norm. "
        "Time of a step relative to equal weighting, in turns in one run. The floor is the count "
        "of convolutions at equal weighting's speed, its step and once more its heads, without the "
        "regulariser's own time. A measurement of `last.ratio` comes on top of every 24th step."
    )
    return captioned(of_rows(rows), result, text)


PART = Part(
    "second_order",
    "SECOND ORDER: a step with and without second_order(), in turns",
    measure,
    {"second_order": table},
)
