"""The targets of an H200, each met by a backend whose worst selected row is within it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.output import captioned, failure, markdown, on_gpu
from benchmarks.results import load, write

BACKENDS = {"triton": "Triton", "native": "native"}
FILES = ("kernels", "stages")


@dataclass(frozen=True)
class Quantity:
    """A number of a row, its rival's row and the measured rates."""

    of: Callable[[dict, dict, dict], float]
    larger_is_better: bool
    shown: str


FLOOR = Quantity(lambda row, rival, rates: row["fraction"], True, "{:.0%} of the floor")
BANDWIDTH = Quantity(
    lambda row, rival, rates: row["gbs"] / rates["copy_gbs"], True, "{:.0%} of a copy"
)
FASTER = Quantity(lambda row, rival, rates: rival["ms"] / row["ms"], True, "{:.3g}x")
MEMORY = Quantity(
    lambda row, rival, rates: row["peak_mb"] / rival["peak_mb"], False, "{:.2f}x the memory"
)
MICROSECONDS = Quantity(lambda row, rival, rates: 1e3 * row["ms"], False, "{:.3g} us")
ERROR = Quantity(lambda row, rival, rates: row["gradient_error"], False, "{:.1e}")


@dataclass(frozen=True)
class Target:
    """``rows``: the values that a row's fields have; every row that fits counts."""

    name: str
    file: str
    rows: dict
    quantity: Quantity
    bound: float
    rival: str | None = None

    def fits(self, row: dict) -> bool:
        return all(row.get(key, False) == value for key, value in self.rows.items())


def _stage(name: str, quantity: Quantity, bound: float, rival: str | None = None, **rows) -> Target:
    fixed = {"layout": "contiguous", "graph": True}
    return Target(name, "stages", fixed | rows, quantity, bound, rival)


def _loss(name: str, quantity: Quantity, bound: float, rival: str | None = None, **rows) -> Target:
    fixed = {"direction": "forward_backward", "layout": "contiguous"}
    return Target(name, "kernels", fixed | rows, quantity, bound, rival)


def _targets() -> Iterator[Target]:
    for shape, precision in itertools.product(("nyuv2", "cityscapes"), ("bfloat16", "tf32")):
        rows = {"function": "statistics", "variant": "both", "shape": shape, "precision": precision}
        yield _stage(f"statistics at {shape}, {precision}: bandwidth", BANDWIDTH, 0.9, **rows)

    rows = {"function": "tsr_loss", "shape": "nyuv2", "precision": "bfloat16", "graph": True}
    name = "tsr_loss, forward and backward, nyuv2, bfloat16"
    yield _loss(f"{name}: floor", FLOOR, 0.8, **rows)
    yield _loss(f"{name}: against the reference", FASTER, 10, "reference", **rows)

    rows = {"function": "gram", "variant": "with gradient"}
    rows |= {"shape": "nyuv2", "precision": "bfloat16"}
    name = "gram at nyuv2, bfloat16: against the library's full matrix"
    yield _stage(name, FASTER, 1.5, "bmm", **rows)

    both = "rep_mtl_loss, forward and backward"
    for precision, floor in (("bfloat16", 0.7), ("tf32", 0.6)):
        rows = {"function": "rep_mtl_loss", "precision": precision, "graph": False}
        for shape, literal, factored, memory in (
            ("nyuv2", 5, 2.2, 0.4),
            ("cityscapes", 30, 3, 0.1),
        ):
            for what, quantity, bound, rival in (
                ("floor", FLOOR, floor, None),
                ("against the reference", FASTER, literal, "reference"),
                ("against the factored form", FASTER, factored, "factored"),
                ("memory against the reference", MEMORY, memory, "reference"),
            ):
                name = f"{both}, {shape}, {precision}: {what}"
                yield _loss(name, quantity, bound, rival, **rows, shape=shape)
        for form, rival in (
            ("reference", "reference_compiled"),
            ("factored form", "factored_compiled"),
        ):
            name = f"{both}, everywhere, {precision}: against torch.compile of the {form}"
            yield _loss(name, FASTER, 1, rival, **rows)
    for shape, precision in itertools.product(("office49", "office1"), ("bfloat16", "tf32")):
        rows = {"function": "rep_mtl_loss", "precision": precision, "shape": shape, "graph": True}
        name = f"{both}, {shape}, {precision}, CUDA graphs"
        yield _loss(f"{name}: time", MICROSECONDS, 100, **rows)
        yield _loss(f"{name}: against the reference", FASTER, 10, "reference", **rows)
    for precision, bound in (("float32", 1e-5), ("tf32", 1e-3), ("bfloat16", 1e-2)):
        rows = {"direction": "forward_backward", "precision": precision, "graph": False}
        name = f"gradients against float64, everywhere, {precision}"
        yield Target(name, "kernels", rows, ERROR, bound)


