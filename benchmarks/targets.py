"""What the kernels have to reach on an H200, checked from result files alone.

A target is met by a backend whose worst selected row is within the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.progress import markdown
from benchmarks.results import load

BACKENDS = {"triton": "Triton", "native": "native"}
FILES = ("kernels", "stages")
TRAINING = {"function": "rep_mtl_loss", "direction": "forward_backward", "layout": "contiguous"}


@dataclass(frozen=True)
class Quantity:
    """A number of a row, perhaps against the same case's row of a rival.

    of: from the row, the rival's row and the measured ceilings.
    """

    of: Callable[[dict, dict, dict], float]
    larger_is_better: bool
    shown: str


FLOOR = Quantity(lambda row, rival, measured: row["fraction"], True, "{:.0%} of the floor")
BANDWIDTH = Quantity(
    lambda row, rival, measured: row["gbs"] / measured["copy_gbs"], True, "{:.0%} of a copy"
)
FASTER = Quantity(lambda row, rival, measured: rival["ms"] / row["ms"], True, "{:.3g}x")
MEMORY = Quantity(
    lambda row, rival, measured: row["peak_mb"] / rival["peak_mb"], False, "{:.2f}x the memory"
)
MICROSECONDS = Quantity(lambda row, rival, measured: 1e3 * row["ms"], False, "{:.3g} us")
ERROR = Quantity(lambda row, rival, measured: row["gradient_error"], False, "{:.1e}")


@dataclass(frozen=True)
class Target:
    """``rows``: the values that a row's fields have; of what is not named, all count."""

    name: str
    file: str
    rows: dict
    quantity: Quantity
    bound: float
    rival: str | None = None

    def fits(self, row: dict) -> bool:
        return all(row.get(key, False) == value for key, value in self.rows.items())


def _statistics() -> list[Target]:
    return [
        Target(
            f"statistics at {shape}, {precision}: bandwidth",
            "stages",
            {
                "function": "statistics", "variant": "both", "shape": shape,
                "precision": precision, "layout": "contiguous", "graph": True,
            },
            BANDWIDTH,
            0.9,
        )
        for shape in ("nyuv2", "cityscapes")
        for precision in ("bfloat16", "tf32")
    ]  # fmt: skip


def _tsr() -> list[Target]:
    rows = {
        "function": "tsr_loss", "direction": "forward_backward", "layout": "contiguous",
        "shape": "nyuv2", "precision": "bfloat16", "graph": True,
    }  # fmt: skip
    name = "tsr_loss, forward and backward, nyuv2, bfloat16"
    return [
        Target(f"{name}: floor", "kernels", rows, FLOOR, 0.8),
        Target(f"{name}: against the reference", "kernels", rows, FASTER, 10, "reference"),
    ]


def _gram() -> list[Target]:
    rows = {
        "function": "gram", "variant": "with gradient", "shape": "nyuv2",
        "precision": "bfloat16", "layout": "contiguous", "graph": True,
    }  # fmt: skip
    name = "gram at nyuv2, bfloat16: against the library's full matrix"
    return [Target(name, "stages", rows, FASTER, 1.5, "bmm")]


def _rep_mtl() -> list[Target]:
    found = []
    for precision, floor in (("bfloat16", 0.7), ("tf32", 0.6)):
        for shape, literal, factored, memory in (
            ("nyuv2", 5, 2.2, 0.4),
            ("cityscapes", 30, 3, 0.1),
        ):
            rows = TRAINING | {"shape": shape, "precision": precision, "graph": False}
            name = f"rep_mtl_loss, forward and backward, {shape}, {precision}"
            found += [
                Target(f"{name}: floor", "kernels", rows, FLOOR, floor),
                Target(
                    f"{name}: against the reference", "kernels", rows, FASTER, literal, "reference"
                ),
                Target(
                    f"{name}: against the factored form", "kernels", rows, FASTER, factored,
                    "factored",
                ),
                Target(
                    f"{name}: memory against the reference", "kernels", rows, MEMORY, memory,
                    "reference",
                ),
            ]  # fmt: skip
        rows = TRAINING | {"precision": precision, "graph": False}
        name = f"rep_mtl_loss, forward and backward, everywhere, {precision}"
        found += [
            Target(
                f"{name}: against torch.compile of the {form}", "kernels", rows, FASTER, 1, rival
            )
            for form, rival in (
                ("reference", "reference_compiled"),
                ("factored form", "factored_compiled"),
            )
        ]
    return found


