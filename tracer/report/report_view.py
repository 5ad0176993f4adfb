# SPDX-License-Identifier: GPL-2.0-or-later
"""A report in words: its sentences and tables."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

from tracer.model.cause import RECALC
from tracer.model.quantity import duration, number, rate, share
from tracer.model.verdict import headline
from tracer.report.compare import format_command, lost
from tracer.report.document import Document, Section, Table, document
from tracer.report.exit_view import exit_lines, exit_sections
from tracer.report.report import CallRow, Report, UpdateSeconds, redundant_sum
from tracer.report.state_view import section_at_end


def report_document(report: Report) -> Document:
    """The report as a document."""
    lines = []
    if report.lower_bound:
        lines.append(f"LOWER BOUND, the true counts may be higher: {lost(report)}")
    lines += [_per_update_line(report), _totals_line(report)]
    if report.totals.recalculations is not None:
        lines.append(_recalculations_line(report, report.totals.recalculations))
    if report.totals.vcpus_created is not None:
        lines.append(_creations_line(report, report.totals.vcpus_created))
    lines += exit_lines(report)
    sections = [
        Section("Calls per MSR", table=_msr_table(report))
        if report.calls
        else Section("Calls per MSR", (_no_calls(report),)),
        Section("Calls per cause", table=_cause_table(report)),
        Section("Filter update times", tuple(_time_lines(report.filter_update_seconds))),
    ]
    if report.recalculation_seconds and report.recalculation_seconds.count:
        sections.append(Section("Recalculation times", tuple(_time_lines(report.recalculation_seconds))))
    if report.exits is not None:
        sections += exit_sections(report)
    if report.vms is not None:
        sections.append(Section("VMs", table=_vm_table(report)))
    if report.state is not None:
        sections.append(section_at_end(report.state))
    sections += [
        Section("Not seen", (lost(report),)),
        *([Section("Notes", tuple(report.notes))] if report.notes else []),
        Section("Host", tuple(_host_lines(report))),
    ]
    lead = f"{headline(report.verdict.patched, report.host.vendor)}: {report.verdict.why}"
    return document(f"msrtrace report: {report.title}", lead, lines, sections)


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
    """The line on recalculations; `count` is their number, and those of creations have a line of their own."""
    of_creations = report.totals.creation_recalculations
    count -= of_creations or 0
    found = f"{count:,} recalculation{'' if count == 1 else 's'} for other reasons than a new filter"
    if of_creations is not None:
        found += " or the creation of a vCPU"
    if not count or report.totals.calls is None:
        return found
    rows = report.rows(RECALC)
    calls, redundant = Fraction(sum(row.calls for row in rows), count), redundant_sum(rows)
    redundant_each = None if redundant is None else Fraction(redundant, count)
    return f"{found}, {rate(calls)} calls each, {rate(redundant_each)} of them redundant"


def _creations_line(report: Report, count: int) -> str:
    """The line on vCPUs created; `count` is their number."""
    found, each = f"{count:,} vCPU{'' if count == 1 else 's'} created", report.per_vcpu_creation
    if not each:
        return found
    found += f", {rate(each.calls)} calls each, {rate(each.redundant)} of them redundant"
    if each.recalculations is not None:
        found += f", in {rate(each.recalculations)} recalculation{'' if each.recalculations == 1 else 's'}"
    return found


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
        mean = vm.filter_update_seconds_sum / vm.filter_updates if vm.filter_updates else None
        cells = [vm.title, str(vm.pid), number(vm.filter_updates), duration(mean) if mean else ""]
        if recalculations:
            cells.append(number(vm.recalculations))
        rows.append((*cells, number(vm.calls), number(vm.redundant)))
    more = ("recalculations",) if recalculations else ()
    return Table(("VM", "pid", "filter updates", "mean", *more, "calls", "redundant"), tuple(rows))


def quantile(times: UpdateSeconds, part: float) -> float | None:
    """The bound, in seconds, that a `part` of the updates did not exceed; None where it is beyond the last bucket."""
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
    return [f"{mean} on average; half took {half}, 99% {most}, all {all_} (the time of the probes included)"]


def _host_lines(report: Report) -> list[str]:
    host = report.host
    lines = [host.name, f"{host.kernel} {host.version}".rstrip(), host.cpu, f"ran: {format_command(report.command)}"]
    if report.exit_status:
        lines.append(f"which ended with status {report.exit_status}")
    lines.append(f"started {report.started}; msrtrace {report.msrtrace or '?'}, {host.title}, layout {host.layout}, ")
    lines[-1] += f"{host.backend}, redundancy {host.redundancy}"
    if host.module_parameters:
        lines.append(f"{host.module}: " + " ".join(f"{name}={value}" for name, value in host.module_parameters.items()))
    return [line for line in lines if line]
