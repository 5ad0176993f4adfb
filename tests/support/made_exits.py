# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits of a host with two VMs, of which one has a filter that denies what KVM would pass through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from made import report, toggle
from made_vms import FS_BASE, KERNEL_GS_BASE, XFD, denies, state, vcpu, vm

from tracer.model.exits import FAST, FILTERED, INVALID, L1, L2, OK, REFLECTED, SLOW, Exit
from tracer.model.snapshot import Snapshot, VmInfo
from tracer.model.state import State
from tracer.report.report import Report
from tracer.report.state_making import states_of_report

TSC_DEADLINE, PLATFORM_INFO, NO_MSR = 0x6E0, 0xCE, 0xDEADBEEF
GUARDED, PLAIN = 901, 812  # pids
FILTER = denies(FS_BASE, XFD)
#: KVM would pass FS_BASE and intercepts XFD; XFD is denied on top of that.
STATE: State = state(
    vm("guarded", GUARDED, vcpu(0, FILTER), vcpu(1, FILTER)),
    vm("plain", PLAIN),
)
EXITS = {
    Exit(FS_BASE, "write", SLOW, FILTERED, L1, GUARDED): 31_000,
    Exit(XFD, "write", SLOW, FILTERED, L1, GUARDED): 500,
    Exit(TSC_DEADLINE, "write", FAST, OK, L1, GUARDED): 40_000,
    Exit(TSC_DEADLINE, "write", FAST, OK, L1, PLAIN): 20_000,
    Exit(TSC_DEADLINE, "write", SLOW, OK, L2, PLAIN): 70,
    Exit(PLATFORM_INFO, "read", SLOW, OK, L1, PLAIN): 7,
    Exit(NO_MSR, "read", SLOW, INVALID, L1, PLAIN): 5,
    Exit(KERNEL_GS_BASE, "read", SLOW, OK, L1, PLAIN): 3,
    Exit(FS_BASE, "write", SLOW, REFLECTED, L2, PLAIN): 2,
}
TOTAL, BY_FILTER = 91_587, 31_000


def exiting(*, by_vm: bool = False, counts: dict[Exit, int] | None = None, **changes: Any) -> Snapshot:
    """A trace with exits."""
    exits: dict[Exit, int] = {}
    for kind, count in (EXITS if counts is None else counts).items():
        key = kind if by_vm else replace(kind, pid=0)
        exits[key] = exits.get(key, 0) + count
    vms = {GUARDED: VmInfo("guarded"), PLAIN: VmInfo("plain")} if by_vm else {}
    return replace(toggle(), exits=exits, by_vm=by_vm, vms=vms, **changes)


def with_exits(counted: Snapshot | None = None, at_end: State | None = STATE, **details: Any) -> Report:
    """The report on a trace of 2.5 seconds with exits."""
    states = states_of_report(at_end) if at_end else None
    return report(counted or exiting(), state=states, intercepted=at_end, **details)
