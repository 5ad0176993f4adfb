# SPDX-License-Identifier: GPL-2.0-or-later
"""A report or a comparison as one HTML file: the sentences and tables of the other views, with charts in SVG.

The page loads nothing and has no script; its content security policy forbids both. What it shows may come from a
hostile report file or somebody else's command line: the templates escape it, and text.py has made it printable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tracer.model import msr
from tracer.model.quantity import duration, number, rate
from tracer.report.compare import Comparison, PerUpdate, Side
from tracer.report.compare import Row as BitRow
from tracer.report.comparison_view import comparison_document
from tracer.report.document import Document, Section
from tracer.report.report import CallRow, Report, UpdateSeconds, redundant_sum
from tracer.report.report_view import report_document

#: The most rows of a chart; the table below it has them all.
MOST_ROWS = 40

_VERDICT = {True: "present", False: "missing", None: "undecided"}
_ALERTS = ("LOWER BOUND", "FORCED", "warning")  # how lines begin that must stand out

_CHART_PIXELS = 250  # the least width of a bar and its number, on a page 400 pixels wide
_CHARACTER_PIXELS = 8.6  # a digit, in the widest of the common fonts
_LONGEST = 13  # characters of a number at a bar of a comparison; the table has the full one

_CALLS, _REDUNDANT, _UNKNOWN = "calls", "redundant", "unknown"  # kinds of bars, coloured by style.css
_REDUNDANT_WORDS = "redundant: changed no bit of the MSR bitmap"
_UNKNOWN_WORDS = "Which calls are redundant is unknown: this trace could not see the bitmap."

Number = int | Fraction | float


@dataclass(frozen=True)
class Part:
    """A rectangle of a bar: from `start` on, `width` long, both in percent of the chart's width."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True)
class Bar:
    """A bar stacked of `amounts`, by kind, with `text` at its end; `side` says which side of a comparison it is for.

    `spoken` is the label for screen readers.
    """

    amounts: tuple[tuple[str, Number], ...]
    text: str
    spoken: str
    side: str = ""
    parts: tuple[Part, ...] = ()

    @property
    def length(self) -> Number:
        """The sum of its amounts."""
        return sum((amount for _, amount in self.amounts), Fraction())

    @property
    def end(self) -> float:
        """Where its text begins, in percent of the chart's width."""
        return sum(part.width for part in self.parts)


