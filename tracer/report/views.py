# SPDX-License-Identifier: GPL-2.0-or-later
"""A report, and a comparison, in words and tables."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction

import msgspec

from tracer.model import msr
from tracer.model.cause import RECALC
from tracer.model.quantity import duration, number, rate, share
from tracer.model.text import printable
from tracer.model.vendors import FIRST
from tracer.model.verdict import PATCH
from tracer.report.compare import SCHEMA, Comparison, PerUpdate, Side, Time, lost, said
from tracer.report.document import Document, Section, Table
from tracer.report.report import Bit, CallRow, Report, UpdateSeconds, redundant_sum, whole

_CELL, _CHANGE = 20, 10  # characters in a column of a changelog's table, which has 75 with its two indents
_COLUMNS = 75  # Documentation/process/submitting-patches.rst: changelogs are wrapped at 75


def report_document(report: Report) -> Document:
    """What REPORT says."""
    lines = []
    if report.lower_bound:
        lines.append(f"LOWER BOUND, the true counts may be higher: {lost(report)}")
    lines += [_per_update_line(report), _totals_line(report)]
    if report.totals.recalculations is not None:
        lines.append(_recalculations_line(report, report.totals.recalculations))
    sections = [
        Section("Calls per MSR", table=_msr_table(report))
        if report.calls
        else Section("Calls per MSR", (_no_calls(report),)),
        Section("Calls per cause", table=_cause_table(report)),
        Section("Filter update times", tuple(_time_lines(report.filter_update_seconds))),
    ]
    if report.recalculation_seconds and report.recalculation_seconds.count:
        sections.append(Section("Recalculation times", tuple(_time_lines(report.recalculation_seconds))))
    if report.vms is not None:
        sections.append(Section("VMs", table=_vm_table(report)))
    sections += [
        Section("Not seen", (lost(report),)),
        *([Section("Notes", tuple(report.notes))] if report.notes else []),
        Section("Host", tuple(_host_lines(report))),
    ]
    lead = f"{PATCH[report.verdict.patched]}: {report.verdict.why}"
    return _document(f"msrtrace report: {report.title}", lead, lines, sections)


def _document(title: str, lead: str, lines: Sequence[str], sections: Sequence[Section]) -> Document:
    """A document without the sections that have nothing to say."""
    shown = tuple(s for s in sections if s.lines or (s.table and s.table.rows))
    return Document(title, lead, tuple(lines), shown)


def _no_calls(report: Report) -> str:
    return "not observable on this kernel" if report.totals.calls is None else "none were made"


def _per_update_line(report: Report) -> str:
    each = report.per_filter_update
    if each is None:
        return "calls per filter update: unknown" + (
            "" if report.totals.filter_updates else ", as there was no filter update"
        )
    found = f"{rate(each.calls)} calls per filter update, {rate(each.redundant)} of them redundant"
    return f"{found} ({rate(each.enable)} enables, {rate(each.disable)} disables)"


def _totals_line(report: Report) -> str:
    totals = report.totals
    calls = "calls not observable"
    if totals.calls is not None:
        calls = f"{totals.calls:,} calls, {number(totals.redundant)} of them redundant"
    updates = "filter updates not observable"
    if totals.filter_updates is not None:
        updates = f"{totals.filter_updates:,} filter updates"
    vcpus, vmms = totals.vcpus_seen, report.host.vmms_seen
    seen = f"{vcpus:,} vCPU{'s' * (vcpus != 1)} of {vmms:,} VMM{'s' * (vmms != 1)} seen"
    return f"{updates}, {calls}, {seen}, in {duration(report.duration_seconds)}"


def _recalculations_line(report: Report, count: int) -> str:
    """COUNT is how often a bitmap was recomputed for another reason than a new filter."""
    plural = "" if count == 1 else "s"
    found = f"{count:,} recalculation{plural} for other reasons than a new filter"
    if not count or report.totals.calls is None:
        return found
    rows = report.rows(RECALC)
    calls, redundant = Fraction(sum(row.calls for row in rows), count), redundant_sum(rows)
    redundant_each = None if redundant is None else Fraction(redundant, count)
    return f"{found}, {rate(calls)} calls each, {rate(redundant_each)} of them redundant"


def _msr_table(report: Report) -> Table:
    sums: dict[tuple[int, str, str, str, str], list[CallRow]] = defaultdict(list)
    for row in report.calls:
        sums[row.index, row.name, row.access, row.action, row.cause].append(row)
    rows = []
    for (index, name, access, action, cause), found in sums.items():
        calls, redundant = sum(row.calls for row in found), redundant_sum(found)
        refused = None if redundant is None else sum(row.refused or 0 for row in found)
        cells = (number(calls), number(redundant), share(redundant, calls), number(refused))
        rows.append((f"{index:#x}", name, access, action, cause, *cells))
    return Table(
        ("MSR", "name", "access", "action", "cause", "calls", "redundant", "", "refused"), tuple(rows), names=5
    )


def _cause_table(report: Report) -> Table:
    causes: dict[str, list[CallRow]] = defaultdict(list)
    for row in report.calls:
        causes[row.cause].append(row)
    rows = []
    for cause, found in sorted(causes.items()):
        calls, redundant = sum(row.calls for row in found), redundant_sum(found)
        callers = ", ".join(sorted({row.caller for row in found}))
        rows.append((cause, callers, number(calls), number(redundant), share(redundant, calls)))
    return Table(("cause", "called from", "calls", "redundant", ""), tuple(rows), names=2)


def _vm_table(report: Report) -> Table:
    rows = []
    recalculations = any(vm.recalculations is not None for vm in report.vms or [])
    for vm in report.vms or []:
        name = vm.name or ("(ended before it could be named)" if vm.pid else "(not told apart)")
        mean = vm.filter_update_seconds_sum / vm.filter_updates if vm.filter_updates else None
        cells = [name, str(vm.pid), number(vm.filter_updates), duration(mean) if mean else ""]
        if recalculations:
            cells.append(number(vm.recalculations))
        rows.append((*cells, number(vm.calls), number(vm.redundant)))
    more = ("recalculations",) if recalculations else ()
    return Table(("VM", "pid", "filter updates", "mean", *more, "calls", "redundant"), tuple(rows))


def quantile(times: UpdateSeconds, part: float) -> float | None:
    """The bound in seconds that PART of the updates did not exceed; None where it is beyond the last bucket."""
    seen = 0
    for bucket in times.buckets:
        seen += bucket.count
        if seen >= part * times.count:
            return bucket.le
    return None


def _time_lines(times: UpdateSeconds | None) -> list[str]:
    if times is None:
        return ["not observable"]
    if not times.count:
        return ["no filter update was seen"]
    bounds = {part: quantile(times, part) for part in (0.5, 0.99, 1.0)}
    half, most, all_ = (
        f"at most {duration(b)}" if b is not None else "longer than any bucket" for b in bounds.values()
    )
    mean = duration(times.sum / times.count)
    return [f"{mean} on average; half took {half}, 99% {most}, all {all_} (the probes' own time included)"]


def _host_lines(report: Report) -> list[str]:
    host = report.host
    lines = [f"{host.kernel} {host.version}".rstrip(), host.cpu, f"ran: {said(report.command)}"]
    if report.exit_status:
        lines.append(f"which ended with status {report.exit_status}")
    lines.append(f"started {report.started}; msrtrace {report.msrtrace or '?'}, layout {host.layout}, {host.backend}, ")
    lines[-1] += f"redundancy {host.redundancy}"
    if host.module_parameters:
        lines.append(
            f"{FIRST.module}: " + " ".join(f"{name}={value}" for name, value in host.module_parameters.items())
        )
    return [line for line in lines if line]


def sentence(comparison: Comparison) -> str:
    """The figures in a sentence."""
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


def percent(one: Fraction | None, other: Fraction | None) -> str:
    """The change from ONE to OTHER with its sign; empty where there is none to give."""
    if not one or other is None:
        return ""
    return "0.0%" if one == other else f"{float((other - one) / one):+.1%}"


def _plus(one: Fraction | None, other: Fraction | None) -> str:
    if one is None or other is None:
        return "?"
    change = other - one
    return "0" if not change else f"{'+' if change > 0 else '-'}{rate(abs(change))}"


def comparison_document(comparison: Comparison) -> Document:
    """What COMPARISON says."""
    base, new = comparison.base, comparison.new
    lines = [f"FORCED in spite of: {reason}" for reason in comparison.forced]
    if comparison.unit == "bit" and base.observable and new.observable:
        lines.append(
            f"Compared per bit of the MSR bitmap, as the kernels' functions differ (layouts {base.report.host.layout} "
            f"and {new.report.host.layout}): a call that names both bits of an MSR counts twice."
        )
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    sections = [
        Section("Verdicts", tuple(_verdict_line(side) for side in (base, new))),
        Section("Calls per filter update that name a bit (of them redundant)", table=comparison_table(comparison)),
        Section("Time of a filter update", tuple(_times(comparison))),
        Section("Not seen", tuple(f"{side.title}: {_lost(side)}" for side in (base, new))),
    ]
    if comparison.differences:
        cells = tuple((d.what, d.base, d.new) for d in comparison.differences)
        sections.append(Section("The hosts differ in", table=Table(("", base.title, new.title), cells, names=3)))
    sections.append(Section("What was run", tuple(_ran(side) for side in (base, new))))
    return _document(f"{base.title} and {new.title}", sentence(comparison), lines, sections)


def _verdict_line(side: Side) -> str:
    verdict = side.verdict
    return f"{side.title}: {PATCH[verdict.patched]}: {verdict.why}"


def _ran(side: Side) -> str:
    count = len(side.reports)
    times = "" if count == 1 else f", {count} reports"
    return f"{side.title}: {said(side.report.command)} ({side.updates:,} filter updates{times})"


def _lost(side: Side) -> str:
    return "; ".join(sorted({lost(report) for report in side.reports}))


def comparison_table(comparison: Comparison) -> Table:
    """A row for each bit of an MSR that either side touches in a filter update, and the sums."""

    def cells(one: PerUpdate, other: PerUpdate) -> tuple[str, ...]:
        change = f"{_plus(one.calls, other.calls)} ({_plus(one.redundant, other.redundant)})"
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


def _times(comparison: Comparison) -> list[str]:
    lines = []
    for side in (comparison.base, comparison.new):
        time = side.time()
        lines.append(f"{side.title}: {_time(time) if time else 'unknown'}")
    return [*lines, "The probes' own time is included, so less is saved without them than it seems."]


def _time(time: Time) -> str:
    if time.low is None or time.coverage is None:
        return f"{duration(time.median)} on average in one report, so how far it varies is not known"
    covers = f"{duration(time.low)} to {duration(time.high)} covers it with {time.coverage:.1%}"
    return f"{duration(time.median)}, the median of {time.reports} reports; {covers}"


def comparison_json(comparison: Comparison) -> bytes:
    """COMPARISON for programs: `schema` is "msrtrace-comparison/1"; unknown figures are null."""

    def plain(value: Fraction | None) -> float | None:
        return None if value is None else whole(float(value))

    def per_update(figures: PerUpdate) -> dict[str, float | None]:
        return {"calls": plain(figures.calls), "redundant": plain(figures.redundant)}

    def side(which: Side) -> dict[str, object]:
        time = which.time()
        return {
            "title": which.title,
            "reports": len(which.reports),
            "host": which.report.host,
            "command": which.report.command,
            "filter_updates": which.updates,
            "verdict": which.verdict,
            "per_filter_update": per_update(comparison.per_update(which)),
            "filter_update_seconds": asdict(time) if time else None,
            "lost": _lost(which),
        }

    made = {
        "schema": SCHEMA,
        "sentence": sentence(comparison),
        "unit": comparison.unit,
        "base": side(comparison.base),
        "new": side(comparison.new),
        "bits": [
            {
                "msr": msr.hexadecimal(row.bit.msr),
                "name": msr.name(row.bit.msr),
                "direction": row.bit.direction,
                "base": per_update(row.base),
                "new": per_update(row.new),
            }
            for row in comparison.rows
        ],
        "differences": [asdict(difference) for difference in comparison.differences],
        "warnings": list(comparison.warnings),
        "forced": list(comparison.forced),
    }
    return msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"


def changelog(comparison: Comparison) -> str:
    """COMPARISON for the message of a kernel commit: plain text, at most 75 columns."""
    base, new = comparison.base, comparison.new
    lines = [*_wrapped(f"{_capital(sentence(comparison))}."), ""]
    what = "MSR-intercept calls" if comparison.unit == "call" else "Bits that MSR-intercept calls name"
    lines += [
        *_wrapped(f"{what}, per filter update of a vCPU, counted by msrtrace on {_kernels(comparison)} under"),
        "",
    ]
    for command in dict.fromkeys(said(side.report.command) for side in (base, new)):
        lines += _wrapped(command, "  ")
    rows: list[tuple[str, ...]] = []
    one, other = comparison.per_update(base), comparison.per_update(new)
    for label, left, right in (
        (f"{comparison.unit}s", one.calls, other.calls),
        ("of them redundant", one.redundant, other.redundant),
        *((f"{action} calls", _action(base, action), _action(new, action)) for action in ("enable", "disable")),
    ):
        figures = [printable(rate(figure), _CELL) for figure in (left, right)]
        rows.append((label, *figures, printable(percent(left, right), _CHANGE)))
    titles = [printable(side.title, _CELL) for side in (base, new)]
    lines += ["", *_columns(("", *titles, "change"), *rows), ""]
    gone = [row.bit for row in comparison.rows if row.base.calls and not row.new.calls]
    come = [row.bit for row in comparison.rows if row.new.calls and not row.base.calls]
    for side, bits in ((base, gone), (new, come)):
        if bits:
            lines += [*_wrapped(f"Touched by {side.title} alone: {_short(bits)}."), ""]
    for warning in (*comparison.forced, *comparison.warnings):
        lines += _wrapped(f"Note: {warning}.")
    return "\n".join(lines).rstrip() + "\n"


def _columns(*rows: tuple[str, ...]) -> list[str]:
    """ROWS below each other, the first with a line below it, as narrow as can be, which a Table's are not."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(["", row[0].ljust(widths[0]), *figures]).rstrip()

    return [line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(bits: Sequence[Bit]) -> str:
    """BITS by MSR, with R, W or RW as in the kernel's MSR_TYPE_*."""
    directions: dict[int, str] = {}
    for bit in bits:
        directions[bit.msr] = directions.get(bit.msr, "") + bit.direction[0].upper()
    return ", ".join(f"{msr.name(index)} {letters}" for index, letters in directions.items())


def _kernels(comparison: Comparison) -> str:
    found = dict.fromkeys(f"Linux {side.report.host.kernel}" for side in (comparison.base, comparison.new))
    return " and ".join(found)


def _action(side: Side, action: str) -> Fraction | None:
    if not side.observable:
        return None
    return Fraction(sum(row.calls for row in side.rows if row.action == action), side.updates)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
