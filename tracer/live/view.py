# SPDX-License-Identifier: GPL-2.0-or-later
"""The view of `msrtrace top`: lines of text for a terminal or a pipe, formatted by rich."""

from __future__ import annotations

from fractions import Fraction
from io import StringIO

from rich.console import Console
from rich.text import Text

from tracer.live import exits_view
from tracer.live.exits_view import exits_line, exits_table
from tracer.live.table import LONGEST_NAME, LONGEST_VM, Column, Look, View, fitting, table
from tracer.live.top import Frame, Row, Sample, msr_name, not_probed_line, vm_name
from tracer.model.quantity import duration, share
from tracer.model.snapshot import Durations, Outcome
from tracer.model.vendors import vendor_named

HELP = "sort by c calls, r redundant calls, s their share, m MSR, u cause; t totals or rates; "
HELP_EXITS = "e exits; "
HELP_VM = "b MSRs by VM, VMs, or MSRs of all VMs; "
HELP_MORE = "arrows scroll; space pauses; ^L redraws; q quits"
#: What is too long for its column, shortened as in the kernel's MSR_TYPE_R and MSR_TYPE_W.
_SHORT = {"read_write": "both", "disable_read": "disable R", "disable_write": "disable W"}


_MSR_PARTS = ("msr", "access", "action", "cause")
#: The parts that rows are broken down by, with --by-vm: `b` goes from one to the next.
LEVELS: tuple[tuple[str, ...], ...] = (("pid", *_MSR_PARTS), ("pid",), _MSR_PARTS)


def lines(sample: Sample, view: View, look: Look, host: str) -> list[str]:
    """The sample as lines of at most `look.width` columns. An offset of the view beyond the rows is corrected.

    :param host: the names of the host and its kernel
    """
    shown = sample.chosen(view.whole)
    head = _drawn(_header(sample, shown, look, host), look)
    if look.height is None:
        return [*head, "", *_drawn(_table(shown, view, look, None) if shown else [], look)]
    footer = _drawn([_footer(shown, view)], look)
    room = max(1, look.height - len(head) - len(footer) - 1)  # minus the column titles
    body = _drawn(_table(shown, view, look, room) if shown else [], look)
    above = (head + body)[: max(0, look.height - len(footer))]
    above += [""] * (look.height - len(footer) - len(above))
    return (above + footer)[: look.height]


