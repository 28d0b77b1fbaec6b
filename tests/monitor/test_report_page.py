"""The report in Chromium: what a reader sees, hears and reaches with the keyboard."""

from __future__ import annotations

import shutil

import pytest
from made_summaries import TASKS, made

from repmtl_kernels._monitor.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium"),
    pytest.mark.slow,
    pytest.mark.slow_cpu,
]

TITLE = "A run <b>&</b>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(made(("<script>alert(1)</script>", *TASKS[1:]), unseen=(2, 3)), path, title=TITLE)
    return path


@pytest.fixture
def opened(browser, file):
    """Return a function that opens the page in a window of its own; it adds what goes wrong."""
    contexts = []

    def open_page(width=1400, scheme="light", **how):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **how
        )
        contexts.append(context)
        page = context.new_page()
        page.wrongs, page.requested = [], []
        page.on("console", lambda message: page.wrongs.append(message.text))
        page.on("pageerror", lambda error: page.wrongs.append(str(error)))
        page.on("dialog", lambda dialog: (page.wrongs.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(file.as_uri(), wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_opens_without_an_error_and_without_the_network(opened, file):
    page = opened()
    assert page.wrongs == []
    others = {url for url in page.requested if not url.startswith("data:")}
    assert others == {file.as_uri()}
    assert page.title() == TITLE and page.locator("h1").inner_text() == TITLE


def test_figures_are_there(opened):
    page = opened()
    assert page.locator("section").count() == 8
    images = page.locator("img").evaluate_all(
        "all => all.map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(images) == 5 and all(done and natural and shown for done, natural, shown in images)
    for box in page.locator("svg").evaluate_all("all => all.map(s => s.getBoundingClientRect())"):
        assert box["width"] > 50 and box["height"] > 10
    cell = page.locator(".matrix td.help-3").first
    assert cell.evaluate("c => getComputedStyle(c).backgroundColor") != "rgba(0, 0, 0, 0)"


@pytest.mark.parametrize("width", (360, 1400))
def test_the_page_is_not_wider_than_the_window(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("details").evaluate_all("all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll("p, h1, h2, figure, li, caption, dd")]
            .filter(e => e.getBoundingClientRect().right > width + 0.5).map(e => e.textContent)"""
    , width)  # fmt: skip
    assert outside == []


def test_the_tab_key_reaches_all_in_order(opened):
    page = opened()
    wanted = page.evaluate(
        """[...document.querySelectorAll("a, summary, [tabindex='0']")]
            .filter(e => !e.closest("details > div"))
            .map((e, k) => e.dataset.number = k)"""
    )
    assert len(wanted) >= 1 + 8 + 2 + 6  # skip link, sections, details, tables
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """(() => {
                const e = document.activeElement, box = e.getBoundingClientRect();
                return [e.dataset.number, getComputedStyle(e).outlineStyle, box.left >= 0];
            })()"""
        )
        assert seen[1:] == ["solid", True], "the focus is visible"
        reached.append(int(seen[0]))
    assert reached == list(range(len(wanted)))


def test_the_skip_link_leads_to_the_content(opened):
    page = opened()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def test_screen_readers_hear_names(opened):
    page = opened()
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    by_role: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            role = node["role"]["value"]
            by_role.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    named = "heading link image table columnheader rowheader region navigation DisclosureTriangle"
    for role in named.split():
        assert by_role.get(role), role
        assert all(by_role[role]), role
    assert len(by_role["main"]) == len(by_role["banner"]) == len(by_role["contentinfo"]) == 1
    assert by_role["heading"][0] == TITLE
    assert "Cosine of depth and edges over the training steps" in by_role["image"]
    assert "Cosine of each pair of tasks" in by_role["table"]
    assert len(set(by_role["DisclosureTriangle"])) == 2, "each says which numbers"


def test_light_and_dark_differ(opened):
    pictures, colours = [], []
    for scheme in ("light", "dark"):
        page = opened(scheme=scheme)
        pictures.append(page.screenshot(full_page=True))
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert pictures[0] != pictures[1]
    assert colours == ["rgb(253, 253, 252)", "rgb(18, 21, 25)"]


def test_paper_is_white_and_has_all_numbers(opened):
    page = opened(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.locator("details table").first.is_visible()
    assert page.pdf().startswith(b"%PDF")
