# SPDX-License-Identifier: GPL-2.0-or-later
"""The README stays short, and links and file names in the docs are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from project import PROJECT, REPO

README = REPO / "README.md"
PAGES = [
    README,
    *(REPO / f"{name}.md" for name in ("SECURITY", "CONTRIBUTING")),
    *sorted((REPO / "docs").glob("*.md")),
    REPO / "tests/kvmhost/README.md",
]
_LINES, _COLUMNS = 150, 100

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_INDENTED = re.compile(r"^    .*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
#: A file of the checkout; NAME and * stand for others.
_FILE = re.compile(r"(?:bpf|dashboards|docs|tests|tracer)/[\w./-]+\.\w+")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _INDENTED.sub("", _FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def links(page: Path) -> list[str]:
    """The relative links of the page."""
    return [link for link in _LINK.findall(_CODE.sub("", prose(page))) if "://" not in link]


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= _LINES
    assert [line for line in lines if len(line) > _COLUMNS] == []


def test_the_package_shows_the_readme() -> None:
    assert PROJECT["readme"] == README.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_link_is_valid(page: Path) -> None:
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = {code for code in _CODE.findall(page.read_text()) if _FILE.fullmatch(code) and "NAME" not in code}
    assert [name for name in sorted(named) if not (REPO / name).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    reached = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert {*(REPO / "docs").glob("*.md")} <= reached


def test_links_and_headings_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, and `code`\n[a](b.md#c) `[no](link)`\n\n    [no](link)\n    # no heading\n\n```\n[no](link)\n```\n"
        "## A page, and `code`\n[web](https://example.com/) ![picture](p.png)\n"
    )
    assert links(page) == ["b.md#c", "p.png"]
    assert anchors(page) == {"a-page-and-code", "a-page-and-code-1"}
