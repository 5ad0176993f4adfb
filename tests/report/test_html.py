# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages: what they say, what they draw, and what they cannot be made to do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from made import any_reports, changed, patched, report, toggle, unpatched
from report_pages import COMPARISONS, EITHER, REPORTS, Element, Page, bars, chart, many, page, shape

from tracer.model.snapshot import VmInfo
from tracer.model.text import printable
from tracer.report import html
from tracer.report.compare import Comparison, compare
from tracer.report.comparison_view import comparison_document
from tracer.report.document import Document
from tracer.report.html import report_html
from tracer.report.report import Bucket, Report, UpdateSeconds
from tracer.report.report_view import report_document

STYLE = (Path(html.__file__).parent / "templates" / "style.css").read_text()
UNSEEN = ["\0", "\x1b", "\x9b", "\u061c", "\u200b", "\u200f", "\u2028", "\u202e", "\u2066", "\ufeff"]


def says(root: Element, document: Document) -> None:
    """Check that the page has all words and figures of the document, in order."""
    assert [e.text for e in root.all("title")[:1]] == [document.title]
    assert [e.text for e in root.all("h1")] == [document.lead]
    lines = [e.text for e in root.all("main")[0].children if isinstance(e, Element) and e.tag == "p"]
    lines += [e.text for block in root.all("ul", "summary") for e in block.all("li")]
    assert sorted(lines) == sorted(document.lines)
    sections = root.all("section")[-len(document.sections) :]
    assert [s.all("h2")[0].text for s in sections] == [s.title for s in document.sections]
    for found, section in zip(sections, document.sections, strict=True):
        assert [e.text for e in found.children if isinstance(e, Element) and e.tag == "p"] == list(section.lines)
        rows = (section.table.headers, *section.table.rows) if section.table and section.table.rows else ()
        assert [row for table in found.all("table") for row in table.rows()] == [list(row) for row in rows]


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_says_all_that_its_text_says(name: str) -> None:
    says(page(REPORTS[name]), report_document(REPORTS[name]))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_says_all_that_its_text_says(name: str) -> None:
    says(page(COMPARISONS[name]), comparison_document(COMPARISONS[name]))


@given(any_reports)
@settings(max_examples=min(40, settings().max_examples))
def test_any_report_becomes_a_page(made: Report) -> None:
    source = report_html(made)
    assert not [character for character in UNSEEN if character in source]
    says(Page(source).root, report_document(made))
    comparison = compare([made], [patched()], force=True)
    says(page(comparison), comparison_document(comparison))


def test_the_verdict_has_an_emblem_and_words() -> None:
    moods = {name: page(REPORTS[name]).all("header")[0] for name in ("patched", "unpatched", "recalc")}
    assert [m.attributes["class"] for m in moods.values()] == ["present", "missing", "undecided"]
    assert len({m.all("path")[0].attributes["d"] for m in moods.values()}) == 3
    assert all(m.all("h1")[0].text.startswith("patch ") for m in moods.values())


def test_what_limits_the_figures_stands_out() -> None:
    bound, forced = page(REPORTS["lower-bound"]), page(COMPARISONS["forced"])
    assert [e.text[:11] for e in bound.all(kind="alert")] == ["LOWER BOUND"]
    assert [e.text[:6] for e in forced.all(kind="alert")] == ["FORCED"] * 2
    assert not page(REPORTS["patched"]).all(kind="alert")


def test_the_same_report_gives_the_same_page() -> None:
    assert report_html(unpatched()) == report_html(unpatched())


def test_headings_are_in_order() -> None:
    for made in EITHER:
        headings = [e.tag for e in page(made) if re.fullmatch("h[1-6]", e.tag)]
        assert headings[0] == "h1"
        assert set(headings[1:]) == {"h2"}


def test_every_drawing_has_a_name_or_is_hidden() -> None:
    for made in EITHER:
        root = page(made)
        assert root.all("html")[0].attributes["lang"] == "en"
        for drawing in root.all("svg"):
            if "aria-hidden" not in drawing.attributes:
                assert drawing.attributes["role"] == "img"
                assert drawing.attributes["aria-label"] == drawing.all("title")[0].text != ""


# --- what a page cannot be made to do ---