TARGETS = tuple(_targets())


class Worst(NamedTuple):
    value: float
    shape: str
    rows: int
    met: bool


def worst(target: Target, backend: str, file: dict | None) -> Worst | dict | None:
    """Return a backend's worst row, or one that failed, or None where nothing was measured."""
    rows = [] if file is None else [row for row in file["rows"] if target.fits(row)]
    rivals = {_case(row): row for row in rows if row["backend"] == target.rival}
    values = []
    for row in rows:
        if row["backend"] != backend:
            continue
        if row["error"]:
            return row
        rival = rivals.get(_case(row))
        if target.rival is not None and (rival is None or rival["error"]):
            continue
        value = target.quantity.of(row, rival, file["measured"])
        if value is not None:  # no exact gradients
            values.append((value, row["shape"]))
    if not values:
        return None
    # NaN is worse than any number.
    sign = 1 if target.quantity.larger_is_better else -1
    value, shape = min(values, key=lambda v: sign * v[0] if v[0] == v[0] else float("-inf"))
    met = value >= target.bound if sign > 0 else value <= target.bound
    return Worst(value, shape, len(values), met)


def _case(row: dict) -> tuple:
    keys = ("function", "variant", "shape", "precision", "layout", "direction", "graph")
    return tuple(row.get(key) for key in keys)


def table(folder: Path) -> str | None:
    """Return every target with what was measured; None where there are no results of a GPU."""
    files = {name: load(folder, name) for name in FILES}
    measured = {name: file for name, file in files.items() if file is not None}
    if not any(map(on_gpu, measured.values())):
        return None
    lines, met, missed = [], 0, 0
    for target in TARGETS:
        reached = {b: worst(target, b, files[target.file]) for b in BACKENDS}
        names = [title for b, title in BACKENDS.items() if getattr(reached[b], "met", False)]
        tried = any(value is not None for value in reached.values())
        met, missed = met + bool(names), missed + (tried and not names)
        most = "at least" if target.quantity.larger_is_better else "at most"
        lines.append(
            [
                target.name,
                f"{most} {target.quantity.shown.format(target.bound)}",
                *(_shown(target, reached[backend]) for backend in BACKENDS),
                ", ".join(names) or ("no" if tried else "not measured"),
            ]
        )
    text = (
        f"{met} of {len(TARGETS)} targets are met, {missed} are not, {len(TARGETS) - met - missed} "
        "were not measured; the bounds are those of an H200. The worst of a target's cases counts. "
    )
    text += "; ".join(
        f"{name} of commit {f['commit'][:10]}, {f['date'][:10]}" for name, f in measured.items()
    )
    first = next(iter(measured.values()))
    return captioned(
        markdown(["target", "bound", *BACKENDS.values(), "met by"], lines), first, f"{text}."
    )


def refresh(folder: Path) -> None:
    """Write the table beside the results, where they are a GPU's."""
    if (reached := table(folder)) is not None:
        write(folder / "targets.md", f"{reached}\n")


def _shown(target: Target, value: Worst | dict | None) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return failure(value)
    text = target.quantity.shown.format(value.value)
    return text if value.rows == 1 else f"{text} ({value.shape}, of {value.rows})"
