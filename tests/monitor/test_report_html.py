"""The report as text: well-formed, complete, with the summary's numbers and nothing of the net."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from made_summaries import TASKS, made

from repmtl_kernels import SaliencyMonitor
from repmtl_kernels._monitor.colours import MISSING, rgb
from repmtl_kernels._monitor.report import _file, page, write_report
from repmtl_kernels._monitor.report.markup import Markup, element, join
from repmtl_kernels._monitor.report.png import SHADES, data_uri

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Elements in order, tables as lists of rows, and whether every tag is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables["".join(self._cell)] = self._rows
        elif tag in ("td", "th"):
            self._rows[-1].append("".join(self._cell))
        if tag in ("td", "th", "caption"):
            self._cell = None

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self._cell is not None and "title" not in self.open:
            self._cell.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(summary, title="A run") -> Page:
    return Page(page(summary, title))


def number(value: float, decimals: int = 2) -> str:
    return f"{round(float(value), decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def test_well_formed_with_one_heading_and_landmarks():
    found = parsed(made())
    assert len(found.of("h1")) == 1 and found.of("html") == [{"lang": "en"}]
    for landmark in ("header", "nav", "main", "footer"):
        assert len(found.of(landmark)) == 1
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in found.of("a")]
    assert all(link.removeprefix("#") in ids for link in links)
    named = [attributes["aria-labelledby"] for attributes in found.of("section")]
    assert set(named) <= set(ids)


def test_every_table_has_a_caption_and_scopes():
    found = parsed(made())
    assert len(found.tables) == len(found.of("table")) >= 7
    assert all(attributes.get("scope") in ("col", "row") for attributes in found.of("th"))


def test_every_figure_has_a_name():
    found = parsed(made())
    assert all(attributes["alt"] for attributes in found.of("img"))
    assert all(
        attributes["role"] == "img" and attributes["aria-label"] for attributes in found.of("svg")
    )
    assert len(found.of("svg")) == 6 + 4 + 1  # pairs, bars, shares
    assert len(found.of("img")) == 4 + 1  # maps and their scale


def test_nothing_comes_from_elsewhere():
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", page(made(), "A run"))
    assert not re.search(
        r"https?:|//|@import|<script|url\(|\bon\w+=", text.replace("data:image", "")
    )
    assert {attributes["src"][:15] for attributes in parsed(made()).of("img")} == {
        "data:image/png;"
    }


def test_numbers_are_the_summarys():
    summary = made()
    tables = parsed(summary).tables
    matrix = tables["Cosine of each pair of tasks"]
    assert matrix[0] == ["Task", *TASKS]
    for t, row in enumerate(matrix[1:]):
        assert row[0] == TASKS[t]
        for u, cell in enumerate(row[1:]):
            assert cell == ("itself" if t == u else number(summary.cosine[t, u]))
    pairs = tables["All pairs, the strongest conflict first"]
    assert len(pairs) == 1 + 6
    for row in pairs[1:]:
        t, u = (TASKS.index(name) for name in row[0].split(" and "))
        samples, positions = summary.conflicting_samples[t, u], summary.conflicting_positions[t, u]
        assert row[2] == number(summary.cosine[t, u])
        assert row[4:] == [f"{100 * samples:.0f} %", f"{100 * positions:.0f} %", "60"]
    for t, row in enumerate(tables["Share of the length of all gradients"][1:]):
        assert (row[0], row[2]) == (TASKS[t], f"{100 * summary.norm_share[t]:.0f} %")
    for t, row in enumerate(tables["Each task's part in the regulariser"][1:]):
        assert row == [TASKS[t], number(summary.tsr[t], 3), number(summary.csa[t], 3)]
    history = tables["Cosine over the run, mean of each part"]
    assert history[0][1:] == [f"{k * 500:,} to {k * 500 + 450:,}" for k in range(6)]
    (row,) = (row for row in history if row[0] == "segmentation and depth")
    assert row[1:] == [
        number(summary.history.cosine[10 * k : 10 * k + 10, 0, 1].mean()) for k in range(6)
    ]


def test_what_was_never_seen_says_so():
    found = parsed(made(unseen=(1, 2)))
    matrix = found.tables["Cosine of each pair of tasks"]
    assert matrix[2][3] == matrix[3][2] == "not seen"
    last = found.tables["All pairs, the strongest conflict first"][-1]
    assert last[:3] == ["depth and normals", "not seen together", "not seen"]
    assert last[6] == "0"
    assert not re.search(r"\bnan\b", found.text, re.I)


def test_a_clear_direction_only_has_a_colour():
    cells = [a.get("class") for a in parsed(made(unseen=(2, 3))).of("td")]
    assert cells.count("help-3") == cells.count("conflict-3") == cells.count("conflict-2") == 2
    assert cells.count("unclear") == 6


@pytest.mark.parametrize(
    "name", ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b'$x")
)
def test_names_are_escaped(name):
    found = parsed(made((name, "depth", "normals", "edges")), title=f"{name} $title")
    assert found.of("script") == [] and all("onerror" not in a for _, a in found.elements)
    assert f"{name} $title" in found.text
    assert found.tables["Cosine of each pair of tasks"][1][0] == name


@pytest.mark.parametrize("grid", (None, (12,), (3, 6, 8), (1, 1), (2, 2)))
@pytest.mark.parametrize("count", (1, 2, 7, 300))
def test_summaries_of_all_kinds(grid, count):
    for tasks in (("one",), ("a", "b"), tuple(f"task {k}" for k in range(14))):
        summary = made(tasks, count=count, grid=grid)
        found = parsed(summary)
        assert len(found.of("svg")) <= 12 + len(tasks) + 1
        if grid is None:
            assert "there are no maps" in found.text


def test_maps_of_levels_and_missing_values():
    summary = made()
    broken = summary.maps[""].clone()
    broken[0] = math.nan
    found = parsed(replace(summary, maps={"p3": summary.maps[""], "p4": broken}))
    assert "Level p3" in found.text and "Level p4" in found.text
    assert "segmentation: not seen" in found.text


def test_a_gap_in_the_history_is_a_gap_in_the_line():
    summary = made(("a", "b"))
    cosine = summary.history.cosine.clone()
    cosine[20:30] = math.nan
    gapped = replace(summary, history=replace(summary.history, cosine=cosine))
    whole, broken = (parsed(s).of("polyline") for s in (summary, gapped))
    assert len(broken) == len(whole) + 1


def test_the_same_summary_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_report(made(), tmp_path / name, title="A run")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size < 150_000


def test_arguments_are_checked(tmp_path):
    with pytest.raises(TypeError, match="summary: expected a SaliencySummary, got int"):
        write_report(1, tmp_path / "x")
    for empty in (made(count=0), SaliencyMonitor().summary()):
        with pytest.raises(ValueError, match="at least one observation, got none.*training mode"):
            write_report(empty, tmp_path / "x")
    with pytest.raises(TypeError, match="title: expected a str, got int"):
        write_report(made(), tmp_path / "x", title=1)
    assert not (tmp_path / "x").exists()


def test_markup_escapes_what_it_did_not_make():
    assert element("p", "<", Markup("<b>x</b>"), ["&"]) == "<p>&lt;<b>x</b>&amp;</p>"
    assert element("a", "x", href='"', class_="c", aria_label="l", x=None) == (
        '<a href="&quot;" class="c" aria-label="l">x</a>'
    )
    assert isinstance(join("a"), Markup) and element("g", x=1.50, y=2.0) == '<g x="1.5" y="2"></g>'


def test_map_pictures_hold_the_values():
    values = torch.tensor([[0.0, 1.0, 2.0], [4.0, 9.0, math.nan]])
    raw = base64.b64decode(data_uri(values, 4.0).partition(",")[2])
    chunks, at = {}, 8
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        chunks[raw[at + 4 : at + 8]] = raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            raw[at + 4 : at + 8 + length]
        )
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    rows = zlib.decompress(chunks[b"IDAT"])
    assert list(rows) == [0, 0, 64, 127, 0, 254, 254, SHADES]  # 63.5 and 127 of 254
    assert tuple(chunks[b"PLTE"][3 * SHADES :]) == rgb(MISSING)


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (byte / 255 for byte in rgb(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_contrast_is_aa(scheme):
    light, dark = re.findall(r":root \{(.*?)\}", _file("page.css"), re.S)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light if scheme == "light" else dark))
    for ink in ("ink", "muted", "link", "help", "conflict", "loud"):
        assert contrast(colours[ink], colours["page"]) >= 4.5, ink
    assert contrast(colours["muted"], colours["unclear"]) >= 4.5
    for side in ("help", "conflict"):
        for k in range(1, 5):
            assert contrast(colours["ink"], colours[f"{side}-{k}"]) >= 4.5, (side, k)
        assert contrast(colours[f"{side}-3"], colours[f"{side}-1"]) >= 1.3
    for graphic in ("line", "bar", "muted"):
        assert contrast(colours[graphic], colours["page"]) >= 3, graphic


def test_the_monitor_writes_the_page_of_its_summary(tmp_path):
    torch.manual_seed(0)
    monitor = SaliencyMonitor(every=1)
    heads = [torch.nn.Conv2d(4, 2, 1) for _ in range(3)]
    for _ in range(6):
        z = torch.randn(2, 4, 3, 5, requires_grad=True)
        losses = {name: head(z).square().mean() for name, head in zip("abc", heads, strict=True)}
        monitor(losses, z)
    monitor.report(tmp_path / "mine.html", title="A run")
    write_report(monitor.summary(), tmp_path / "other.html", title="A run")
    text = (tmp_path / "mine.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "other.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.tables["Cosine of each pair of tasks"][0] == ["Task", "a", "b", "c"]
    assert len(found.of("svg")) == 3 + 3 + 1 and len(found.of("img")) == 3 + 1
