# SPDX-License-Identifier: GPL-2.0-or-later
"""A comparison of two states in words, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import msgspec

from tracer.model import msr
from tracer.model.msr_filter import joined
from tracer.model.quantity import listed
from tracer.model.state import BOTH, FILTER, KVM, PENDING_ALLOWED, UNRECORDED, WORDS, does_exit
from tracer.report.document import Document, Section, Table, document
from tracer.report.state_diff import (
    SCHEMA,
    Compared,
    Differing,
    FilterDifference,
    Side,
    StateDiff,
    VmDifference,
    readable,
)
from tracer.report.state_file import Filter, VmState, range_text
from tracer.report.state_view import (
    DEFAULTS,
    filter_lines,
    heading,
    ids_text,
    listed_names,
    name_of,
    range_line,
    words,
)

#: Who wants that accesses exit: with how many.
_WANTS = {
    FILTER: "the filter alone denies {}",
    KVM: "KVM itself intercepts {}",
    BOTH: "KVM and the filter both intercept {}",
    UNRECORDED: "{} are intercepted, and whether KVM itself wants that is not recorded",
    PENDING_ALLOWED: "the filter allows {}, which is not applied yet",
}
_NAMES = 4  # of MSRs in a sentence


def sentence(diff: StateDiff) -> str:
    """The answer: where one exits and the other does not, and who wants that."""
    one, other = diff.one.title, diff.other.title
    if not diff.matched:
        return f"no VM is both in {one} and in {other}"
    parts = [_exits(diff, one, other, swapped=False), _exits(diff, other, one, swapped=True)]
    lead = ""
    if len(diff.one.vms) > 1 or len(diff.other.vms) > 1:
        count = sum(map(len, diff.differing))
        lead = f"{count or 'none'} of {diff.matched} VMs that are in both differ{'s' * (count == 1)}: "
    return lead + ("; ".join(filter(None, parts)) or _no_exits(diff))


def _no_exits(diff: StateDiff) -> str:
    """The sentence where the same accesses exit on both sides."""
    one, other = diff.one.title, diff.other.title
    found = [difference for group in diff.differing for difference in group]
    rows = [row for difference in found for vcpus in difference.vcpus for row in vcpus.rows]
    filters = any(difference.filter for difference in found)
    if diff.blind and not diff.compared:
        sides = [side.title for side in (diff.one, diff.other) if not all(map(readable, side.vms))]
        which = "their filters differ" if filters else "no difference is known"
        return f"what exits cannot be read in {listed(sides)}; {which}"
    partly = ", as far as it can be read" if diff.blind else ""
    if count := _count(rows):
        return f"the same accesses exit in {one} and in {other}{partly}, {count} of them for another reason"
    why = "though their filters differ" if filters else "for the same reasons"
    return f"the same accesses exit in {one} and in {other}{partly}, {why}"


def _exits(diff: StateDiff, one: str, other: str, *, swapped: bool) -> str:
    """Where `one` exits and the other side does not: how many accesses, who wants that, and of which MSRs."""
    by_reason: dict[str, list[Differing]] = {}
    everywhere = True
    for found, vcpus in ((group[0], vcpus) for group in diff.differing for vcpus in group[0].vcpus):
        for row in vcpus.rows:
            here, there = (row.other, row.one) if swapped else (row.one, row.other)
            if does_exit(here) and does_exit(there) is False:
                by_reason.setdefault(here, []).append(row)
                everywhere &= len(vcpus.ids) == len(found.common)
    if not by_reason:
        return ""
    count = _count(row for rows in by_reason.values() for row in rows)
    reasons = listed(_WANTS[said].format(_count(rows)) for said, rows in by_reason.items())
    ranges = joined([row.msrs for rows in by_reason.values() for row in rows])
    names = [msr.name(run.start) for run in ranges[:_NAMES]]
    more = sum(map(len, ranges)) - len(names)
    shown = ", ".join(names) + (f" and {more} more" if more else "")
    some = "" if everywhere else ", on some vCPUs"
    return f"{one} exits on {count} access{'es' * (count > 1)} where {other} does not{some} ({shown}): {reasons}"


def _count(rows: Iterable[Differing]) -> int:
    """How many accesses: pairs of an MSR and a direction."""
    by_direction: dict[str, list[range]] = {}
    for row in rows:
        for direction in row.access.split("_"):
            by_direction.setdefault(direction, []).append(row.msrs)
    return sum(len(run) for ranges in by_direction.values() for run in joined(ranges))


def state_diff_document(diff: StateDiff) -> Document:
    """The comparison as a document."""
    one, other = diff.one, diff.other
    sections: list[Section] = []
    used: set[str] = set()
    for group in diff.differing:
        sections += _sections(diff, group)
        rows = (row for vcpus in group[0].vcpus for row in (*vcpus.rows, *vcpus.nested))
        used |= {said for row in rows for said in (row.one, row.other)}
    for side, vms in ((one, diff.only_one), (other, diff.only_other)):
        if vms:
            sections.append(Section(f"Only in {side.title}", (heading((vm, _ids(vm)) for vm in vms),)))
    for title, vms in (("No difference", diff.alike), ("Cannot be compared", diff.unread)):
        if vms and diff.matched > 1:
            sections.append(Section(title, (heading((vm, _ids(vm)) for vm in vms),)))
    if diff.hosts:
        cells = tuple((found.what, found.base, found.new) for found in diff.hosts)
        sections.append(Section("The hosts differ in", table=Table(("", one.title, other.title), cells, names=3)))
    notes = [note for note in one.notes if note in other.notes]
    notes += [f"{side.title}: {note}" for side in (one, other) for note in side.notes if note not in notes]
    when = tuple(f"{side.title}: {_origin(side)}" for side in (one, other))
    sections += [words(used), Section("Where and when", when), Section("Notes", tuple(notes))]
    return document(f"{one.title} and {other.title}", sentence(diff), _warnings(diff), sections)


def _warnings(diff: StateDiff) -> list[str]:
    one, other = diff.one.host, diff.other.host
    if one.vendor != other.vendor:
        return [
            f"warning: not the same kind of hardware ({one.title} and {other.title}): KVM passes other MSRs through"
        ]
    if one.kernel != other.kernel:
        return [f"warning: the kernels differ ({one.kernel} and {other.kernel}): KVM may pass other MSRs through"]
    return []


def _origin(side: Side) -> str:
    host = side.host
    return ", ".join(part for part in (host.name, f"Linux {host.kernel}", host.title, side.taken) if part)


def _ids(vm: VmState) -> list[int]:
    return sorted(number for group in vm.vcpus for number in group.ids)


def _sections(diff: StateDiff, group: Sequence[VmDifference]) -> list[Section]:
    """The sections on VMs with the same differences: one for their filters, and one for each group of vCPUs."""
    first = group[0]
    one, other = diff.one.title, diff.other.title
    single = len(diff.one.vms) == len(diff.other.vms) == 1
    vms = "" if single else listed_names([difference.one.name or difference.one.title for difference in group])
    lines = filter_difference_lines(first.filter, one, other) if first.filter else []
    for title, ids in ((one, first.only_one), (other, first.only_other)):
        if ids:
            lines.append(f"only in {title}: vCPU {ids_text(ids)}")
    sections = [Section(vms or "Filters and vCPUs", tuple(lines))] if lines else []
    for vcpus in first.vcpus:
        which = f"vCPU {ids_text(vcpus.ids)}"
        title = f"{vms}: {which}" if vms else which
        sections.append(Section(title, tuple(_unread_lines(vcpus, one, other)), _table(vcpus, one, other)))
    return sections


def _unread_lines(vcpus: Compared, one: str, other: str) -> list[str]:
    titles = [title for title, unread in zip((one, other), vcpus.unread, strict=True) if unread]
    return [f"what is intercepted cannot be read in {title}" for title in titles]


def _table(vcpus: Compared, one: str, other: str) -> Table:
    accesses = [(row, access_text(row.access)) for row in vcpus.rows]
    accesses += [(row, f"{access_text(row.access)} in L2") for row in vcpus.nested]
    cells = tuple(
        (range_text(row.msrs), name_of(row.msrs), access, WORDS[row.one], WORDS[row.other]) for row, access in accesses
    )
    return Table(("MSR", "name", "access", one, other), cells, names=5)


def access_text(access: str) -> str:
    """`read_write` in words."""
    return access.replace("_", " and ")


def filter_difference_lines(difference: FilterDifference, one: str, other: str) -> list[str]:
    """How the filters of two sides differ, a line each for their defaults and for the ranges that one of them has."""
    sides = ((one, difference.one, difference.only_one), (other, difference.other, difference.only_other))
    unread = [f"the filter of {title} could not be read" for title, found, _ in sides if found is None]
    if unread:
        return unread
    for title, found, _ in sides:
        if found and is_none(found):
            another, its = next((name, rest) for name, rest, _ in sides if rest is not found)
            return [
                f"{title} has no filter",
                *(f"the filter of {another}: {line}" for line in filter_lines(its or found)),
            ]
    lines = []
    defaults = [found.default for _, found, _ in sides if found]
    if defaults[0] != defaults[1]:
        lines.append(f"what no range decides: {one} {DEFAULTS[defaults[0]]} it, {other} {DEFAULTS[defaults[1]]} it")
    for title, _, ranges in sides:
        lines += [f"only in the filter of {title}: {range_line(row)}" for row in ranges]
    return lines or ["the filters have the same ranges in another order; the first that an access is in decides"]


def is_none(found: Filter) -> bool:
    """Whether there is no filter: it allows everything."""
    return found.default == "allow" and not found.ranges


def state_diff_json(diff: StateDiff) -> bytes:
    """The comparison as JSON: `schema` is "msrtrace-state-comparison/1"."""

    def side(one: Side) -> dict[str, object]:
        return {"title": one.title, "host": one.host, "taken": one.taken, "vms": len(one.vms), "notes": [*one.notes]}

    def vm(one: VmState, only: Sequence[int] = ()) -> dict[str, object]:
        return {"name": one.name, "uuid": one.uuid, "pid": one.pid, "vcpus": _ids(one), "only_here": [*only]}

    def rows(found: Iterable[Differing]) -> list[dict[str, object]]:
        return [
            {
                "msrs": range_text(row.msrs),
                "name": msr.name(row.msrs.start),
                "access": row.access,
                "a": row.one,
                "b": row.other,
            }
            for row in found
        ]

    def filters(one: FilterDifference | None) -> dict[str, object] | None:
        if one is None:
            return None
        return {"a": one.one, "b": one.other, "only_a": [*one.only_one], "only_b": [*one.only_other]}

    made = {
        "schema": SCHEMA,
        "sentence": sentence(diff),
        "a": side(diff.one),
        "b": side(diff.other),
        "vms": [
            {
                "a": vm(found.one, found.only_one),
                "b": vm(found.other, found.only_other),
                "filter": filters(found.filter),
                "differences": [
                    {"vcpus": [*vcpus.ids], "unreadable": dict(zip("ab", vcpus.unread, strict=True))}
                    | {"msrs": rows(vcpus.rows), "nested_msrs": rows(vcpus.nested)}
                    for vcpus in found.vcpus
                ],
            }
            for group in diff.differing
            for found in group
        ],
        "no_difference": [vm(one) for one in diff.alike],
        "not_compared": [vm(one) for one in diff.unread],
        "only_a": [vm(one) for one in diff.only_one],
        "only_b": [vm(one) for one in diff.only_other],
        "hosts": [asdict(found) for found in diff.hosts],
        "warnings": [line.removeprefix("warning: ") for line in _warnings(diff)],
    }
    return msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