@pytest.mark.parametrize(
    "hostile",
    [
        "</title></style><script>alert(1)</script>",
        "\" onload=alert(1) x='",
        "{{ 7 * 7 }}{% raw %}",
        "--><!--",
        "]]><svg onload=alert(1)>",
        "&lt;b&gt;",
        "<img src=https://example.org/x>",
        "javascript:alert(1)",
        "".join(UNSEEN),
    ],
)
def test_no_name_becomes_part_of_the_page(hostile: str) -> None:
    def made(name: str) -> tuple[Report, Comparison]:
        mine = unpatched()
        call = changed(mine.calls[0], cause=name, caller=name, name=name)
        host = changed(mine.host, kernel=name, cpu=name, version=name, kvm_intel={name: name})
        vm = report(toggle(pid=7, vms={7: VmInfo(name)}), label="by VM").vms
        mine = changed(mine, label=name, calls=[call, *mine.calls], host=host, command=[name], notes=[name], vms=vm)
        return mine, compare([mine], [patched(command=(name,))], force=True)

    pairs: Iterable[tuple[Report | Comparison, Report | Comparison]] = zip(made("harmless"), made(hostile), strict=True)
    for harmless, harmful in pairs:
        root = page(harmful)
        assert shape(root) == shape(page(harmless))
        assert printable(hostile) in root.text
        assert not any(character in root.text for character in UNSEEN)


def test_the_page_loads_nothing() -> None:
    for made in EITHER:
        root = page(made)
        names = {name for element in root for name in element.attributes}
        assert not names & {"href", "xlink:href", "src", "srcset", "data", "action", "style", "background"}
        assert not [name for name in names if name.startswith("on")]
        assert not {e.tag for e in root} & {"script", "link", "iframe", "img", "image", "use", "object", "base", "a"}
        policy = root.all("meta")[1].attributes
        assert policy["http-equiv"] == "Content-Security-Policy"
        assert policy["content"].startswith("default-src 'none';")
    assert set(re.findall(r"url\(.*?\)", STYLE)) == {"url(#hatch)"}
    assert "@import" not in STYLE
    assert "@font-face" not in STYLE


def test_other_views_do_not_load_the_template_engine() -> None:
    code = "import sys, tracer.cli.report, tracer.report.formats; sys.exit('jinja2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- charts ---


def proportional(found: list[tuple[str, list[tuple[str, float]], str]]) -> None:
    """Check that the bars are as long as the numbers at their ends say."""
    numbers = [float(text.split(" (")[0].replace(",", "")) for _, _, text in found]
    total = [sum(width for _, width in parts) for _, parts, _ in found]
    scale = max(total) / max(numbers)
    assert total == pytest.approx([number * scale for number in numbers], abs=0.01)


def test_calls_per_msr_are_bars_the_longest_first() -> None:
    found = bars(chart(REPORTS["unpatched"], "Calls per MSR"))
    assert [(name, parts[0][0], text) for name, parts, text in found[:2]] == [
        ("IA32_TSC read", "calls", "102"),
        ("IA32_TSC read", "redundant", "101"),
    ]
    assert 70 < found[0][1][0][1] < 95  # percent: room for the number is left
    assert ("FS_BASE read", [("redundant", 0.0)], "0") in found
    assert len(found) == 2 * 36
    calls = [int(text) for _, parts, text in found if parts[0][0] == "calls"]
    assert calls == sorted(calls, reverse=True)
    assert sum(calls) == REPORTS["unpatched"].totals.calls
    proportional(found)


def test_calls_per_cause_and_per_update_are_bars() -> None:
    causes = bars(chart(REPORTS["patched"], "Calls per cause"))
    assert [(name, text) for name, _, text in causes] == [
        ("filter_change", "1,313"),
        ("filter_change", "1,111"),
        ("vcpu_create", "7"),
        ("vcpu_create", "0"),
    ]
    proportional(causes)
    updates = bars(chart(REPORTS["unpatched"], "Calls per filter update"))
    assert [text for _, _, text in updates] == ["30", "28", "17", "17", "13", "11"]
    proportional(updates)


def test_unknown_redundancy_has_a_note_and_no_bar() -> None:
    for title in ("Calls per MSR", "Calls per cause", "Calls per filter update"):
        figure = chart(REPORTS["unknown"], title)
        assert figure
        assert "Which calls are redundant is unknown" in figure.text
        assert not figure.all("rect", "redundant")
        assert figure.all("rect", "calls")


def test_redundancy_that_is_unknown_for_some_is_a_question_mark() -> None:
    rows = [changed(REPORTS["patched"].calls[0], redundant=None), *REPORTS["patched"].calls[3:]]
    found = bars(chart(changed(REPORTS["patched"], calls=rows), "Calls per MSR"))
    assert ("IA32_TSC read", [], "?") in found


