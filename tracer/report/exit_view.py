# SPDX-License-Identifier: GPL-2.0-or-later
"""The exits of a report in words: what filters cause, and a table."""

from __future__ import annotations

from tracer.model.exit_table import SAID_OF_EXITS, Blame, interceptors
from tracer.model.exits import FAST
from tracer.model.nested import NESTED_SAID
from tracer.model.quantity import number, per_second
from tracer.model.state import BOTH, FILTER, KVM, SAID, WORDS
from tracer.report.document import Section, Table
from tracer.report.exit_rows import ExitRow
from tracer.report.report import Report, Vm

_FINDINGS = 3
_ROWS = 40  # of the table; guests choose the MSRs
_PLAIN = {FILTER, KVM, BOTH}  # words that need no explanation


def exit_lines(report: Report) -> list[str]:
    """How many exits there were, and a sentence for each of the accesses that filters alone make expensive."""
    total = report.totals.exits
    if total is None:
        return []
    line = f"{total:,} exit{'' if total == 1 else 's'} of RDMSR and WRMSR"
    if total:
        blame = Blame(report.totals.exits_by_filter or 0, report.totals.exits_perhaps_by_filter or 0)
        line += f" ({_rate(report, total)}/s), {blame.share(total)} of them since a VM's filter alone denies the access"
    found = sorted((row for row in report.exits or () if row.exits_by_filter), key=lambda row: -row.exits_by_filter)
    lines = [line, *(_finding(report, row) for row in found[:_FINDINGS])]
    if rest := found[_FINDINGS:]:
        exits = sum(row.exits_by_filter for row in rest)
        lines.append(f"{_rate(report, exits)} exits/s on {len(rest):,} more accesses that a VM's filter alone denies")
    return lines


def _finding(report: Report, row: ExitRow) -> str:
    rate = _rate(report, row.exits_by_filter)
    return f"{rate} exits/s on {row.title}, {row.access}: the VM's filter alone denies it"


def _rate(report: Report, exits: int) -> str:
    return per_second(exits / report.duration_seconds if report.duration_seconds else None)


def exit_sections(report: Report) -> list[Section]:
    """The tables, of MSRs and of VMs."""
    sections = [_msr_section(report)]
    vms = [vm for vm in report.vms or () if vm.exits]
    if vms:
        vms.sort(key=lambda vm: (-(vm.exits_by_filter or 0), -(vm.exits or 0)))
        cells = tuple(
            (vm.title, str(vm.pid), number(vm.exits), _rate(report, vm.exits or 0), _by_filter(vm)) for vm in vms
        )
        headers = ("VM", "pid", "exits", "per second", "by the filter alone")
        sections.append(Section("Exits per VM", table=Table(headers, cells)))
    return sections


def _by_filter(vm: Vm) -> str:
    """How many of its exits the filter alone caused, or the least and the most."""
    sure, perhaps = vm.exits_by_filter or 0, vm.exits_perhaps_by_filter or 0
    return f"{sure:,} to {sure + perhaps:,}" if perhaps else f"{sure:,}"


def _msr_section(report: Report) -> Section:
    """The table of MSRs, with what its words mean."""
    rows = report.exits or []
    if not rows:
        return Section("Exits", ("none were seen",))
    lines = []
    if len(rows) > _ROWS:
        lines.append(f"{_ROWS} of {len(rows):,} rows are shown here: the JSON report has all")
    shown = rows[:_ROWS]
    used = {said for row in shown for said in interceptors(row.guest, row.intercepted_by)} - _PLAIN
    meanings = SAID | NESTED_SAID | SAID_OF_EXITS
    lines += [f"{WORDS.get(said, said)}: {meaning}" for said, meaning in meanings.items() if said in used]
    cells = tuple(
        (
            row.msr,
            "" if row.name == row.msr else row.name,
            row.access,
            f"{row.result}, fast" if row.path == FAST else row.result,
            row.interceptors,
            number(row.exits),
            _rate(report, row.exits),
        )
        for row in shown
    )
    headers = ("MSR", "name", "access", "result", "intercepted by", "exits", "per second")
    return Section("Exits", tuple(lines), Table(headers, cells, names=5))
