"""How many kernels Triton compiles when the sizes of a call change; no GPU, and none is compiled.

``python -m benchmarks.compilations`` makes the calls of each series with a stand-in for the CUDA
driver. The first call of a series is also the first use: what it compiles, it compiles in parallel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton

from benchmarks.shapes import Shape
from benchmarks.static_report import MODES, products_of, saliency, stand_in_driver
from repmtl_kernels._heads.second_order import triton as batch_norm
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.function import Losses
from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions
from repmtl_kernels.backends.contract import AllSamples, Anchors
from repmtl_kernels.backends.triton.affinity import affinity
from repmtl_kernels.backends.triton.contrast import contrast
from repmtl_kernels.backends.triton.first_use import made_ready

CAPABILITY = 90


class Variants:
    """The variants of kernels that were asked for, and those that a launch had to wait for."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()
        self._new: list[str] = []
        self.late: list[str] = []

    def __call__(self, *, key: str, fn, is_manual_warmup: bool, **_) -> bool:
        """Note a variant; Triton calls this where it would compile, and does not if it is true."""
        name = fn.name.split(".")[-1]
        if (name, key) not in self._known:
            self._known.add((name, key))
            self._new.append(name)
            if not is_manual_warmup:
                self.late.append(name)
        return True

    def take(self) -> dict[str, int]:
        """Return how many are new since the last question, by kernel."""
        new, self._new = self._new, []
        return dict(sorted(Counter(new).items()))


@contextlib.contextmanager
def counted(capability: int = CAPABILITY) -> Iterator[Variants]:
    """Count what launches would compile; they run nothing."""
    variants = Variants()
    made_ready.clear()
    with stand_in_driver(capability):
        triton.knobs.runtime.jit_cache_hook = variants
        try:
            yield variants
        finally:
            triton.knobs.runtime.jit_cache_hook = None


def losses(
    tasks: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    *,
    mode: str = "bfloat16",
    layout: str = "contiguous",
    masked: bool = False,
    memory: str = "save",
    over: str = "tasks",
) -> None:
    """Make a call of both losses and its backward pass."""
    shape = Shape("", tasks, batch, channels, height, width, batch, "")
    dtype, _ = MODES[mode]
    saliencies = [saliency(shape, dtype, layout).requires_grad_() for _ in range(tasks)]
    positions = torch.ones(batch, height * width, dtype=torch.bool) if masked else None
    config = Config(
        backend="triton",
        stacked=False,
        channel_dim=1,
        with_grad=True,
        tsr=TsrOptions(over=over),
        csa=CsaOptions(memory=memory),
        lambdas=Lambdas(),
    )
    with products_of(mode):
        total, *_ = Losses.apply(False, config, None, positions, *saliencies)
        total.backward()


def samples_of_ranks(tasks: int, batch: int, channels: int, *, total: int, first: int) -> None:
    """Contrast the samples of a rank with those of all ranks."""
    unit = torch.empty(tasks, batch, channels)
    others = torch.empty(total, tasks, channels).transpose(0, 1)
    contrast(
        Anchors(unit, torch.empty(batch), torch.empty_like(unit)),
        temperature=0.5,
        with_grad=True,
        all_samples=AllSamples(others, first, lambda peaks: peaks),
    )


def products(
    tasks: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    *,
    mode: str = "bfloat16",
    layout: str = "contiguous",
    masked: bool = False,
) -> None:
    """Multiply the tasks' saliencies with each other."""
    shape = Shape("", tasks, batch, channels, height, width, batch, "")
    mask = torch.ones(batch, height * width, dtype=torch.bool) if masked else None
    affinity([saliency(shape, MODES[mode][0], layout) for _ in range(tasks)], mask=mask)


def norm(
    batch: int,
    channels: int,
    height: int,
    width: int,
    *,
    mode: str = "bfloat16",
    layout: str = "contiguous",
) -> None:
    """Make the derivatives of batch norm, with the ReLU behind it."""
    shape = Shape("", 1, batch, channels, height, width, batch, "")
    x, c = saliency(shape, MODES[mode][0], layout), torch.empty(channels)
    operands = (x, x, c, c, c, x, True, (True, True, True))
    batch_norm.batch_norm_backward(*operands)
    batch_norm.batch_norm_double_backward(x, None, None, *operands)