def _drawn(parts: list[Text], look: Look) -> list[str]:
    console = Console(
        file=StringIO(),
        width=look.width,
        height=100,  # without both, rich uses 80 columns where TERM=dumb
        color_system="standard" if look.styles else None,
        force_terminal=look.styles,
        no_color=not look.colors,
        force_jupyter=False,
        legacy_windows=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    for part in parts:
        console.print(part)
    written = console.file
    assert isinstance(written, StringIO)
    return [line.rstrip() for line in written.getvalue().split("\n")[:-1]]


def _header(sample: Sample, shown: Frame | None, look: Look, host: str) -> list[Text]:
    first = Text(f"{sample.at} {look.clean(host)}", style="bold")
    if shown:
        first.append(f" {vendor_named(shown.vendor).cpu_feature} layout {look.clean(shown.layout)}, ")
        first.append(f"redundancy {look.clean(shown.redundancy)}, " if shown.rows is not None else "")
        first.append(f"{'all' if shown.whole else 'over'} {_seconds(shown.seconds)}")
    parts = [first]
    if shown:
        parts += [Text(look.clean(line)) for line in _figures(shown)]
        parts += [Text(look.clean(line), style="bold red") for line in _warnings(sample, shown)]
    else:
        parts.append(Text("the first numbers come after one interval"))
    return parts + [Text(look.clean(note), style="bold yellow") for note in sample.notes]


def _seconds(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds:.1f} s"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02} h"


def _figures(shown: Frame) -> list[str]:
    if not shown.whole and not shown.traced and not shown.rows:
        return ["nothing is traced now"]
    updates, recalcs, calls, each = shown.all_updates, shown.all_recalcs, shown.calls, shown.per_update
    found = "filter updates not observable on this kernel"
    if updates is not None:
        found = f"filter updates {_timed(shown, updates)}"
    counted = "calls not observable on this kernel"
    if calls is not None:
        counted = f"calls {shown.figure(calls.calls)}"
        if calls.calls:
            counted += f", {'?' if calls.redundant is None else share(calls.redundant, calls.calls)} redundant"
    result = [f"{found}; {counted}"]
    if each:
        result.append(_per_update(*each))
    elif calls is not None and updates is not None and not updates.count:
        result.append("no filter update")
    if shown.exits is not None:
        result.append(exits_line(shown, shown.exits))
    if recalcs is not None:
        result.append(f"recalculations for other reasons than a new filter {_timed(shown, recalcs)}")
    return result


def _timed(shown: Frame, durations: Durations) -> str:
    """Their number, and the mean duration."""
    each = f", {duration(durations.seconds / durations.timed)} each" if durations.timed else ""
    return f"{shown.figure(durations.count)}{each}"


def _per_update(calls: Fraction, redundant: Fraction | None) -> str:
    """Integers are exact. Others result from updates in progress during the reading, or from VMs that differ."""
    exact = calls.denominator == 1 and (redundant is None or redundant.denominator == 1)
    digits = 0 if exact else 1
    waste = "?" if redundant is None else f"{float(redundant):,.{digits}f}"
    return f"{'' if exact else 'about '}{float(calls):,.{digits}f} calls per filter update, {waste} of them redundant"


def _warnings(sample: Sample, shown: Frame) -> list[str]:
    result = []
    if shown.lost:
        result.append(f"LOWER BOUND, the true counts may be higher: {shown.lost}")
    elif sample.whole and sample.whole.lost:
        result.append(f"LOWER BOUND since the start, though not in this interval: {sample.whole.lost}")
    return result + [line for line in (not_probed_line(shown),) if line]


def _columns(shown: Frame, level: tuple[str, ...], look: Look) -> list[Column[Row]]:
    """The columns that fit. That of the MSR, or else of the VM, gets the remaining width."""

    def redundant(row: Row) -> str:
        return share(row.share, 1) if row.share is not None else "?" if row.outcome.calls else ""

    def updates(row: Row) -> Durations:
        return (shown.updates or {}).get(row.pid or 0, Durations())

    def mean(row: Row) -> str:
        of = updates(row)
        return duration(of.seconds / of.timed) if of.timed else ""

    actions = {"disable", *(_short(row.action) for row in shown.rows or ())}
    calls, seen = shown.rows is not None, shown.updates is not None
    columns: list[Column[Row]] = [
        Column("pid VM", 18, lambda row: vm_name(shown, row.pid or 0), 1 if "msr" in level else 0, "pid", LONGEST_VM),
        Column("MSR", 20, msr_name, 0, "msr", LONGEST_NAME),
        Column("access", 6, lambda row: _short(row.access), 4, "access"),
        Column("action", max(map(len, actions)), lambda row: _short(row.action), 3, "action"),
        Column("cause", 13, lambda row: row.cause or "", 2, "cause"),
    ]
    columns = [column for column in columns if column.part in level]
    if level == ("pid",):
        columns.append(
            Column(f"updates{shown.unit}", 10, lambda row: shown.amount(updates(row).count) if seen else "?", 2)
        )
        columns.append(Column("each", 8, mean, 3))
    columns.append(Column(f"calls{shown.unit}", 10, lambda row: shown.amount(row.outcome.calls) if calls else "?"))
    columns.append(Column("redundant", 9, redundant))
    return fitting(columns, look)


def _short(word: str | None) -> str:
    """The word as it fits into its column."""
    return _SHORT.get(word or "", word or "")


def _table(shown: Frame, view: View, look: Look, room: int | None) -> list[Text]:
    """The titles and the rows that fit into `room` lines (None: all), and how many there are if not all fit."""
    level = LEVELS[view.level % len(LEVELS)] if shown.by_vm else _MSR_PARTS
    if view.exits:
        return exits_table(shown, view, look, room, level)
    if shown.rows is None and level != ("pid",):
        return [Text("" if not shown.traced else "calls not observable on this kernel")]
    columns = _columns(shown, level, look)
    rows = shown.grouped({column.part for column in columns if column.part}, view.sort)
    if level == ("pid",):
        missing = {*shown.vms, *(shown.updates or ())} - {row.pid for row in rows}
        rows += [Row(Outcome(0, 0), pid=pid) for pid in sorted(missing)]
    if not rows:
        return [Text("no calls" if shown.traced else "")]
    return table(columns, rows, view, look, room, style=_style)


def _style(row: Row) -> str:
    part = row.share or 0
    return "red" if part >= 0.9 else "yellow" if part >= 0.5 else ""


def _footer(shown: Frame | None, view: View) -> Text:
    line = Text(no_wrap=not view.help, overflow="crop")
    if view.paused:
        line.append("PAUSED", style="reverse").append(" ")
    if view.help:
        of_vms = HELP_VM if shown and shown.by_vm else ""
        if view.exits:
            return line.append(exits_view.HELP + of_vms + HELP_MORE)
        return line.append((HELP_EXITS if shown and shown.exits else "") + HELP + of_vms + HELP_MORE)
    order = exits_view.SORTS[view.exits_sort] if view.exits else view.sort
    return line.append(f"sorted by {order}; ? for help, q to quit", style="dim")
