"""The figures of saliencies and summaries: what is drawn, read back from matplotlib's objects."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from made_summaries import TASKS, made

from repmtl_kernels._monitor import map_grid, plots
from repmtl_kernels._monitor.colours import SEQUENTIAL, sequential

pytest.importorskip("matplotlib")


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def saved(figure) -> bytes:
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=60)
        return file.getvalue()


def test_affinity_prints_every_cosine():
    summary = made()
    figure = plots.plot_affinity(summary, title="A run")
    axes, bar = figure.axes
    values = [round(value, 2) + 0.0 for value in summary.cosine.flatten().tolist()]
    expected = [f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in values]
    assert texts(axes) == expected
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(TASKS)
    (image,) = axes.images
    beside = summary.cosine[~torch.eye(4, dtype=torch.bool)].abs().max().item()
    assert image.get_clim() == pytest.approx((-beside, beside)), "centred at 0"
    assert "conflict" in bar.get_ylabel() and "help" in bar.get_ylabel()
    assert axes.get_title(loc="left") == "A run"
    assert saved(figure) == saved(plots.plot_affinity(summary, title="A run"))


def test_affinity_of_a_matrix():
    matrix = torch.tensor([[4.0, -0.001], [math.nan, 9.0]], dtype=torch.float32)
    before = matrix.clone()
    axes = plots.plot_affinity(matrix, names=["a", "$b$ $c$"]).axes[0]
    assert texts(axes) == ["4.0e+00", "\N{MINUS SIGN}1.0e\N{MINUS SIGN}03", "not seen", "9.0e+00"]
    assert axes.images[0].get_clim() == pytest.approx((-0.001, 0.001))
    assert axes.get_xticklabels()[1].get_text() == "$b$ $c$"
    assert not axes.get_xticklabels()[1].get_parse_math()
    assert torch.equal(matrix.nan_to_num(7), before.nan_to_num(7))
    assert [t.get_text() for t in plots.plot_affinity(matrix).axes[0].get_xticklabels()] == [
        "0",
        "1",
    ]


def test_numbers_are_readable_on_their_cells():
    for text in plots.plot_affinity(made()).axes[0].texts:
        assert text.get_color() in ("black", "white", "#6a6f76")
    assert plots._ink((1, 1, 1, 1)) == "black" and plots._ink((0, 0.2, 0.5, 1)) == "white"


@pytest.mark.parametrize(
    "bad, names, error, message",
    [
        (
            torch.ones(2, 3),
            None,
            ValueError,
            r"affinity: expected a matrix \(T, T\), got .*\(2, 3\)",
        ),
        (torch.ones(5, 2, 2), None, ValueError, "Average saliency_affinity over the samples first"),
        ([[1.0]], None, TypeError, "affinity: expected a SaliencySummary or a Tensor .* got list"),
        (torch.full((2, 2), math.inf), None, ValueError, "expected finite values or NaN"),
        (torch.ones(2, 2), ["a"], ValueError, "names: expected 2, one for each task; got"),
        (torch.ones(2, 2), ["a", "a"], ValueError, "names: expected different names, got 'a'"),
        (torch.ones(2, 2), "ab", TypeError, "names: expected a sequence of str or None, got str"),
        (made(), list(TASKS), ValueError, "names: expected None with a summary.*; got"),
        (made(count=0), None, ValueError, "summary: expected at least one observation, got none"),
    ],
)
def test_affinity_refuses(bad, names, error, message):
    with pytest.raises(error, match=message):
        plots.plot_affinity(bad, names=names)


def test_relative_maps_written_out():
    saliency = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    saliency[1] = 0
    maps = map_grid.relative_maps(saliency, (6, 8))
    mean = saliency[:1].abs().sum(1, keepdim=True) / 5
    up = torch.nn.functional.interpolate(mean, (6, 8), mode="bilinear")[0, 0]
    torch.testing.assert_close(maps[0], up / up.max())
    assert maps[1].eq(0).all(), "a task that does not depend on the representation"
    assert map_grid.relative_maps(saliency.half(), (3, 4)).dtype == torch.float32


@pytest.mark.parametrize("channels", (1, 3))
def test_saliency_shows_all_tasks_over_the_images(channels):
    images = torch.rand(2, channels, 8, 12)
    saliencies = {name: torch.randn(2, 5, 4, 6) for name in ("a", "b", "c")}
    figure = plots.plot_saliency(images, saliencies, title="Below")
    assert [text.get_text() for text in figure.texts] == [
        "image",
        "a",
        "",
        "b",
        "",
        "c",
        "",
        "Below",
    ]
    assert len(figure.axes) == 2 * (1 + 3)
    over = [axes for axes in figure.axes if len(axes.images) == 2]
    assert len(over) == 6
    for axes, maps in zip(
        over,
        (m for s in saliencies.values() for m in map_grid.relative_maps(s, (8, 12))),
        strict=True,
    ):
        below, above = axes.images
        assert below.get_array().shape == (8, 12)
        torch.testing.assert_close(torch.tensor(above.get_array().data), maps)
        assert above.get_alpha() == map_grid.COVER and above.get_clim() == (0, 1)
    assert saved(figure) == saved(plots.plot_saliency(images, saliencies, title="Below"))


def test_saliency_takes_sequences_and_bytes():
    images = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
    stacked = torch.randn(2, 1, 5, 2, 2, requires_grad=True)
    figures = [plots.plot_saliency(images, s, names=["x", "y"]) for s in (stacked, list(stacked))]
    assert saved(figures[0]) == saved(figures[1])
    assert [t.get_text() for t in plots.plot_saliency(images, stacked).texts][1::2][:2] == [
        "0",
        "1",
    ]


@pytest.mark.parametrize(
    "images, saliencies, error, message",
    [
        (torch.rand(2, 2, 4, 4), [torch.rand(2, 3, 2, 2)], ValueError, "images: expected shape"),
        (
            torch.randn(2, 1, 4, 4) * 9,
            [torch.rand(2, 3, 2, 2)],
            ValueError,
            "Undo the normalisation",
        ),
        (torch.ones(2, 1, 4, 4, dtype=torch.int64), [torch.rand(2, 3, 2, 2)], TypeError, "uint8"),
        ([1], [torch.rand(2, 3, 2, 2)], TypeError, "images: expected a Tensor"),
        (
            torch.rand(2, 1, 4, 4),
            [torch.rand(1, 3, 2, 2)],
            ValueError,
            r"saliencies\['0'\]: .*\(2, C",
        ),
        (torch.rand(2, 1, 4, 4), [torch.rand(2, 3, 2)], ValueError, r"saliencies\['0'\]: expected"),
        (torch.rand(2, 1, 4, 4), [None], TypeError, r"saliencies\['0'\]: .* got NoneType"),
        (torch.rand(2, 1, 4, 4), [], ValueError, "at least one task"),
    ],
)
def test_saliency_refuses(images, saliencies, error, message):
    with pytest.raises(error, match=message):
        plots.plot_saliency(images, saliencies)


def test_history_has_the_values():
    summary = made()
    figure = plots.plot_history(summary, title="A run")
    cosine, share, tsr, csa, ratio = figure.axes
    names = [text.get_text() for text in cosine.get_legend().get_texts()]
    assert len(names) == 6 and set(names) == {
        f"{a}, {b}" for k, a in enumerate(TASKS) for b in TASKS[k + 1 :]
    }
    (line,) = (
        line for line, name in zip(cosine.get_lines(), names, strict=False)
        if name == "segmentation, depth"
    )  # fmt: skip
    assert line.get_xdata().tolist() == summary.history.steps.tolist()
    assert line.get_ydata().tolist() == summary.history.cosine[:, 0, 1].tolist()
    for axes, field in ((share, "norm_share"), (tsr, "tsr"), (csa, "csa")):
        drawn = [line.get_ydata().tolist() for line in axes.get_lines()]
        assert drawn == getattr(summary.history, field).T.tolist()
    assert ratio.get_lines()[0].get_ydata().tolist() == summary.history.ratio.tolist()
    assert ratio.get_legend() is None
    styles = [(line.get_color(), line.get_linestyle()) for line in cosine.get_lines()[:6]]
    assert len(set(styles)) == 6


def test_history_of_many_pairs_of_none_and_of_nothing():
    many = made(tuple(f"_{k}$x$" for k in range(7)))
    axes = plots.plot_history(many).axes[0]
    assert axes.get_ylabel() == "cosine, 10 of 21 pairs"
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(names) == 10 and names[0] == "_0$x$, _1$x$"
    saved(plots.plot_history(many))
    assert saved(plots.plot_history(made(("one",))))
    without = replace(made(), history=replace(made().history, ratio=torch.full((60,), math.nan)))
    assert len(plots.plot_history(without).axes) == 4
    with pytest.raises(TypeError, match="summary: expected a SaliencySummary, got Tensor"):
        plots.plot_history(torch.ones(2, 2))
    with pytest.raises(ValueError, match="summary: expected at least one observation, got none"):
        plots.plot_history(made(count=0))


def test_colours_get_lighter_evenly():
    shades = sequential(255)
    assert shades[0] == (0, 0, 4) and len(set(shades)) == 255 and len(SEQUENTIAL) == 9
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in shades]
    assert all(b > a for a, b in itertools.pairwise(light))


def test_figures_leave_pyplot_alone():
    code = (
        "import sys, torch; from repmtl_kernels._monitor.plots import *;"
        "plot_affinity(torch.eye(2)).savefig(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, timeout=120)


@pytest.mark.parametrize(
    "call",
    (
        lambda: plots.plot_affinity(torch.eye(2)),
        lambda: plots.plot_saliency(torch.rand(1, 1, 2, 2), [torch.rand(1, 1, 1, 1)]),
        lambda: plots.plot_history(made()),
    ),
)
def test_without_matplotlib_the_extra_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"plot_\w+ needs matplotlib.*repmtl-kernels\[plot\]"
    ):
        call()
