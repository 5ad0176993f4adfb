# SPDX-License-Identifier: GPL-2.0-or-later
"""A state in words: for each VM its filter, and a table of MSRs; VMs of which the same is said are together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tracer.model import msr
from tracer.model.nested import MERGED, NESTED_SAID, PENDING_KVM, USES
from tracer.model.state import BOTH, KVM, PASSED, PENDING_DENIED, SAID, UNRECORDED, WORDS
from tracer.report.document import Document, Section, Table, document
from tracer.report.state_file import (
    AccessRow,
    Filter,
    FilterRangeRow,
    StateFile,
    States,
    VcpuGroup,
    VmState,
    msr_range,
)

#: What a filter does with accesses that are in none of its ranges.
DEFAULTS = {"allow": "allows", "deny": "denies"}
#: What is said of accesses that exit, whether a filter's default denies them or not.
_EXITS = {KVM, BOTH, UNRECORDED}
_NAMES = 6  # of VMs in a heading
_ROWS = 200  # of a table, unless all are asked for: a filter may deny every second MSR, and KVM intercept it anyway
_AT_END = 12  # rows of a report


@dataclass(frozen=True)
class RowChoice:
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
        usual = _usual(vm)
        rows = [row for row in group.msrs if row.in_filter or row.differs or not {row.read, row.write} <= usual]
        if len(rows) <= _ROWS:
            return rows
        return [row for row in rows if row.differs or not {row.read, row.write} <= usual][:_ROWS]

    def wants(self, found: set[str], *, in_filter: bool) -> bool:
        """Whether an access of which this is said, by either of two sides, is shown if no MSRs were asked for."""
        return self.everything or in_filter or not found <= _EXITS


def _usual(vm: VmState) -> set[str]:
    """What is said of most MSRs, which no guest ever has.

    It is `unrecorded` also of an access that the filter allows if the bitmap is about to be computed anew.
    """
    return _EXITS if vm.filter and vm.filter.default == "allow" else {KVM, BOTH}


def state_document(state: StateFile, shown: RowChoice) -> Document:
    """The state as a document."""
    host = state.host
    vcpus = sum(vm.count for vm in state.vms)
    lead = f"{host.name or 'this host'} (Linux {host.kernel}, {host.title}): {_count(len(state.vms), 'VM')}"
    lead += f", {_count(vcpus, 'vCPU')}" if state.vms else " has a vCPU"
    sections, used = [], set[str]()
    for members in _alike(state):
        vm, group = members[0]
        rows = shown.of(vm, group)
        both = _nested_differ(group, rows)
        used |= {said for row in rows for said in (row.read, row.write)}
        nested = [row.nested for row in rows if both and row.nested]
        used |= {said for words_ in nested for said in (words_.read, words_.write)}
        lines = [*_uuid_lines([vm for vm, _ in members]), *_filter_lines(vm), *_group_lines(vm, group)]
        lines += _nested_lines(members, same=not both)
        if (hidden := len(group.msrs) - len(rows)) and not shown.only:
            lines.append(f"not shown: {_count(hidden, 'range')} of other MSRs (--all)")
        sections.append(
            Section(heading([(vm, group.ids) for vm, group in members]), tuple(lines), _table(rows, nested=both))
        )
    sections += [words(used), Section("Notes", tuple(state.notes))]
    return document(f"msrtrace state: {host.name}", lead, (), sections)


def section_at_end(states: States) -> Section:
    """A short section of a report: what filters intercept, and what is pending."""
    vcpus = sum(vm.count for vm in states.vms)
    lines = [f"{_count(len(states.vms), 'VM')}, {_count(vcpus, 'vCPU')}"] if vcpus else []
    if not vcpus and not states.notes:
        lines = ["there was no vCPU any more"]
    cells = []
    for members in _alike(states):
        vm, group = members[0]
        whose = heading([(one, alike.ids) for one, alike in members])
        if group.passed is None:
            lines.append(f"{whose}: what is intercepted cannot be read")
        usual = _usual(vm) | {PASSED}
        for row in group.msrs:
            name = name_of(msr_range(row.msrs), row.name)
            if row.in_filter or not {row.read, row.write} <= usual:
                cells.append((whose, row.msrs, name, WORDS[row.read], WORDS[row.write]))
            if row.nested and row.differs and {row.nested.read, row.nested.write} & {PENDING_DENIED, PENDING_KVM}:
                cells.append((f"{whose}, in L2", row.msrs, name, WORDS[row.nested.read], WORDS[row.nested.write]))
    if len(lines) == 1 and vcpus and not cells:
        lines.append("no filter intercepts what KVM would pass through, and nothing is pending")
    if len(cells) > _AT_END:
        lines.append(f"{_AT_END} of {len(cells)} rows are shown here: msrtrace show --state shows all")
    table = Table(("vCPUs", "MSR", "name", "read", "write"), tuple(cells[:_AT_END]), names=5)
    return Section("Intercepted at the end", (*lines, *states.notes), table)


def said_text(found: Iterable[str]) -> str:
    """What is said of an access, by any of several vCPUs."""
    return ", ".join(WORDS[said] for said in found)


def words(used: Iterable[str]) -> Section:
    """What the words in a table mean; `used` are those of SAID and NESTED_SAID that it has."""
    found, meanings = set(used), SAID | NESTED_SAID
    return Section("Words", tuple(f"{WORDS[said]}: {meaning}" for said, meaning in meanings.items() if said in found))


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number > 1)}"


def name_of(msrs: range, first: str = "") -> str:
    """The name of the first MSR of a range, as in a file or else by its number, and how many more there are.

    Empty if it has no name.
    """
    first, more = first or msr.name(msrs.start), len(msrs) - 1
    name = "" if first == msr.hexadecimal(msrs.start) else first
    return f"{name} and {more} more" if name and more > 0 else name


def _nested_differ(group: VcpuGroup, rows: Iterable[AccessRow]) -> bool:
    """Whether more has to be shown of nested guests than a line."""
    return group.nested is not None and group.nested.bitmap == MERGED and any(row.differs for row in rows)


def _table(rows: Sequence[AccessRow], *, nested: bool) -> Table:
    """The rows; with what is said of nested guests beside what is said of the guest."""
    headers: tuple[str, ...] = ("MSR", "name", "read", "write")
    if nested:
        headers += ("L2 read", "L2 write")
    cells = []
    for row in rows:
        said: tuple[str, ...] = (row.read, row.write)
        if nested:
            its = row.nested or row
            said += (its.read, its.write)
        cells.append((row.msrs, name_of(msr_range(row.msrs), row.name), *(WORDS[one] for one in said)))
    return Table(headers, tuple(cells), names=len(headers))


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
                group.nested and (group.nested.bitmap, group.nested.settled, repr(group.nested.passed)),
            )
            found.setdefault(key, []).append((vm, group))
    return list(found.values())


def heading(members: Iterable[tuple[VmState, Iterable[int]]]) -> str:
    """VMs and the ids of their vCPUs: `web-01 (pid 812), web-02 (pid 844): vCPU 0-3`."""
    by_ids: dict[str, list[VmState]] = {}
    for vm, ids in members:
        by_ids.setdefault(ids_text(ids), []).append(vm)
    return "; ".join(f"{titles(vms)}: vCPU {ids}" for ids, vms in by_ids.items())


def titles(vms: Iterable[VmState]) -> str:
    """The titles of VMs; a process that has several VMs is named once."""
    return listed_names(
        [f"{title}, {count} VMs" if count > 1 else title for title, count in Counter(vm.title for vm in vms).items()]
    )


def listed_names(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def ids_text(ids: Iterable[int]) -> str:
    """Sorted numbers as `0-3, 8`."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _uuid_lines(vms: Sequence[VmState]) -> list[str]:
    """The UUIDs of those VMs that a heading names."""
    if len(vms) == 1:
        return [f"UUID: {vms[0].uuid}"] if vms[0].uuid else []
    return [f"UUID of {vm.title}: {vm.uuid}" for vm in vms[:_NAMES] if vm.uuid]


