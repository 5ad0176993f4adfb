# SPDX-License-Identifier: GPL-2.0-or-later
"""A state in words: for each VM its filter, and a table of MSRs; VMs of which the same is said are together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tracer.model import msr
from tracer.model.state import BOTH, FILTER, KVM, PASSED, PENDING_ALLOWED, PENDING_DENIED, SAID, UNKNOWN, UNRECORDED
from tracer.report.document import Document, Section, Table, document
from tracer.report.state_file import AccessRow, Filter, StateFile, States, VcpuGroup, VmState, msr_range

#: What is said, as it is in tables.
WORDS = {
    PASSED: "passed",
    KVM: "kvm",
    FILTER: "filter",
    BOTH: "both",
    PENDING_DENIED: "pending deny",
    PENDING_ALLOWED: "pending allow",
    UNRECORDED: "unrecorded",
    UNKNOWN: "unknown",
}
_NAMES = 6  # of VMs in a heading
_ROWS = 200  # of a table, unless all are asked for: a filter may deny every second MSR, and KVM intercept it anyway


@dataclass(frozen=True)
class Shown:
    """Which MSRs: `only` these, if there are any; else, unless `everything`, those of note."""

    everything: bool = False
    only: frozenset[int] = frozenset()

    def of(self, vm: VmState, group: VcpuGroup) -> list[AccessRow]:
        """The rows that are shown of vCPUs; each of `only` has its own."""
        if self.only:
            asked = [(one, row) for one in sorted(self.only) for row in group.msrs if one in msr_range(row.msrs)]
            return [replace(row, msrs=msr.hexadecimal(one), name=msr.name(one)) for one, row in asked]
        if self.everything:
            return group.msrs
        # Most MSRs no guest ever has; unrecorded is an allowed access of a bitmap that is about to be computed anew.
        usual = {KVM, BOTH, UNRECORDED} if vm.filter and vm.filter.default == "allow" else {KVM, BOTH}
        rows = [row for row in group.msrs if row.in_filter or not {row.read, row.write} <= usual]
        return rows if len(rows) <= _ROWS else [row for row in rows if not {row.read, row.write} <= usual][:_ROWS]


def state_document(state: StateFile, shown: Shown) -> Document:
    """The state as a document."""
    host = state.host
    vcpus = sum(vm.count for vm in state.vms)
    lead = f"{host.name or 'this host'} (Linux {host.kernel}, {host.title}): {_count(len(state.vms), 'VM')}"
    lead += f", {_count(vcpus, 'vCPU')}" if state.vms else " has a vCPU"
    sections, used = [], set[str]()
    for members in _alike(state):
        vm, group = members[0]
        rows = shown.of(vm, group)
        used |= {said for row in rows for said in (row.read, row.write)}
        lines = [*_filter_lines(vm), *_group_lines(vm, group)]
        if (hidden := len(group.msrs) - len(rows)) and not shown.only:
            lines.append(f"not shown: {_count(hidden, 'range')} of other MSRs (--all)")
        sections.append(Section(_heading(members), tuple(lines), _table(rows)))
    legend = [f"{WORDS[said]}: {meaning}" for said, meaning in SAID.items() if said in used]
    sections += [Section("Words", tuple(legend)), Section("Notes", tuple(state.notes))]
    return document(f"msrtrace state: {host.name}", lead, (), sections)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number > 1)}"


def _table(rows: Sequence[AccessRow]) -> Table:
    cells = []
    for row in rows:
        more = len(msr_range(row.msrs)) - 1
        name = "" if row.name == msr.hexadecimal(msr_range(row.msrs).start) else row.name
        cells.append((row.msrs, f"{name} and {more} more" if more else name, WORDS[row.read], WORDS[row.write]))
    return Table(("MSR", "name", "read", "write"), tuple(cells), names=4)


def _alike(states: States) -> list[list[tuple[VmState, VcpuGroup]]]:
    """The groups of vCPUs of which all is the same, but for whose they are."""
    found: dict[tuple[object, ...], list[tuple[VmState, VcpuGroup]]] = {}
    for vm in states.vms:
        for group in vm.vcpus:
            key = (
                repr(vm.filter),
                vm.kind,
                vm.owned,
                group.ran is False,
                group.settled,
                repr(group.passed),
                repr(group.msrs),
            )
            found.setdefault(key, []).append((vm, group))
    return list(found.values())


def _heading(members: Sequence[tuple[VmState, VcpuGroup]]) -> str:
    """Whose vCPUs they are: `web-01 (pid 812), web-02 (pid 844): vCPU 0-3`."""
    by_ids: dict[str, Counter[str]] = {}
    for vm, group in members:
        by_ids.setdefault(ids_text(group.ids), Counter())[vm.title] += 1
    return "; ".join(f"{_listed(titles)}: vCPU {ids}" for ids, titles in by_ids.items())


def _listed(titles: Counter[str]) -> str:
    """The titles of VMs; a process that has several VMs is named once."""
    named = [f"{title}, {count} VMs" if count > 1 else title for title, count in titles.items()]
    more = len(named) - _NAMES
    return ", ".join(named[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def ids_text(ids: Iterable[int]) -> str:
    """Sorted numbers as `0-3, 8`."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _filter_lines(vm: VmState) -> list[str]:
    if vm.filter is None:
        return ["filter: could not be read"]
    if not vm.filter.ranges and vm.filter.default == "allow":
        return ["filter: none"]
    return [f"filter: {line}" if not number else line for number, line in enumerate(filter_lines(vm.filter))]


def filter_lines(one: Filter) -> list[str]:
    """A filter in words, a line each for its default and its ranges."""
    lines = [f"{'allows' if one.default == 'allow' else 'denies'} what no range decides"]
    for row in one.ranges:
        access = row.access.replace("_", " and ")
        denied = [msr_range(text) for text in row.denied]
        if row.access == "none":
            what = "decides nothing"
        elif not denied:
            what = "allows all of it"
        elif len(denied) == 1 and denied[0] == msr_range(row.msrs):
            what = "denies all of it" if len(denied[0]) > 1 else "denies it"
        else:
            what = f"denies {sum(map(len, denied))} of them"
        first = msr_range(row.msrs).start
        name = "" if msr.name(first) == msr.hexadecimal(first) else f" {msr.name(first)}"
        lines.append(f"{row.msrs}{name}, {access}: {what}")
    return lines


def _group_lines(vm: VmState, group: VcpuGroup) -> list[str]:
    lines = []
    if vm.kind:
        lines.append(f"{vm.kind}: its bitmaps are not KVM's, so what it intercepts is unknown")
    if not vm.owned:
        lines.append("the process that made this VM is gone; the one named here holds a descriptor, and cannot run it")
    if group.ran is False:
        lines.append("has not run yet")
    if not group.settled and group.msrs:
        lines.append("its bitmap changes, or is to be computed anew when it next enters the guest")
    if group.passed is None and not vm.kind:
        lines.append("what it intercepts cannot be read")
    return lines
