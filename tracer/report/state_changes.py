# SPDX-License-Identifier: GPL-2.0-or-later
"""What changed between two readings of a state, a line for each change; equal changes of several vCPUs are one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tracer.model.state import WORDS, does_exit
from tracer.report.state_diff import Compared, Comparer, FilterDifference, VmDifference
from tracer.report.state_diff_view import access_text, is_none
from tracer.report.state_file import Filter, VmState, range_text
from tracer.report.state_view import DEFAULTS, RowChoice, filter_lines, heading, name_of, range_line, titles

_T = TypeVar("_T")
_RANGES = 8  # of MSRs in a line

#: VMs by what identifies them while they live, in their order.
Vms = Mapping[tuple[int, int], VmState]


def changes(before: Vms, now: Vms, shown: RowChoice) -> list[str]:
    """The lines: VMs that are gone, new ones, vCPUs that are gone or new, filters that were replaced, then accesses."""
    comparer = Comparer(shown)
    both = [comparer.vms(before[key], vm) for key, vm in now.items() if key in before]
    gone = [(vm, _ids(vm)) for key, vm in before.items() if key not in now]
    lines = [f"{heading(gone)}: VM gone"] if gone else []
    new = _folded((_filter_line(vm.filter), (vm, _ids(vm))) for key, vm in now.items() if key not in before)
    lines += [f"{heading(members)}: new VM, {line}" for line, members in new.items()]
    for word, which in (("gone", "only_one"), ("new", "only_other")):
        if members := [(found.other, getattr(found, which)) for found in both if getattr(found, which)]:
            lines.append(f"{heading(members)}: {word}")
    replaced = _folded((_replaced(found.filter), found.other) for found in both if found.filter)
    lines += [f"{titles(vms)}: {line}" for line, vms in replaced.items()]
    pairs = [pair for found in both for vcpus in found.vcpus for pair in _accesses(found, vcpus)]
    accesses = _folded((line, member) for _, line, member in sorted(pairs, key=lambda pair: pair[0]))
    return lines + [f"{heading(_by_vm(members))}: {line}" for line, members in accesses.items()]


def _folded(pairs: Iterable[tuple[str, _T]]) -> dict[str, list[_T]]:
    """The members of each line."""
    found: dict[str, list[_T]] = {}
    for line, member in pairs:
        found.setdefault(line, []).append(member)
    return found


def _ids(vm: VmState) -> tuple[int, ...]:
    return tuple(sorted(number for group in vm.vcpus for number in group.ids))


def _filter_line(one: Filter | None) -> str:
    if one is None:
        return "filter: could not be read"
    return "filter: none" if is_none(one) else f"filter: {'; '.join(filter_lines(one))}"


def _replaced(difference: FilterDifference) -> str:
    """What is new in a filter, in a line."""
    before, now = difference.one, difference.other
    if before is None or now is None or is_none(before):
        return _filter_line(now) if before is None or now is None else f"new {_filter_line(now)}"
    if is_none(now):
        return f"filter removed; it was: {'; '.join(filter_lines(before))}"
    parts = [f"it now {DEFAULTS[now.default]} what no range decides"] if before.default != now.default else []
    parts += [f"new range {range_line(row)}" for row in difference.only_other]
    parts += [f"range removed {range_line(row)}" for row in difference.only_one]
    return f"filter replaced: {'; '.join(parts) or 'the same ranges in another order'}"


def _accesses(found: VmDifference, vcpus: Compared) -> Iterator[tuple[bool, str, tuple[VmState, tuple[int, ...]]]]:
    """The lines on the accesses of vCPUs, and whose they are: MSRs with the same change are one line.

    The first of each is whether it can wait: accesses exit as before.
    """
    if vcpus.unread[0] != vcpus.unread[1]:
        can = "can be read again" if vcpus.unread[0] else "can no longer be read"
        yield False, f"what is intercepted {can}", (found.other, vcpus.ids)
    by_change: dict[tuple[str, str, str], list[range]] = {}
    accesses = [(row, access_text(row.access)) for row in vcpus.rows]
    accesses += [(row, f"in L2, {access_text(row.access)}") for row in vcpus.nested]
    for row, access in accesses:
        by_change.setdefault((access, row.one, row.other), []).append(row.msrs)
    for (access, before, now), ranges in by_change.items():
        named = [f"{range_text(msrs)} {name_of(msrs)}".rstrip() for msrs in ranges[:_RANGES]]
        more = sum(map(len, ranges[_RANGES:]))
        listed = ", ".join(named) + (f" and {more} more MSRs" if more else "")
        line = f"{access} of {listed}: {WORDS[before]} -> {WORDS[now]}"
        yield does_exit(before) == does_exit(now), line, (found.other, vcpus.ids)


def _by_vm(members: Iterable[tuple[VmState, tuple[int, ...]]]) -> list[tuple[VmState, list[int]]]:
    """Each VM once, with all its vCPUs."""
    found: dict[int, tuple[VmState, list[int]]] = {}
    for vm, ids in members:
        found.setdefault(id(vm), (vm, []))[1].extend(ids)
    return [(vm, sorted(ids)) for vm, ids in found.values()]