def _office() -> list[Target]:
    found = []
    for shape in ("office49", "office1"):
        for precision in ("bfloat16", "tf32"):
            rows = TRAINING | {"shape": shape, "precision": precision, "graph": True}
            name = f"rep_mtl_loss, forward and backward, {shape}, {precision}, CUDA graphs"
            found += [
                Target(f"{name}: time", "kernels", rows, MICROSECONDS, 100),
                Target(f"{name}: against the reference", "kernels", rows, FASTER, 10, "reference"),
            ]
    return found


def _errors() -> list[Target]:
    return [
        Target(
            f"gradients against float64, everywhere, {precision}",
            "kernels",
            {"direction": "forward_backward", "precision": precision, "graph": False},
            ERROR,
            bound,
        )
        for precision, bound in (("float32", 1e-5), ("tf32", 1e-3), ("bfloat16", 1e-2))
    ]


TARGETS = (*_statistics(), *_tsr(), *_gram(), *_rep_mtl(), *_office(), *_errors())


class Found(NamedTuple):
    """The worst of a target's rows."""

    value: float
    shape: str
    rows: int
    met: bool


def check(target: Target, results: dict[str, dict | None]) -> dict[str, Found | str | None]:
    """Of each backend: what was found, or the error of a row, or None where nothing was measured.

    results: the result files by name.
    """
    file = results[target.file]
    return {backend: _found(target, backend, file) for backend in BACKENDS}


def _found(target: Target, backend: str, file: dict | None) -> Found | str | None:
    rows = [] if file is None else [row for row in file["rows"] if target.fits(row)]
    rivals = {_case(row): row for row in rows if row["backend"] == target.rival}
    values = []
    for row in rows:
        if row["backend"] != backend:
            continue
        if row["error"]:
            return row["error"]
        rival = rivals.get(_case(row))
        if target.rival is not None and (rival is None or rival["error"]):
            continue
        value = target.quantity.of(row, rival, file["measured"])
        if value is not None:  # no judge of errors
            values.append((value, row["shape"]))
    if not values:
        return None
    # NaN is worse than any number.
    sign = 1 if target.quantity.larger_is_better else -1
    value, shape = min(values, key=lambda v: sign * v[0] if v[0] == v[0] else float("-inf"))
    met = value >= target.bound if sign > 0 else value <= target.bound
    return Found(value, shape, len(values), met)


def _case(row: dict) -> tuple:
    keys = ("function", "variant", "shape", "precision", "layout", "direction", "graph")
    return tuple(row.get(key) for key in keys)


def table(folder: Path) -> str | None:
    """Every target with what was measured; None where ``folder`` has no results of a GPU."""
    results = {name: load(folder, name) for name in FILES}
    measured = [found for found in results.values() if found is not None]
    if not any("gpu" in found["machine"] for found in measured):
        return None
    lines, met, missed = [], 0, 0
    for target in TARGETS:
        found = check(target, results)
        by = [name for b, name in BACKENDS.items() if getattr(found[b], "met", False)]
        tried = any(value is not None for value in found.values())
        met, missed = met + bool(by), missed + (tried and not by)
        lines.append(
            [
                target.name,
                ("at least " if target.quantity.larger_is_better else "at most ")
                + target.quantity.shown.format(target.bound),
                *(_shown(target, found[backend]) for backend in BACKENDS),
                ", ".join(by) or ("no" if tried else "not measured"),
            ]
        )
    header = ["target", "bound", *BACKENDS.values(), "met by"]
    where = "; ".join(
        f"{name} of commit {found['commit'][:10]}, {found['date'][:10]}"
        for name, found in results.items()
        if found is not None
    )
    return (
        f"{markdown(header, lines)}\n\n{met} of {len(TARGETS)} targets are met, {missed} are not, "
        f"{len(TARGETS) - met - missed} were not measured; the bounds are those of "
        "an H200. The worst of a target's cases counts. "
        f"{measured[0]['machine']['gpu']}; {where}."
    )


def _shown(target: Target, found: Found | str | None) -> str:
    if found is None:
        return ""
    if isinstance(found, str):
        return "out of memory" if "OutOfMemory" in found else "failed"
    text = target.quantity.shown.format(found.value)
    return text if found.rows == 1 else f"{text} ({found.shape}, of {found.rows})"