@dataclass(frozen=True)
class Row:
    """The bars of one thing; `detail` follows its name in smaller letters."""

    name: str
    detail: str = ""
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Rows of bars on one scale.

    `legend` has pairs of a kind and its meaning; `more` says how many rows were left out.
    """

    title: str
    rows: tuple[Row, ...]
    legend: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    more: str = ""
    big: bool = False

    @property
    def sides(self) -> bool:
        """Whether its bars are labelled by side."""
        return any(bar.side for row in self.rows for bar in row.bars)


@dataclass(frozen=True)
class _Part:
    """A section of the document and the chart that belongs to it."""

    section: Section
    chart: Chart | None


def report_html(report: Report) -> str:
    """The report as an HTML page."""
    charts = [
        _msr_chart(report),
        _cause_chart(report),
        _exit_chart(report),
        _time_chart("Filter update times", report.filter_update_seconds, "filter updates"),
        _time_chart("Recalculation times", report.recalculation_seconds, "recalculations"),
    ]
    return _page(report_document(report), _update_chart(report), charts, _VERDICT[report.verdict.patched])


def comparison_html(comparison: Comparison) -> str:
    """The comparison as an HTML page."""
    document = comparison_document(comparison)
    return _page(document, _both_chart(comparison), [_bits_chart(comparison)], "comparison")


def _page(document: Document, first: Chart | None, charts: Sequence[Chart | None], mood: str) -> str:
    by_title = {chart.title: scaled(chart) for chart in charts if chart}
    return (
        _environment()
        .get_template("page.html")
        .render(
            document=document,
            mood=mood,
            alerts=[line for line in document.lines if line.startswith(_ALERTS)],
            lines=[line for line in document.lines if not line.startswith(_ALERTS)],
            first=scaled(first) if first else None,
            parts=[_Part(section, by_title.get(section.title)) for section in document.sections],
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def scaled(chart: Chart) -> Chart:
    """The chart with the parts of its bars laid out: in proportion, as long as the numbers leave room for."""
    bars = [bar for row in chart.rows for bar in row.bars]
    longest = max((bar.length for bar in bars), default=0)
    text = max((len(bar.text) for bar in bars), default=0) * _CHARACTER_PIXELS + 12
    room = max(10.0, 100 * (1 - text / _CHART_PIXELS))

    def drawn(bar: Bar) -> Bar:
        parts: list[Part] = []
        for kind, amount in bar.amounts:
            width = float(Fraction(amount) / Fraction(longest)) * room if longest else 0.0
            parts.append(Part(kind, sum(part.width for part in parts), width))
        return replace(bar, parts=tuple(parts))

    rows = tuple(replace(row, bars=tuple(map(drawn, row.bars))) for row in chart.rows)
    return replace(chart, rows=rows)


def _limited(rows: Sequence[Row]) -> tuple[tuple[Row, ...], str]:
    """The first rows, and a note on how many more there are."""
    more = len(rows) - MOST_ROWS
    return tuple(rows[:MOST_ROWS]), f"and {more:,} more in the table" if more > 0 else ""


def _pair(what: str, calls: Number, redundant: Number | None, known: bool) -> tuple[Bar, ...]:
    """Two bars, of calls and of redundant ones; the second only if `known`: for anything on the chart."""
    bars = [Bar(((_CALLS, calls),), rate(calls), f"{what}: {rate(calls)} calls")]
    if known:
        amounts = () if redundant is None else ((_REDUNDANT, redundant),)
        bars.append(Bar(amounts, rate(redundant), f"{what}: {rate(redundant)} redundant calls"))
    return tuple(bars)


def _pairs_chart(
    title: str, rows: Sequence[tuple[Row, Number, Number | None]], *, about: str = "", big: bool = False
) -> Chart:
    """A chart of rows with their calls and redundant calls; `about` follows a row's name in the spoken label."""
    known = any(redundant is not None for _, _, redundant in rows)
    drawn, more = _limited(
        [
            replace(row, bars=_pair(f"{row.name} {row.detail}".rstrip() + about, calls, redundant, known))
            for row, calls, redundant in rows
        ]
    )
    legend, notes = ((_CALLS, "calls"), (_REDUNDANT, _REDUNDANT_WORDS)), (_UNKNOWN_WORDS,)
    return Chart(title, drawn, legend, (), more, big) if known else Chart(title, drawn, legend[:1], notes, more, big)


def _update_chart(report: Report) -> Chart | None:
    each = report.per_filter_update
    if each is None:
        return None
    rows = [
        (Row("all calls"), each.calls, each.redundant),
        (Row("enable"), each.enable, each.enable_redundant),
        (Row("disable"), each.disable, each.disable_redundant),
    ]
    return _pairs_chart("Calls per filter update", rows, about=", per filter update", big=True)


def _sums_chart(report: Report, title: str, groups: Iterable[tuple[Row, list[CallRow]]]) -> Chart | None:
    """A chart of the calls of each group, the largest first; None if there is nothing to draw."""
    sums = [(row, sum(call.calls for call in calls), redundant_sum(calls)) for row, calls in groups]
    if report.totals.calls is None or not sums:
        return None
    return _pairs_chart(title, sorted(sums, key=lambda group: -group[1]))


def _msr_chart(report: Report) -> Chart | None:
    groups: dict[tuple[int, str, str], list[CallRow]] = defaultdict(list)
    for row in report.calls:
        groups[row.index, row.access, row.name].append(row)
    named = ((Row(name, access.replace("_", " + ")), found) for (_, access, name), found in sorted(groups.items()))
    return _sums_chart(report, "Calls per MSR", named)


def _cause_chart(report: Report) -> Chart | None:
    groups: dict[str, list[CallRow]] = defaultdict(list)
    for row in report.calls:
        groups[row.cause].append(row)
    return _sums_chart(report, "Calls per cause", ((Row(cause), found) for cause, found in sorted(groups.items())))


