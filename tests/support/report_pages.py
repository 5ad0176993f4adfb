# SPDX-License-Identifier: GPL-2.0-or-later
"""HTML pages to test: the reports that they show, and a parser for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

from made import patched, recalc, recalculated, report, toggle, unpatched

from tracer.model.snapshot import Call, Map, Outcome, Snapshot
from tracer.report.compare import Comparison, compare
from tracer.report.html import comparison_html, report_html
from tracer.report.report import Report

VOID = {"meta"}
DROPPED = toggle(maps=(Map("calls", 8192, 8192, 17),))
UNKNOWN = toggle(patched=False, exact=False, redundancy="unknown")
UNOBSERVABLE = Snapshot("filter-only", "unknown", updates=toggle().updates, calls_observable=False)
REPORTS = {
    "patched": patched(),
    "unpatched": unpatched(),
    "recalc": report(recalc(), label="6.18"),
    "recalculated": report(recalculated(), label="recalculated"),
    "by-vm": report(toggle(pid=4711), label="by VM"),
    "lower-bound": report(DROPPED),
    "unknown": report(UNKNOWN, label="unknown"),
    "unobservable": report(UNOBSERVABLE),
    "quiet": report(Snapshot("toggle"), command=None, exit_status=None),
}


def against(base: str, new: str) -> Comparison:
    return compare([REPORTS[base]], [REPORTS[new]], force=True)


COMPARISONS = {
    "comparison": against("unpatched", "patched"),
    "per-bit": against("patched", "recalc"),
    "forced": against("lower-bound", "unobservable"),
    "half-known": against("unknown", "patched"),
}
EITHER: tuple[Report | Comparison, ...] = (*REPORTS.values(), *COMPARISONS.values())


def many() -> Report:
    """A report on 300 MSRs, with the longest possible names and numbers."""
    calls = {
        Call(index, "read", "enable", "filter_change", "f" * 60): Outcome(2**40 + index, 2**40, index, 0, 0)
        for index in range(0x10000, 0x10000 + 300)
    }
    return report(replace(toggle(), calls=calls), label="m" * 80, command=["c" * 4000])


@dataclass
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", kind: str = "") -> list[Element]:
        """The elements below it with a tag and a class, in order."""
        return [e for e in self if tag in ("", e.tag) and (not kind or kind in e.attributes.get("class", "").split())]

    def __iter__(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def rows(self) -> list[list[str]]:
        """The cells of a table."""
        return [[cell.text for cell in row if cell.tag in {"td", "th"}] for row in self.all("tr")]


class Page(HTMLParser):
    """Builds the tree of a page; every element must be closed correctly."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Element("")
        self._open = [self.root]
        self.feed(source)
        self.close()
        assert self._open == [self.root], "not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"twice the same attribute: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment {data}")


def source(of: Report | Comparison) -> str:
    """The page of a report or a comparison."""
    return report_html(of) if isinstance(of, Report) else comparison_html(of)


def page(of: Report | Comparison) -> Element:
    """That page, parsed."""
    return Page(source(of)).root


def chart(of: Report | Comparison, title: str) -> Element | None:
    """The figure below a heading."""
    for section in page(of).all("section"):
        if section.all("h2")[0].text == title:
            return next(iter(section.all("figure")), None)
    return None


def shape(root: Element) -> list[tuple[str, list[str]]]:
    """What there is beside words."""
    return [(element.tag, sorted(element.attributes)) for element in root]


def lengths(bar: Element) -> list[tuple[str, float]]:
    """The parts of a bar: their kinds, and their widths in percent."""
    return [(e.attributes["class"], float(e.attributes["width"].removesuffix("%"))) for e in bar.all("rect")]


def bars(figure: Element | None) -> list[tuple[str, list[tuple[str, float]], str]]:
    """For each bar: its side, its parts, and the text at its end."""
    assert figure
    return [
        (row.all(kind="name")[0].text, lengths(bar), bar.all("text")[0].text)
        for row in figure.all("li")
        for bar in row.all("svg")
    ]
