# SPDX-License-Identifier: GPL-2.0-or-later
"""A comparison in words: its sentences and tables."""

from __future__ import annotations

from fractions import Fraction

from tracer.model import msr
from tracer.model.quantity import duration, number, percent, rate
from tracer.report.compare import Comparison, PerUpdate, Side, format_command, layouts, lost
from tracer.report.creation import recalculates, vcpus_created
from tracer.report.document import Document, Section, Table, document
from tracer.report.exit_comparison_view import exit_sections
from tracer.report.interval import Time
from tracer.report.state_diff_view import access_text
from tracer.report.state_file import range_text
from tracer.report.state_view import name_of, said_text


def sentence(comparison: Comparison) -> str:
    """The figures in one sentence."""
    one, other = (comparison.per_update(side) for side in (comparison.base, comparison.new))
    base, new = comparison.base.title, comparison.new.title
    unit = comparison.unit
    if one.calls is None or other.calls is None:
        unknown = [
            side.title for side in (comparison.base, comparison.new) if comparison.per_update(side).calls is None
        ]
        return f"calls per filter update are unknown for {' and '.join(unknown)}"
    does = "makes" if unit == "call" else "names"
    left = f"{base} {does} {rate(one.calls)} {unit}s a filter update, {rate(one.redundant)} of them redundant"
    right = f"{new} {rate(other.calls)}, {rate(other.redundant)} redundant"
    return f"{left}; {right}: {_change(one.calls, other.calls, unit)}"


def _change(one: Fraction, other: Fraction, unit: str) -> str:
    if one == other:
        return f"as many {unit}s"
    change = abs(other - one)
    units = f"{rate(change)} {'fewer' if other < one else 'more'} {unit}{'' if change == 1 else 's'}"
    return f"{units}, {percent(one, other)}"


def difference(one: Fraction | None, other: Fraction | None) -> str:
    """The change from `one` to `other`, with its sign; `?` where either is unknown."""
    if one is None or other is None:
        return "?"
    change = other - one
    return "0" if not change else f"{'+' if change > 0 else '-'}{rate(abs(change))}"


def comparison_document(comparison: Comparison) -> Document:
    """The comparison as a document."""
    base, new = comparison.base, comparison.new
    lines = [f"FORCED despite: {reason}" for reason in comparison.forced]
    if comparison.unit == "bit" and base.observable and new.observable:
        lines.append(
            "Compared per bit of the MSR bitmap, as the kernels' functions differ "
            f"({layouts(base.report.host, new.report.host)}): a call that names both bits of an MSR counts twice."
        )
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    sections = [
        Section("Verdicts", tuple(_verdict_line(side) for side in (base, new))),
        Section("Calls per filter update that name a bit (of them redundant)", table=comparison_table(comparison)),
        *_creation(comparison),
        *exit_sections(base, new),
        Section("Time of a filter update", tuple(_times(comparison))),
        Section("Not seen", tuple(f"{side.title}: {lost_by(side)}" for side in (base, new))),
    ]
    if comparison.intercepted:
        sections.append(Section("Intercepted at the end by one only, and by whom", table=_intercepted(comparison)))
    if comparison.differences:
        cells = tuple((d.what, d.base, d.new) for d in comparison.differences)
        sections.append(Section("The hosts differ in", table=Table(("", base.title, new.title), cells, names=3)))
    sections += [
        Section("What was run", tuple(_ran(side) for side in (base, new))),
        Section("Where and when", tuple(f"{side.title}: {side.origin}" for side in (base, new))),
    ]
    return document(f"{base.title} and {new.title}", sentence(comparison), lines, sections)


def _intercepted(comparison: Comparison) -> Table:
    cells = tuple(
        (range_text(row.msrs), name_of(row.msrs), access_text(row.access), said_text(row.base), said_text(row.new))
        for row in comparison.intercepted
    )
    return Table(("MSR", "name", "access", comparison.base.title, comparison.new.title), cells, names=5)


def _verdict_line(side: Side) -> str:
    return f"{side.title}: {side.headline}: {side.verdict.why}"


def _ran(side: Side) -> str:
    count = len(side.reports)
    times = "" if count == 1 else f", {count} reports"
    when = f", {side.window}" if side.window else ""
    return f"{side.title}: {format_command(side.report.command)} ({side.updates:,} filter updates{times}{when})"


def lost_by(side: Side) -> str:
    """What the reports of a side missed, in words."""
    return "; ".join(sorted({lost(report) for report in side.reports}))


def comparison_table(comparison: Comparison) -> Table:
    """A row for each bit of an MSR that either side touches in a filter update, and the sums."""

    def cells(one: PerUpdate, other: PerUpdate) -> tuple[str, ...]:
        change = f"{difference(one.calls, other.calls)} ({difference(one.redundant, other.redundant)})"
        return (*(f"{rate(side.calls)} ({rate(side.redundant)})" for side in (one, other)), change)

    rows = [
        (f"{row.bit.msr:#x}", msr.name(row.bit.msr), row.bit.direction, *cells(row.base, row.new))
        for row in comparison.rows
    ]
    if rows:
        sums = (comparison.per_update(comparison.base), comparison.per_update(comparison.new))
        rows.append((f"all {comparison.unit}s", "", "", *cells(*sums)))
    titles = (comparison.base.title, comparison.new.title)
    return Table(("MSR", "name", "direction", *titles, "change"), tuple(rows), names=3)


def _creation(comparison: Comparison) -> list[Section]:
    """The section on the creation of vCPUs; none where nothing is known of it."""
    sides = (comparison.base, comparison.new)
    one, other = (comparison.per_creation(side) for side in sides)
    if one.calls is None and other.calls is None:
        return []
    change = f"{difference(one.calls, other.calls)} ({difference(one.redundant, other.redundant)})"
    calls = (*(f"{rate(figures.calls)} ({rate(figures.redundant)})" for figures in (one, other)), change)
    rows = [(f"{comparison.unit}s", *calls)]
    if recalculates(sides[0].report.host) or recalculates(sides[1].report.host):
        cells = [
            rate(figures.recalculations) if recalculates(side.report.host) else "none"
            for side, figures in zip(sides, (one, other), strict=True)
        ]
        change = "" if "none" in cells else difference(one.recalculations, other.recalculations)
        rows.append(("recalculations", *cells, change))
    counts = [(side.title, vcpus_created(side.reports)) for side in sides]
    lines = [f"{title}: {number(count)} vCPU{'' if count == 1 else 's'} created" for title, count in counts]
    table = Table(("", *(side.title for side in sides), "change"), tuple(rows))
    return [Section("Calls per vCPU created (of them redundant)", tuple(lines), table)]


def _times(comparison: Comparison) -> list[str]:
    lines = []
    for side in (comparison.base, comparison.new):
        time = side.time()
        lines.append(f"{side.title}: {_time(time) if time else 'unknown'}")
    return [*lines, "The time of the probes is included, so without them the saving is smaller."]


def _time(time: Time) -> str:
    if time.low is None or time.coverage is None:
        return f"{duration(time.median)} on average in one report, so its variation is unknown"
    interval = f"{time.coverage:.1%} confidence interval {duration(time.low)} to {duration(time.high)}"
    return f"{duration(time.median)}, the median of {time.reports} reports; {interval}"