def _exit_chart(report: Report) -> Chart | None:
    """A chart of the exits of each access, the most first, with what filters alone caused set apart."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in report.exits or ():
        pair = sums[row.name, row.access]
        pair[0] += row.exits
        pair[1] += row.exits_by_filter
    if not sums:
        return None
    rows = []
    for (name, access), (exits, by_filter) in sorted(sums.items(), key=lambda item: -item[1][0])[:MOST_ROWS]:
        amounts = ((_CALLS, exits - by_filter), (_REDUNDANT, by_filter))
        spoken = f"{name} {access}: {number(exits)} exits, {number(by_filter)} of them since a filter alone denies it"
        rows.append(Row(name, access, (Bar(amounts, number(exits), spoken),)))
    legend = ((_CALLS, "exits"), (_REDUNDANT, "exits since the VM's filter alone denies the access"))
    return Chart("Exits", tuple(rows), legend)


def _time_chart(title: str, times: UpdateSeconds | None, what: str) -> Chart | None:
    """A histogram: the buckets in use and one on either side, shortest first. `what` names what is timed."""
    used = [place for place, bucket in enumerate(times.buckets) if bucket.count] if times else []
    if times is None or not used:
        return None
    rows = []
    for place in range(max(0, used[0] - 1), min(len(times.buckets), used[-1] + 2)):
        bucket = times.buckets[place]
        span = _span(times.buckets[place - 1].le if place else None, bucket.le)
        spoken = f"{span}: {number(bucket.count)} {what}"
        rows.append(Row(span, bars=(Bar(((_CALLS, bucket.count),), number(bucket.count), spoken),)))
    more = f"and {len(rows) - MOST_ROWS:,} longer times" if len(rows) > MOST_ROWS else ""
    legend = ((_CALLS, f"{what} that took this long"),)
    return Chart(title, tuple(rows[:MOST_ROWS]), legend, more=more)


def _span(low: float | None, high: float | None) -> str:
    """The range of a bucket in words; its bounds are in seconds."""
    if high is None:
        return "any other time" if low is None else f"over {duration(low)}"
    return f"up to {duration(high)}" if low is None else f"{duration(low)} to {duration(high)}"


def _side_bar(side: Side, of: PerUpdate, what: str) -> Bar:
    """The calls of a filter update on one side, split into those that changed something and redundant ones."""
    amounts: tuple[tuple[str, Number], ...] = ()
    if of.calls is not None and of.redundant is not None:
        amounts = ((_CALLS, of.calls - of.redundant), (_REDUNDANT, of.redundant))
    elif of.calls is not None:
        amounts = ((_UNKNOWN, of.calls),)
    spoken = f"{what}, {side.title}: {rate(of.calls)} a filter update, {rate(of.redundant)} of them redundant"
    return Bar(amounts, f"{_short(of.calls)} ({_short(of.redundant)})", spoken, side.title)


def _short(value: Fraction | None) -> str:
    text = rate(value)
    return text if value is None or len(text) <= _LONGEST else f"{float(value):.2e}"


def _side_legend(what: str, rows: Iterable[Row]) -> tuple[tuple[str, str], ...]:
    """The legend of the rows: `what` describes calls that are not redundant; "unknown" only if a row has some."""
    legend = ((_CALLS, what), (_REDUNDANT, _REDUNDANT_WORDS), (_UNKNOWN, "unknown which of the two"))
    drawn = {kind for row in rows for bar in row.bars for kind, _ in bar.amounts}
    return legend if _UNKNOWN in drawn else legend[:2]


def _both_chart(comparison: Comparison) -> Chart | None:
    """A chart of the sums of both sides."""
    sides = (comparison.base, comparison.new)
    figures = [comparison.per_update(side) for side in sides]
    if all(figure.calls is None for figure in figures):
        return None
    bars = [
        replace(_side_bar(side, figure, f"all {comparison.unit}s"), side="")
        for side, figure in zip(sides, figures, strict=True)
    ]
    rows = tuple(Row(side.title, bars=(bar,)) for side, bar in zip(sides, bars, strict=True))
    title, what = "Calls per filter update", "calls that changed a bit"
    if comparison.unit == "bit":
        title, what = "Bits named per filter update", "bits that changed"
    return Chart(f"{title} (of them redundant)", rows, _side_legend(what, rows), big=True)


def _bits_chart(comparison: Comparison) -> Chart | None:
    """A chart of the bits, those that differ most first."""
    if not comparison.rows:
        return None

    def change(row: BitRow) -> Fraction:
        return abs((row.new.calls or Fraction()) - (row.base.calls or Fraction()))

    def bars(row: BitRow) -> tuple[Bar, ...]:
        pairs = ((comparison.base, row.base), (comparison.new, row.new))
        return tuple(_side_bar(side, figure, str(row.bit)) for side, figure in pairs)

    rows, more = _limited(
        [
            Row(msr.name(row.bit.msr), row.bit.direction, bars(row))
            for row in sorted(comparison.rows, key=change, reverse=True)
        ]
    )
    title = "Calls per filter update that name a bit (of them redundant)"
    notes = ("The bits that differ most come first.",)
    return Chart(title, rows, _side_legend("calls that changed it", rows), notes, more)
