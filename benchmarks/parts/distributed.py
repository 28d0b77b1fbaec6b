"""The cost of negatives of all ranks, from formulas: nothing here is measured."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.output import amount, of_rows
from repmtl_kernels._distributed import WIDTH
from repmtl_kernels.backends.eager.contrast import products_at_a_time

RANKS = (2, 8, 64, 512, 4096)
# An assumption about the network: one port of 400 Gbit/s for each rank, at half of its rate.
BYTES_PER_SECOND = 25e9


class Setting(NamedTuple):
    tasks: int = 4
    batch: int = 64  # of each rank
    channels: int = 512
    positions: int = 49
    itemsize: int = 4  # anchors are float32 unless the saliencies are float64


def gathered(s: Setting) -> int:
    """Return the bytes that a rank sends into the gathers of one step."""
    return 8 * WIDTH + s.itemsize * s.batch * s.tasks * s.channels


def reduced(s: Setting, ranks: int) -> int:
    """Return the bytes that a rank sends into the all-reduces: two numbers for each sample."""
    return 2 * s.itemsize * ranks * s.batch


def received(s: Setting, ranks: int) -> int:
    """Return the bytes that a rank receives; an all-reduce in a ring brings twice its own."""
    return (ranks - 1) * gathered(s) + 2 * reduced(s, ranks) * (ranks - 1) // ranks


def anchors(s: Setting, ranks: int) -> int:
    """Return the bytes of the anchors of all ranks, until the forward pass is over."""
    return s.itemsize * ranks * s.batch * s.tasks * s.channels


def block(s: Setting, ranks: int) -> int:
    """Return the bytes of the products that the contrast stage has at a time, on the CPU."""
    sample = s.tasks**2 * ranks * s.batch
    most = products_at_a_time(ranks * s.batch * s.tasks * s.channels)
    samples = min(s.batch, max(1, most // sample))
    return s.itemsize * samples * sample


def all_products(s: Setting, ranks: int) -> int:
    """Return the bytes of ``(G T)^2`` products, which are never made."""
    return s.itemsize * (ranks * s.batch * s.tasks) ** 2


def work(s: Setting, ranks: int) -> int:
    """Return the multiply-adds of one rank's contrast stage: products, and their gradient."""
    return 2 * s.tasks**2 * s.batch * ranks * s.batch * s.channels


def gram_work(s: Setting) -> int:
    """Return the multiply-adds of the rest of CSA, which the number of ranks does not change."""
    small = min(s.channels, s.positions)
    return round(1.5 * small * s.channels * s.positions * s.tasks * s.batch)


def table() -> str:
    s = Setting()
    rows = [
        {
            "ranks": f"{ranks:,}",
            "samples": f"{ranks * s.batch:,}",
            "received per step": amount(received(s, ranks)),
            f"at {BYTES_PER_SECOND / 1e9:g} GB/s": (
                f"{1e3 * received(s, ranks) / BYTES_PER_SECOND:.2g} ms"
            ),
            "everyone's anchors": amount(anchors(s, ranks)),
            "products at a time": amount(block(s, ranks)),
            "all products, never made": amount(all_products(s, ranks)),
            "multiply-adds, against the rest of CSA": (
                f"{work(s, ranks):.1e} ({work(s, ranks) / gram_work(s):.3g}x)"
            ),
        }
        for ranks in RANKS
    ]
    caption = (
        "Simulated from the formulas above by `benchmarks/parts/distributed.py`, not measured: for "
        f"each rank, T = {s.tasks}, B = {s.batch}, C = {s.channels}, N = {s.positions}, float32; "
        "the rate of the network is an assumption, its latency is left out."
    )
    return f"{of_rows(rows)}\n\n{caption}"
