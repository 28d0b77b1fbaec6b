"""The colours of figures and maps. Blue and orange stay apart for colour-blind readers."""

from __future__ import annotations

# From conflict over 0 to help.
DIVERGING = ("#8f3d00", "#d9691e", "#f5a878", "#f7f7f5", "#8fbdf0", "#2f7dd1", "#0b3f85")
# From nothing to most: lightness grows evenly, from black over violet and orange to pale yellow.
SEQUENTIAL = (
    "#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55064", "#fb8761", "#fec287",
    "#fcfdbf",
)  # fmt: skip
# The colour where there is no number.
MISSING = "#8a8f98"
# For lines: Okabe and Ito's, but for their yellow, which is faint on white.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def rgb(colour: str) -> tuple[int, int, int]:
    """Return the three bytes of ``#rrggbb``."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def sequential(steps: int) -> list[tuple[int, int, int]]:
    """Return this many colours of ``SEQUENTIAL``, evenly spaced."""
    anchors = [rgb(colour) for colour in SEQUENTIAL]
    table = []
    for k in range(steps):
        at = k * (len(anchors) - 1) / (steps - 1)
        low = min(int(at), len(anchors) - 2)
        pairs = zip(anchors[low], anchors[low + 1], strict=True)
        red, green, blue = (round(a + (b - a) * (at - low)) for a, b in pairs)
        table.append((red, green, blue))
    return table