def _filter_lines(vm: VmState) -> list[str]:
    if vm.filter is None:
        return ["filter: could not be read"]
    if not vm.filter.ranges and vm.filter.default == "allow":
        return ["filter: none"]
    return [f"filter: {line}" if not number else line for number, line in enumerate(filter_lines(vm.filter))]


def filter_lines(one: Filter) -> list[str]:
    """A filter in words, a line each for its default and its ranges."""
    return [f"{DEFAULTS[one.default]} what no range decides", *map(range_line, one.ranges)]


def range_line(row: FilterRangeRow) -> str:
    """A range of a filter in words."""
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
    return f"{row.msrs}{name}, {access}: {what}"


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


def _nested_lines(members: Sequence[tuple[VmState, VcpuGroup]], *, same: bool) -> list[str]:
    """What is said of the nested guests of vCPUs of which all is the same; `same`: and the same is said of these."""
    nested = members[0][1].nested
    if nested is None:
        return []
    parts = [USES[nested.bitmap]] if nested.bitmap != MERGED else []
    if nested.bitmap == MERGED:
        inside = [(vm, group.nested.running) for vm, group in members if group.nested and group.nested.running]
        if inside:
            where = heading(inside) if len(members) > 1 else f"vCPU {ids_text(inside[0][1])}"
            parts.append(f"in one just now: {where}")
        elif nested.running is not None:
            parts.append("in none just now; this is of the one that ran last")
        if same:
            parts.append("their accesses exit as the guest's own do")
        if not nested.settled:
            parts.append("their bitmap changes, or is to be merged anew when one is next entered")
    return [f"nested guests (L2): {part}" for part in parts]
