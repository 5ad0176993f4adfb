# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages in Debian's chromium: that nothing covers anything, nothing is cut off, and nothing is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium
from needs import tool
from report_pages import COMPARISONS, REPORTS, many, source

from tracer.report.compare import Comparison, compare
from tracer.report.report import Report

PICTURES = Path(__file__).parents[2] / "build" / "collected" / "html"
PAGES: dict[str, Report | Comparison] = {
    "unpatched": REPORTS["unpatched"],
    "lower-bound": REPORTS["lower-bound"],
    "unknown": REPORTS["unknown"],
    "many": many(),
    "comparison": COMPARISONS["comparison"],
    "per-bit": COMPARISONS["per-bit"],
    "extremes": compare([many()], [REPORTS["unpatched"]], force=True),
}

# Pairs of words that cover each other or leave what they are in; boxes in CSS pixels.
MISPLACED = """
(() => {
  const box = e => e.getBoundingClientRect(), found = [];
  const inside = (a, b) =>
    a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 2 && a.bottom <= b.bottom + 2;
  for (const svg of document.querySelectorAll('svg.bar')) {
    const text = box(svg.querySelector('text'));
    if (!inside(text, box(svg))) found.push('outside: ' + svg.textContent);
    for (const part of svg.querySelectorAll('rect'))
      if (box(part).right > text.left) found.push('covered: ' + svg.textContent);
  }
  for (const row of document.querySelectorAll('.chart li')) {
    const boxes = [...row.querySelectorAll('.name, .side, svg.bar')].map(box);
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        found.push('overlap: ' + row.textContent);
    }));
  }
  for (const e of document.querySelectorAll('h1, h2, p, li, figure, details, .scroll, header'))
    if (!inside(box(e), box(document.documentElement))) found.push('off the page: ' + e.textContent.slice(0, 80));
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    tool("chromium")
    with Chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages, as files."""
    directory = tmp_path_factory.mktemp("pages")
    for name, made in PAGES.items():
        (directory / f"{name}.html").write_text(source(made), encoding="utf-8")
    return {name: directory / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_misplaced_in_a_browser(browser: Chromium, written: dict[str, Path], name: str, width: int) -> None:
    browser.open(written[name], width)
    assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.value(MISPLACED) == []
    assert browser.requested == [written[name].as_uri()]
    assert browser.complaints == []
    assert browser.value("performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize("name", ["unpatched", "comparison"])
def test_both_themes_are_drawn_in_a_browser(browser: Chromium, written: dict[str, Path], name: str) -> None:
    """Leaves screenshots in build/collected/html to look at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for width in (400, 1280):
        for dark in (False, True):
            browser.open(written[name], width, dark=dark)
            ground = browser.value("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)")
            picture = browser.picture()
            assert picture.startswith(b"\x89PNG")
            (PICTURES / f"{name}-{width}-{'dark' if dark else 'light'}.png").write_bytes(picture)


@pytest.mark.parametrize("name", ["unpatched", "comparison", "many"])
def test_a_printed_page_is_black_on_white_and_complete(browser: Chromium, written: dict[str, Path], name: str) -> None:
    browser.open(written[name], 680, dark=True, media="print")  # A4 without its margins, in CSS pixels
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    browser.value("document.querySelectorAll('details').forEach(e => e.open = false)")
    tables = (
        "[...document.querySelectorAll('.scroll')].filter(e => e.clientHeight < 20 || e.scrollWidth > e.clientWidth)"
    )
    assert browser.value(f"{tables}.length") == 0
    assert browser.value(MISPLACED) == []
    printed = browser.printed()
    assert printed.startswith(b"%PDF")
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / f"{name}.pdf").write_bytes(printed)
