"""The report in a real browser: what is drawn, keys, themes, widths, and hostile texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import NAMES, Browser, find_browser, open_browser
from support.hostile_run import EVIL, hostile_run
from support.paths import ROOT
from support.reported_runs import finished_run

from minidistill.reporting.html import summary_html, write_comparison, write_report

PATH = find_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no browser: {', '.join(NAMES)}")

# Each chart, with what is wrong in it: no marks, marks outside of its box, labels that overlap.
PROBLEMS = """
[...document.querySelectorAll("svg.chart")].flatMap((svg) => {
  const name = svg.getAttribute("aria-label").slice(0, 60), problems = [];
  const marks = [...svg.querySelectorAll(".line, .faint, .dot")];
  if (!svg.querySelector(".line, .dot")) problems.push("nothing is drawn");
  for (const mark of marks) {
    const { x, y, width, height } = mark.getBBox();
    const stroke = mark.getTotalLength() + height + width;
    if (!(stroke > 0) && !mark.getAttribute("d")?.endsWith("h0")) problems.push("a mark is empty");
    if (x < 0 || y < 0 || x + width > svg.viewBox.baseVal.width
        || y + height > svg.viewBox.baseVal.height) problems.push("a mark is outside");
    const { visibility, stroke: line, fill } = getComputedStyle(mark);
    if (visibility !== "visible" || (line === "none" && fill === "none")) problems.push("unseen");
  }
  const outer = svg.getBoundingClientRect();
  const labels = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  labels.forEach((a, i) => {
    if (a.left < outer.left - 1 || a.right > outer.right + 1 || a.bottom > outer.bottom + 1)
      problems.push("a label is clipped: " + svg.querySelectorAll("text")[i].textContent);
    labels.slice(i + 1).forEach((b) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        problems.push("labels overlap: " + svg.querySelectorAll("text")[i].textContent);
    });
  });
  return problems.map((problem) => name + ": " + problem);
})
"""
# The contrast of each text with what is behind it, as WCAG counts it, where it is under 4.5.
PALE = """
(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
  };
  const pale = new Set();
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.closest("script")) continue;
    const style = getComputedStyle(element), inSvg = element.closest("svg");
    const [a, b] = [light(inSvg ? style.fill : style.color), light(behind(element))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) pale.add(`${element.tagName} ${element.className} ${contrast.toFixed(2)}`);
  }
  return [...pale];
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PATH is not None
    with open_browser(PATH) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    hostile, usual = hostile_run(folder / "<b>hostile"), finished_run(folder / "sokoban")
    running = finished_run(folder / "running")
    (running / "scoreboard.json").unlink()
    fragment = folder / "summary.html"
    fragment.write_text(f"<!doctype html><meta charset=utf-8>{summary_html(hostile)}")
    return {
        "hostile": write_report(hostile),
        "usual": write_report(usual),
        "comparison": write_comparison([hostile, usual], folder / "comparison.html"),
        "running": write_report(running, folder / "running.html", unfinished="running"),
        "summary": fragment,
    }


def test_the_hostile_page_is_small_enough(pages: dict[str, Path]) -> None:
    assert 500_000 < pages["hostile"].stat().st_size < 2_000_000
    assert pages["comparison"].stat().st_size < 2_000_000


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name", ["hostile", "usual", "comparison", "summary"])
def test_a_page(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width, 800, dark)
    assert browser.value("document.documentElement.scrollWidth") == width
    browser.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.errors == []
    assert browser.requests == [pages[name].as_uri()]
    if name != "summary":
        assert browser.value("document.querySelectorAll('svg.chart').length") >= 7
        assert browser.value(PROBLEMS) == []
        assert browser.value(PALE) == []
        ids = browser.value("[...document.querySelectorAll('[id]')].map((e) => e.id)")
        assert len(ids) == len(set(ids))


