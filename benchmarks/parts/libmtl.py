"""The table of ``python -m benchmarks.libmtl``: Rep-MTL's step against those of LibMTL."""

from __future__ import annotations

from benchmarks.methods import DEFAULT, EQUAL_WEIGHTING, TITLES
from benchmarks.output import captioned, failure, markdown
from benchmarks.part import Part
from benchmarks.parts.steps import OF_DEFAULT, architectures, by_network

PREFIX = "libmtl_"
OF_LIBMTL = {
    "libmtl_Nash_MTL": "Nash-MTL (LibMTL)",
    "libmtl_FairGrad": "FairGrad (LibMTL)",
    "libmtl_EW": "equal weighting (LibMTL)",
}
OF_TORCHJD = {name: TITLES[name] for name in ("nash_mtl", "fairgrad")}
ROWS = {
    EQUAL_WEIGHTING: TITLES[EQUAL_WEIGHTING],
    DEFAULT: TITLES[DEFAULT],
    **OF_LIBMTL,
    **OF_TORCHJD,
}
COMPARED = ("libmtl_Nash_MTL", "libmtl_FairGrad", *OF_TORCHJD)
# By how many per cent Rep-MTL's step is shorter in the paper, on NYUv2.
PAPER = {"libmtl_Nash_MTL": 26, "libmtl_FairGrad": 12}


def table(result: dict) -> str:
    """Return the time of each method's step, and by how much Rep-MTL's is below it."""
    columns = by_network(result)
    header = ["method", *(f"{name}: time, Rep-MTL below it" for name in columns)]
    lines = []
    measured = {row["method"] for row in result["rows"]}
    for method, title in ((m, t) for m, t in ROWS.items() if m in measured):
        paper = f"{PAPER[method]} %" if method in PAPER else ""
        cells = [_cell(rows.get(method), rows.get(DEFAULT)) for rows in columns.values()]
        lines.append([title, *cells, paper])
    text = (
        f"{architectures(result)}. Time of a step as a multiple of equal weighting's, all methods "
        "in turns in one run, and how many per cent less time Rep-MTL's step takes. The paper's "
        "figures are NYUv2's at full size on a GPU. LibMTL's weightings run as its Trainer runs "
        f"them, with `rep_grad=False` and its own settings, commit {result['libmtl_commit'][:10]}. "
        f"{OF_DEFAULT}"
    )
    return captioned(markdown([*header, "the paper"], lines), result, text)


def _cell(row: dict | None, default: dict | None) -> str:
    if row is None:
        return ""
    if row["error"]:
        return failure(row)
    ratio = row["ratio_to_ew"]
    if row["method"] not in COMPARED or not default or default["error"]:
        return f"{ratio:.2f}x"
    return f"{ratio:.2f}x, {100 * (1 - default['ratio_to_ew'] / ratio):.0f} %"


PART = Part("libmtl", tables={"libmtl": table})
