# SPDX-License-Identifier: GPL-2.0-or-later
"""Two states compared: of which accesses something else is said, and how the VMs' filters differ."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import msgspec

from tracer.model.msr_filter import X2APIC
from tracer.model.nested import L1, L1_OR_UNMERGED, MERGED, NONE, OWN
from tracer.model.state import BOTH, KVM, UNKNOWN, does_exit
from tracer.model.text import printable
from tracer.report.computer import Computer, Difference, differing, machines, parameters
from tracer.report.state_file import Filter, FilterRangeRow, States, VcpuGroup, VmState, msr_range
from tracer.report.state_view import RowChoice

SCHEMA = "msrtrace-state-comparison/1"
_T = TypeVar("_T")
_Key = TypeVar("_Key", bound=Hashable)
_ALL = RowChoice(everything=True)


def readable(vm: VmState) -> bool:
    """Whether all that its vCPUs intercept, and its filter, could be read."""
    return vm.filter is not None and all(group.passed is not None for group in vm.vcpus)


@dataclass(frozen=True)
class Differing:
    """MSRs of which something else is said on either side; `access` is read, write or read_write."""

    msrs: range
    access: str
    one: str
    other: str


@dataclass(frozen=True)
class FilterDifference:
    """Filters that differ; None: it could not be read. The ranges are those that only one of them has."""

    one: Filter | None
    other: Filter | None
    only_one: tuple[FilterRangeRow, ...] = ()
    only_other: tuple[FilterRangeRow, ...] = ()


@dataclass(frozen=True)
class Compared:
    """vCPUs with these ids, of which the same differs; `unread`: whether the bitmaps of either side cannot be read.

    `nested`: what differs for their nested guests, where both sides have these.
    """

    ids: tuple[int, ...]
    rows: tuple[Differing, ...]
    unread: tuple[bool, bool] = (False, False)
    nested: tuple[Differing, ...] = ()


@dataclass(frozen=True)
class VmDifference:
    """A VM on either side, and in what it differs. `only_one` and `only_other`: ids of vCPUs on one side only."""

    one: VmState
    other: VmState
    filter: FilterDifference | None
    vcpus: tuple[Compared, ...]
    only_one: tuple[int, ...] = ()
    only_other: tuple[int, ...] = ()

    @property
    def common(self) -> dict[int, bool]:
        """The ids that vCPUs have on both sides, and whether what they intercept could be read on both."""
        known, its = (
            {number: vm.filter is not None and group.passed is not None for group in vm.vcpus for number in group.ids}
            for vm in (self.one, self.other)
        )
        return {number: known[number] and its[number] for number in known if number in its}

    @property
    def content(self) -> tuple[object, ...]:
        """All but whose difference it is; false if there is none."""
        return (self.filter, self.vcpus, self.only_one, self.only_other) if self else ()

    def __bool__(self) -> bool:
        return bool(self.filter or self.vcpus or self.only_one or self.only_other)


@dataclass(frozen=True)
class Side:
    """A side of a comparison: VMs of a host at a moment (UTC, ISO 8601), or one of them."""

    title: str
    host: Computer
    taken: str
    vms: tuple[VmState, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", printable(self.title))  # which may be the name of a file


@dataclass(frozen=True)
class StateDiff:
    """Two sides compared.

    `alike`: VMs that do not differ; `differing`: those that do, the VMs with the same differences together; `unread`:
    those of which no difference is known, but not all can be read on both sides.
    `only_one` and `only_other`: VMs without a match on the other side. `hosts`: what differs between the machines.
    `compared`: how many vCPUs are on both sides and could be read on both; `blind`: how many could not.
    """

    one: Side
    other: Side
    alike: tuple[VmState, ...]
    unread: tuple[VmState, ...]
    differing: tuple[tuple[VmDifference, ...], ...]
    only_one: tuple[VmState, ...]
    only_other: tuple[VmState, ...]
    hosts: tuple[Difference, ...]
    compared: int
    blind: int

    @property
    def matched(self) -> int:
        """How many VMs are on both sides."""
        return len(self.alike) + len(self.unread) + sum(map(len, self.differing))


class _Said:
    """What is said of every MSR, for vCPUs of a VM: of those that are in no row, that all accesses exit.

    `nested`: what is said of nested guests.
    """

    def __init__(self, vm: VmState, group: VcpuGroup, *, nested: bool = False) -> None:
        said = ((row, (nested and row.nested) or row) for row in group.msrs)
        rows = ((msr_range(row.msrs), words.read, words.write, row.in_filter) for row, words in said)
        self._rows = sorted((row for row in rows if row[0]), key=lambda row: row[0].start)
        self._starts = [msrs.start for msrs, *_ in self._rows]
        self._known = group.passed is not None and vm.filter is not None
        self._denied = bool(vm.filter and vm.filter.default == "deny")

    @property
    def bounds(self) -> Iterator[int]:
        """Where a range of MSRs begins or ends."""
        return (bound for msrs, *_ in self._rows for bound in (msrs.start, msrs.stop))

    def row(self, msr: int) -> tuple[str, str, bool] | None:
        """What is said of reading and writing an MSR, and whether a range of the filter denies it; None: in no row."""
        at = bisect_right(self._starts, msr) - 1
        if at < 0 or msr not in self._rows[at][0]:
            return None
        return self._rows[at][1:]

    def rest(self, msr: int) -> tuple[str, str, bool]:
        """As `row`, for an MSR that is in none: no kernel passes it through, and no range of the filter denies it."""
        said = UNKNOWN if not self._known else BOTH if self._denied and msr not in X2APIC else KVM
        return said, said, False


def _joined(parts: Iterable[tuple[range, _Key]]) -> list[tuple[range, _Key]]:
    """Ranges that follow each other, of which the same is said, as one; `parts` are in the order of MSRs."""
    found: list[tuple[range, _Key]] = []
    last: dict[_Key, int] = {}
    for msrs, key in parts:
        at = last.get(key, -1)
        if at >= 0 and found[at][0].stop == msrs.start:
            found[at] = range(found[at][0].start, msrs.stop), key
        else:
            last[key] = len(found)
            found.append((msrs, key))
    return found


def compare_vcpus(one: _Said, other: _Said, shown: RowChoice = _ALL) -> tuple[Differing, ...]:
    """The accesses of which something else is said, in the order of MSRs."""
    return tuple(Differing(msrs, *key) for msrs, key in _joined(_different(one, other, shown)))


def _different(one: _Said, other: _Said, shown: RowChoice) -> Iterator[tuple[range, tuple[str, str, str]]]:
    bounds = {*one.bounds, *other.bounds, X2APIC.start, X2APIC.stop}
    bounds |= {bound for msr in shown.only for bound in (msr, msr + 1)}
    for start, stop in pairwise(sorted(bounds)):
        rows = one.row(start), other.row(start)
        if rows == (None, None) or (shown.only and start not in shown.only):
            continue
        read, write, here = rows[0] or one.rest(start)
        read_other, write_other, there = rows[1] or other.rest(start)
        for access, pair in _by_access((read, read_other), (write, write_other)).items():
            if pair[0] != pair[1] and (shown.only or shown.wants(set(pair), in_filter=here or there)):
                yield range(start, stop), (access, *pair)


def _by_access(read: _T, write: _T) -> dict[str, _T]:
    """What is said of reading and of writing, as one where it is the same."""
    return {"read_write": read} if read == write else {"read": read, "write": write}


def compare_filters(one: Filter | None, other: Filter | None) -> FilterDifference | None:
    """How two filters differ; None if they do not."""
    if one == other:
        return None
    if one is None or other is None:
        return FilterDifference(one, other)
    left = list(other.ranges)
    only_one = []
    for row in one.ranges:
        if row in left:
            left.remove(row)
        else:
            only_one.append(row)
    return FilterDifference(one, other, tuple(only_one), tuple(left))


class Comparer:
    """Compares VMs; what many of them have in common is compared once."""

    def __init__(self, shown: RowChoice = _ALL) -> None:
        self._shown = shown
        self._said: dict[object, _Said] = {}
        self._rows: dict[object, tuple[Differing, ...]] = {}
        self._held: list[object] = []  # whose ids are keys

    def vms(self, one: VmState, other: VmState) -> VmDifference:
        """In what two VMs differ: their filters, and their vCPUs with the same id."""
        groups, others = ({id_: group for group in vm.vcpus for id_ in group.ids} for vm in (one, other))
        pairs: dict[tuple[int, int], list[int]] = {}
        for number in sorted(groups.keys() & others.keys()):
            pairs.setdefault((id(groups[number]), id(others[number])), []).append(number)
        found: dict[tuple[tuple[Differing, ...], tuple[bool, bool], tuple[Differing, ...]], list[int]] = {}
        for ids in pairs.values():
            group, its = groups[ids[0]], others[ids[0]]
            unread = (group.passed is None, its.passed is None)
            rows = () if True in unread else self._compared(self._of(one, group), self._of(other, its))
            nested = self._nested(one, group, other, its)
            if rows or nested or unread[0] != unread[1]:
                found.setdefault((rows, unread, nested), []).extend(ids)
        return VmDifference(
            one,
            other,
            compare_filters(one.filter, other.filter),
            tuple(Compared(tuple(sorted(ids)), *what) for what, ids in found.items()),
            tuple(sorted(groups.keys() - others.keys())),
            tuple(sorted(others.keys() - groups.keys())),
        )

    def _of(self, vm: VmState, group: VcpuGroup, *, nested: bool = False) -> _Said:
        key = (id(group.msrs), group.passed is None, vm.filter and vm.filter.default, nested)
        if key not in self._said:
            self._held.append(group.msrs)
            self._said[key] = _Said(vm, group, nested=nested)
        return self._said[key]

    def _nested(self, one: VmState, group: VcpuGroup, other: VmState, its: VcpuGroup) -> tuple[Differing, ...]:
        """What differs for nested guests; whether L1 wants it or KVM does not merge it is not known of all."""
        if any(known.nested is None or known.nested.bitmap not in (MERGED, OWN, NONE) for known in (group, its)):
            return ()
        rows = self._compared(self._of(one, group, nested=True), self._of(other, its, nested=True))
        return tuple(row for row in rows if not {row.one, row.other} <= {L1, L1_OR_UNMERGED})

    def _compared(self, one: _Said, other: _Said) -> tuple[Differing, ...]:
        if one is other:
            return ()
        key = (id(one), id(other))
        if key not in self._rows:
            self._rows[key] = compare_vcpus(one, other, self._shown)
        return self._rows[key]


def compare_states(one: Side, other: Side, shown: RowChoice = _ALL) -> StateDiff:
    """Compare two sides: VMs by their UUIDs, else by their names, or, where each has only one VM, these."""
    comparer = Comparer(shown)
    found = [comparer.vms(*pair) for pair in _pairs(one, other)]
    folded: dict[str, list[VmDifference]] = {}
    for difference in filter(None, found):
        folded.setdefault(repr(difference.content), []).append(difference)
    matched = {id(vm) for difference in found for vm in (difference.one, difference.other)}
    same = [difference for difference in found if not difference]
    only_one, only_other = (tuple(vm for vm in side.vms if id(vm) not in matched) for side in (one, other))
    named = bool(one.host.name and other.host.name)
    return StateDiff(
        one,
        other,
        alike=tuple(both.one for both in same if readable(both.one) and readable(both.other)),
        unread=tuple(both.one for both in same if not (readable(both.one) and readable(both.other))),
        differing=tuple(map(tuple, folded.values())),
        only_one=only_one,
        only_other=only_other,
        hosts=tuple(differing([*machines(one.host, other.host, named=named), *parameters(one.host, other.host)])),
        compared=sum(sum(both.common.values()) for both in found),
        blind=sum(len(both.common) - sum(both.common.values()) for both in found),
    )


def _pairs(one: Side, other: Side) -> Iterator[tuple[VmState, VmState]]:
    """VMs that are compared: those of one UUID, then those of one name.

    Of several, first those with the same pid, if the sides are of one host; of one name, then those that are alike.
    """
    if len(one.vms) == len(other.vms) == 1:
        yield one.vms[0], other.vms[0]
        return
    ways: list[Callable[[VmState], Hashable]] = [
        lambda vm: vm.uuid and (vm.uuid, vm.pid),
        lambda vm: vm.uuid,  # "": not in this way
        lambda vm: (vm.name, vm.pid),
        lambda vm: (vm.name, msgspec.json.encode((vm.filter, vm.vcpus))),
        lambda vm: (vm.name,),
    ]
    if one.host.name != other.host.name:
        ways = ways[1:2] + ways[3:]  # pids say nothing
    left, right = list(one.vms), list(other.vms)
    for way in ways:
        waiting: dict[Hashable, list[VmState]] = {}
        for vm in right:
            waiting.setdefault(way(vm), []).append(vm)
        taken = set()
        for vm in left:
            if (key := way(vm)) and (found := waiting.get(key)):
                match = found.pop(0)
                taken |= {id(vm), id(match)}
                yield vm, match
        left, right = ([vm for vm in side if id(vm) not in taken] for side in (left, right))


@dataclass(frozen=True)
class OneSided:
    """MSRs that every vCPU of one side passes through, and every vCPU of the other intercepts.

    `base` and `new` have what is said of them on either side, by any vCPU; `access` is read, write or read_write.
    """

    msrs: range
    access: str
    base: tuple[str, ...]
    new: tuple[str, ...]


def one_sided(base: Iterable[States], new: Iterable[States]) -> tuple[OneSided, ...]:
    """What every vCPU that could be read passes through on one side, and intercepts on the other."""
    sides = [_all_said(states) for states in (base, new)]
    if not all(sides):
        return ()
    parts = _joined(_all_or_none(*sides))
    return tuple(OneSided(msrs, access, base_said, new_said) for msrs, (access, base_said, new_said) in parts)


def _all_or_none(*sides: Sequence[_Said]) -> Iterator[tuple[range, tuple[str, tuple[str, ...], tuple[str, ...]]]]:
    bounds = {bound for side in sides for one in side for bound in one.bounds} | {X2APIC.start, X2APIC.stop}
    for start, stop in pairwise(sorted(bounds)):
        if all(one.row(start) is None for side in sides for one in side):
            continue
        said = [[one.row(start) or one.rest(start) for one in side] for side in sides]
        read = [tuple(sorted({row[0] for row in side})) for side in said]
        write = [tuple(sorted({row[1] for row in side})) for side in said]
        for access, (base, new) in _by_access(read, write).items():
            ways = [{does_exit(word) for word in words} for words in (base, new)]
            if ways in ([{True}, {False}], [{False}, {True}]):
                yield range(start, stop), (access, base, new)


def _all_said(states: Iterable[States]) -> list[_Said]:
    """What is said of the vCPUs of VMs that can run, each thing once."""
    found: dict[bytes, _Said] = {}
    for vm in (vm for one in states for vm in one.vms if vm.owned):
        for group in vm.vcpus:
            if group.passed is not None and vm.filter is not None:
                key = msgspec.json.encode((group.msrs, vm.filter.default))
                found[key] = found.get(key) or _Said(vm, group)
    return list(found.values())
