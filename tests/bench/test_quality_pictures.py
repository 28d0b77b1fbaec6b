"""Pictures of a study's rows."""

from __future__ import annotations

import pytest

from benchmarks.quality import pictures

pytest.importorskip("matplotlib")


def test_the_figure_of_exponents():
    """A panel for each data set; a part without an exponent is not in it."""
    rows = [
        {
            "dataset": dataset, "method": method, "seed": seed,
            "spectra": {"all": {"encoder": 3.0 + seed, "a": 2.0, "b": None}},
        }
        for dataset in ("one", "two") for method in ("equal", "Rep-MTL") for seed in (0, 1)
    ]  # fmt: skip
    figure = pictures.exponents_figure(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    for axes in figure.axes:
        _, names = axes.get_legend_handles_labels()
        assert names == ["well trained", "encoder", "a"]
        encoder, a = axes.containers
        assert encoder[0].get_xdata().tolist() == [3.5, 3.5] and a[0].get_xdata().tolist() == [2, 2]
    assert pictures.exponents_figure([{"dataset": "one", "method": "equal"}]) is None
