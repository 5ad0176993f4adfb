# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the file on the state of a host from what was read of its vCPUs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec

from tracer.model import msr
from tracer.model.msr_filter import DIRECTIONS, READ, WRITE, MsrFilter, joined
from tracer.model.state import State, Vcpu, Verdict, alike
from tracer.report.computer import ROWS, Computer
from tracer.report.making import HostInfo
from tracer.report.report import Report
from tracer.report.state_file import (
    Access,
    AccessRow,
    Filter,
    FilterRangeRow,
    NestedAccess,
    NestedGuests,
    Passed,
    StateFile,
    States,
    VcpuGroup,
    VmState,
    range_text,
)

#: A part of what files may have (file.py); the indents of a file take as much again.
_REPORT_BYTES = 8 << 20


def make_state(state: State, host: HostInfo, *, taken: datetime, version: str, also: Iterable[int] = ()) -> StateFile:
    """The file on a state with the names of VMs.

    :param version: msrtrace's
    :param also: MSRs that are to be in it whatever is said of them
    """
    found = make_states(state, also)
    return StateFile(
        msrtrace=version,
        taken=taken.isoformat(timespec="milliseconds"),
        host=Computer(**host.fields(state.vendor.name)),
        vms=found.vms,
        notes=found.notes,
    )


def make_states(state: State, also: Iterable[int] = ()) -> States:
    """The VMs of a state, as a report has them. Where the same is said of vCPUs of many VMs, it is found once."""
    also = tuple(also)
    known: dict[Vcpu, VcpuGroup] = {}
    filters: dict[MsrFilter, Filter] = {}
    vms = []
    for vm in state.vms:
        groups = []
        for group in alike(vm):
            key = group[0].any_id
            if key not in known:
                known[key] = _group(state, key, also)
            ids = sorted(vcpu.id for vcpu in group)
            groups.append(msgspec.structs.replace(known[key], ids=ids, nested=_nested(known[key].nested, group)))
        if vm.filter and vm.filter not in filters:
            filters[vm.filter] = _filter(vm.filter)
        shown = filters[vm.filter] if vm.filter else None
        made = VmState(pid=vm.pid, name=vm.name, uuid=vm.uuid, owned=vm.owned, kind=vm.kind, filter=shown, vcpus=groups)
        vms.append(made)
    return States(vms=vms, notes=[*state.notes])


def state_of(report: Report) -> StateFile | None:
    """The file on the state when the trace of a report ended; None where the report has none."""
    if report.state is None:
        return None
    try:
        started = datetime.fromisoformat(report.started.replace("Z", "+00:00"))
        taken = (started + timedelta(seconds=report.duration_seconds)).isoformat()
    except (ValueError, OverflowError):  # in a file that was changed
        taken = report.started
    host = msgspec.convert(msgspec.to_builtins(report.host), Computer)
    return StateFile(msrtrace=report.msrtrace, taken=taken, host=host, vms=report.state.vms, notes=report.state.notes)


def states_of_report(state: State) -> States:
    """What the vCPUs intercepted when a trace ended. A report could not be read with too much: that is left out."""
    found = make_states(state)
    size = len(msgspec.json.encode(found))
    if size <= _REPORT_BYTES and len(found.vms) <= ROWS:
        return found
    what = f"the {len(found.vms):,} VMs are left out, as they would take {size / 1e6:.0f} MB: msrtrace state shows them"
    return States(vms=[], notes=[*found.notes, what])


def _group(state: State, vcpu: Vcpu, also: tuple[int, ...]) -> VcpuGroup:
    passed, rows = None, []
    if vcpu.bitmap is not None:
        passed = _passed(state.passed(vcpu, READ), state.passed(vcpu, WRITE))
        denied = [run for direction in DIRECTIONS for run in (vcpu.filter.denied(direction) if vcpu.filter else ())]
        touched = joined(denied)
        rows = [
            AccessRow(
                msrs=range_text(run),
                name=msr.name(run.start),
                read=verdict.read,
                write=verdict.write,
                in_filter=_overlaps(run, touched),
                nested=_nested_access(verdict.nested),
            )
            for run, verdict in state.verdicts(vcpu, also)
        ]
    nested = None
    if vcpu.nested:
        its = (state.nested_passed(vcpu, READ), state.nested_passed(vcpu, WRITE))
        its_passed = None if vcpu.nested.bitmap is None else _passed(*its)
        nested = NestedGuests(bitmap=vcpu.nested.use, settled=vcpu.nested.settled, running=None, passed=its_passed)
    return VcpuGroup(ids=[], ran=vcpu.ran, settled=vcpu.settled, passed=passed, msrs=rows, nested=nested)


def _passed(read: list[range], write: list[range]) -> Passed:
    return Passed(read=[range_text(run) for run in read], write=[range_text(run) for run in write])


def _nested_access(verdict: Verdict | None) -> NestedAccess | msgspec.UnsetType:
    return NestedAccess(read=verdict.read, write=verdict.write) if verdict else msgspec.UNSET


def _nested(made: NestedGuests | None, group: tuple[Vcpu, ...]) -> NestedGuests | None:
    """What was made of one vCPU of a group, with those of it that were in L2."""
    running = [(vcpu.id, vcpu.nested.running) for vcpu in group if vcpu.nested]
    if made is None or any(now is None for _, now in running):
        return made
    return msgspec.structs.replace(made, running=sorted(number for number, now in running if now))


_ACCESS: dict[int, Access] = {0: "none", READ: "read", WRITE: "write", READ | WRITE: "read_write"}


def _overlaps(run: range, ranges: list[range]) -> bool:
    """Whether a range overlaps one of sorted ranges that do not overlap."""
    at = bisect_right(ranges, run.start, key=lambda one: one.stop)
    return at < len(ranges) and ranges[at].start < run.stop


def _filter(one: MsrFilter) -> Filter:
    rows = [
        FilterRangeRow(
            msrs=range_text(part.msrs or range(part.base, part.base + 1)),
            access=_ACCESS[part.flags & (READ | WRITE) if part.msrs else 0],
            denied=[range_text(run) for run in part.denied()],
        )
        for part in one.ranges
    ]
    return Filter(default="allow" if one.default_allow else "deny", ranges=rows)