Call = Callable[[], None]


def _batches(call: Callable[..., None], *before: int, after: tuple[int, ...], **options):
    return {
        f"B = {batch}": partial(call, *before, batch, *after, **options)
        for batch in (64, 37, 1, 128, 257, 600)
    }


def _images(call: Callable[..., None], *before: int, sizes: tuple[tuple[int, int], ...], **options):
    return {
        f"{height} x {width}": partial(call, *before, height, width, **options)
        for height, width in sizes
    }


OFFICE = (512, 7, 7)
# Sizes of one class: aligned alike, with the same tiles.
SAME_CLASS = ((24, 24), (24, 32), (32, 32), (40, 40))
SERIES: dict[str, dict[str, Call]] = {
    **{
        f"batch, {mode}": _batches(losses, 4, after=OFFICE, mode=mode)
        for mode in ("bfloat16", "ieee", "tf32")
    },
    "batch, channels_last": _batches(losses, 4, after=OFFICE, layout="channels_last"),
    "batch, pooled": _batches(losses, 4, after=(512, 1, 1)),
    "batch, masked, over space": _batches(losses, 4, after=OFFICE, masked=True, over="space"),
    "batch, recomputed": _batches(losses, 4, after=OFFICE, memory="recompute"),
    "batch, N side in large tiles": {
        f"B = {batch}": partial(losses, 3, batch, 512, 18, 24) for batch in (8, 5, 1)
    },
    "batch, long sums": {
        f"B = {batch}": partial(losses, 2, batch, 64, 64, 64) for batch in (4, 3, 1)
    },
    "batch, C side": {f"B = {batch}": partial(losses, 3, batch, 64, 18, 24) for batch in (8, 5, 1)},
    "ranks": {
        "B = 64": partial(losses, 4, 64, *OFFICE),
        **{
            f"B = {batch} of {total}": partial(
                samples_of_ranks, 4, batch, 512, total=total, first=first
            )
            for batch, total, first in ((64, 128, 64), (37, 101, 64), (1, 65, 64), (64, 512, 0))
        },
    },
    "images, C side": _images(losses, 3, 4, 64, sizes=SAME_CLASS),
    "images, N side": _images(losses, 3, 4, 2048, sizes=SAME_CLASS),
    "images of other classes": _images(
        losses, 4, 64, 512, sizes=((7, 7), (9, 9), (8, 8), (10, 10), (12, 12))
    ),
    "tasks": {f"T = {tasks}": partial(losses, tasks, 64, *OFFICE) for tasks in (4, 2, 3, 5)},
    "affinity": _batches(products, 4, after=OFFICE),
    "affinity, in parts": _batches(products, 3, after=(512, 18, 24), mode="ieee"),
    "affinity, masked": _batches(products, 9, after=(64, 32, 32), masked=True),
    "batch norm": _batches(norm, after=OFFICE),
    "batch norm, channels_last": _batches(norm, after=OFFICE, layout="channels_last"),
    "batch norm, large": _batches(norm, after=(512, 40, 48), mode="ieee"),
    "images, batch norm": _images(norm, 4, 2048, sizes=SAME_CLASS),
}


def count(series: dict[str, Call]) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    """Yield each call, the variants that it is the first to need, and those not made ahead."""
    with counted() as variants:
        for name, call in series.items():
            variants.late.clear()
            call()
            yield name, variants.take(), list(variants.late)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compilations", description=__doc__)
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=list(SERIES))
    parser.add_argument("--json", action="store_true", help="print all counts as JSON")
    options = parser.parse_args()
    rows = [
        {"series": title, "call": name, "new": new, "late": late}
        for title in options.series
        for name, new, late in count(SERIES[title])
    ]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['series']:32} {row['call']:16} {sum(row['new'].values()):3}", *row["new"])


if __name__ == "__main__":
    main()