def test_hostile_texts_are_only_texts(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("hostile", "comparison"):
        browser.open(pages[name])
        assert browser.value("document.scripts.length") == 1
        assert browser.value("document.images.length") == 0
        text = str(browser.value("document.body.textContent"))
        assert EVIL in text
        assert not set(text) & set("\x00\x1b\u202e\u2066")
        assert not re.search("[\ud800-\udfff]", text)


def test_a_script_that_is_not_the_pages_own_does_not_run(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    added = "<script>document.title = 'changed'</script><img src=x onerror='document.title = 1'>"
    page.write_text(pages["usual"].read_text().replace("</h1>", f"</h1>{added}"))
    browser.open(page)
    assert browser.value("document.title") == "sokoban · minidistill"
    assert len([error for error in browser.errors if "Content Security Policy" in error]) >= 2


def test_keys_go_from_sample_to_sample(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])

    def focused() -> str:
        return str(browser.value("document.activeElement.id"))

    browser.key("j")
    assert focused() == "sample-1"
    for _ in range(5):
        browser.key("j")
    assert focused() == "sample-6"  # which was folded away
    assert browser.value("document.activeElement.checkVisibility()")
    browser.key("k")
    browser.key("ArrowLeft")
    browser.key("ArrowRight")
    assert focused() == "sample-5"
    top = "document.activeElement.getBoundingClientRect().top"
    settled = f"new Promise((done) => setTimeout(() => done({top}), 150))"
    browser.value("document.documentElement.style.scrollBehavior = 'auto'")
    browser.key("k")
    assert 0 <= browser.value(settled) < 100
    # the question stays in view, below the parts' names, as far as the answers reach
    browser.value("scrollBy(0, document.activeElement.offsetHeight / 2)")
    question = "document.activeElement.querySelector('.question').getBoundingClientRect().top"
    assert 0 < browser.value(question) < 100


def test_the_skip_link_and_the_focus_are_seen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["usual"])
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab",
                 windowsVirtualKeyCode=9)  # fmt: skip
    assert browser.value("document.activeElement.className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().top") >= 0
    assert browser.value("getComputedStyle(document.activeElement).outlineWidth") == "3px"


def test_the_pointer_shows_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["usual"])
    find = (
        "[...document.querySelectorAll('figure')].find((f) => f.innerText.includes('Teacher KL'))"
    )
    browser.value(f"{find}.scrollIntoView({{ behavior: 'instant', block: 'center' }})")
    box = browser.value(f"{find}.querySelector('svg').getBoundingClientRect().toJSON()")
    legend = f"{find}.querySelector('.legend').textContent"
    before = browser.value(legend)
    assert "4.93 → 0.246" in before
    right = box["left"] + box["width"] * 0.94
    browser.point(right, box["top"] + box["height"] / 2)
    assert "teacher_kl 0.246" in browser.value(legend)
    assert "at step 20" in browser.value(legend)
    browser.point(1, 1)
    assert browser.value(legend) == before


def test_a_running_page_keeps_its_place_when_it_is_loaded_again(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["running"])
    assert "s ago" in browser.value("document.getElementById('age').textContent")
    assert browser.value("document.getElementById('silent').hidden")
    browser.value("document.querySelectorAll('details').forEach((d, i) => { d.open = i == 2; })")
    browser.value("document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, 900)")
    place = browser.value("scrollY")
    assert place > 300
    browser.reload()
    assert browser.value("scrollY") == place
    opened = "[...document.querySelectorAll('details')].findIndex((d) => d.open)"
    assert browser.value(opened) == 2
    # nothing new for a long time, which a reload shows
    old = re.sub(
        r'datetime="[^"]*"', 'datetime="2020-01-01T00:00:00+00:00"', pages["running"].read_text()
    )
    pages["running"].write_text(old)
    browser.reload()
    assert not browser.value("document.getElementById('silent').hidden")
    assert browser.value("getComputedStyle(document.getElementById('silent')).display") == "block"


def test_the_pictures_in_the_documents_are_small() -> None:
    pictures = sorted((ROOT / "docs" / "report").glob("*.png"))
    assert len(pictures) >= 4
    assert all(picture.stat().st_size < 200_000 for picture in pictures)