def test_without_calls_there_is_no_chart_of_them() -> None:
    for name, words in (("unobservable", "not observable on this kernel"), ("quiet", "none were made")):
        assert chart(REPORTS[name], "Calls per MSR") is None
        assert words in page(REPORTS[name]).text
    assert chart(REPORTS["unobservable"], "Filter update times")
    assert chart(REPORTS["quiet"], "Filter update times") is None


def test_times_are_a_histogram_of_the_buckets_in_use() -> None:
    edges = [1e-6, 2e-6, 4e-6, 8e-6, 16e-6, 32e-6, 64e-6]
    buckets = [Bucket(le=le, count=count) for le, count in zip(edges, (0, 0, 3, 0, 9, 0, 0), strict=True)]
    times = UpdateSeconds(buckets=[*buckets, Bucket(le=None, count=0)], sum=1e-4, count=12)
    found = bars(chart(changed(REPORTS["patched"], filter_update_seconds=times), "Filter update times"))
    assert [(name, text) for name, _, text in found] == [
        ("1 µs to 2 µs", "0"),
        ("2 µs to 4 µs", "3"),
        ("4 µs to 8 µs", "0"),
        ("8 µs to 16 µs", "9"),
        ("16 µs to 32 µs", "0"),
    ]
    proportional(found)
    whole = bars(chart(REPORTS["patched"], "Filter update times"))
    assert (whole[0][0], whole[-1][0]) == ("up to 128 ns", "over 1.07 s")


def test_times_of_recalculations_are_a_histogram_too() -> None:
    found = bars(chart(REPORTS["recalculated"], "Recalculation times"))
    assert [(name, text) for name, _, text in found] == [
        ("4.1 µs to 8.19 µs", "0"),
        ("8.19 µs to 16.4 µs", "7"),
        ("16.4 µs to 32.8 µs", "0"),
    ]
    for name in ("patched", "recalc"):
        assert chart(REPORTS[name], "Recalculation times") is None


def test_a_comparison_draws_the_sums_and_what_is_redundant_of_them() -> None:
    found = bars(chart(COMPARISONS["comparison"], "Calls per filter update (of them redundant)"))
    assert [(name, text) for name, _, text in found] == [("unpatched", "30 (28)"), ("patched", "13 (11)")]
    proportional(found)
    (_, [useful, redundant], _), _ = found
    assert (useful[0], redundant[0]) == ("calls", "redundant")
    assert redundant[1] / useful[1] == pytest.approx(14, abs=0.01)


def test_a_comparison_draws_each_bit_the_changed_ones_first() -> None:
    figure = chart(COMPARISONS["comparison"], "Calls per filter update that name a bit (of them redundant)")
    found = bars(figure)
    assert len(found) == 2 * 30
    assert [text for _, _, text in found[:34]] == ["1 (1)", "0 (0)"] * 17
    assert found[0][0] == "IA32_TSC write"
    assert figure
    assert [e.text for e in figure.all(kind="side")[:2]] == ["unpatched", "patched"]
    assert [e.attributes["aria-label"] for e in figure.all("svg", "bar")[:2]] == [
        "IA32_TSC write, unpatched: 1 a filter update, 1 of them redundant",
        "IA32_TSC write, patched: 0 a filter update, 0 of them redundant",
    ]
    proportional(found)


def test_a_comparison_shows_the_side_whose_redundancy_is_unknown() -> None:
    found = bars(chart(COMPARISONS["half-known"], "Calls per filter update (of them redundant)"))
    assert [(parts[0][0], text) for _, parts, text in found] == [("unknown", "30 (?)"), ("calls", "13 (11)")]
    found = bars(chart(COMPARISONS["forced"], "Bits named per filter update (of them redundant)"))
    assert [text for _, _, text in found] == ["13 (11)", "? (?)"]


def test_rows_beyond_the_limit_are_only_in_the_table() -> None:
    figure = chart(many(), "Calls per MSR")
    assert figure
    assert len(figure.all("li")) == html.MOST_ROWS
    assert "and 260 more in the table" in figure.text
    assert bars(figure)[0][0].startswith("0x1012b")


# --- colours ---


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio"."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough(theme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", STYLE.split(":root {")[theme + 1]))
    for ground in ("ground", "panel"):
        for ink in ("ink", "quiet", "missing", "present", "undecided"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["ink"], colours["alert-ground"]) >= 4.5
    for line in ("calls", "redundant-line", "unknown"):
        assert contrast(colours[line], colours["ground"]) >= 3, line
    # The two kinds of bars differ in grey, too, besides their hatching.
    assert contrast(colours["calls"], colours["redundant-ground"]) >= 3
