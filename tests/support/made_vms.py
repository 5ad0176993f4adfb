# SPDX-License-Identifier: GPL-2.0-or-later
"""Synthetic states of vCPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from made import AMD_HOST, HOST

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, FilterRange, MsrFilter
from tracer.model.state import State, Vcpu, Vm
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX
from tracer.report.state_file import StateFile
from tracer.report.state_making import make_state

FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC, XFD = 0xC0000100, 0xC0000101, 0xC0000102, 0x10, 0x1C4
RW = READ | WRITE
Access = tuple[int, int]  # an MSR and a direction
#: What KVM passes through on the emulated hosts, and what the kernel records that it wants to intercept.
PASSED: frozenset[Access] = frozenset(
    {
        (TSC, READ),
        *((msr, way) for msr in (0x174, 0x175, 0x176, FS_BASE, GS_BASE, KERNEL_GS_BASE) for way in (READ, WRITE)),
    }
)
RECORDED = (TSC, XFD, 0x174, 0x175, 0x176, FS_BASE, GS_BASE, KERNEL_GS_BASE)
TAKEN = datetime(2026, 11, 27, 12, 0, 0, 500_000, tzinfo=timezone.utc)


def bitmap(vendor: Vendor, passed: Iterable[Access]) -> bytes:
    """A bitmap that lets these accesses pass."""
    geometry = vendor.bitmap_geometry
    found = bytearray(b"\xff" * geometry.size)
    for msr, direction in passed:
        place = geometry.place(msr, direction)
        assert place is not None
        found[place >> 3] &= ~(1 << (place & 7))
    return bytes(found)


def denies(*msrs: int, flags: int = RW, default_allow: bool = True) -> MsrFilter:
    """A filter with a range for each of these MSRs, which denies it."""
    return MsrFilter(default_allow, tuple(FilterRange(flags, msr, 1, bytes(8)) for msr in msrs))


def vcpu(
    number: int,
    filter_: MsrFilter = NO_FILTER,
    *,
    vendor: Vendor = VMX,
    wanted: frozenset[Access] = PASSED,
    applied: MsrFilter | None = None,
    recorded: bool = True,
    **changes: Any,
) -> Vcpu:
    """A vCPU of which KVM wants to let `wanted` pass, with a filter that it has applied, or still another one."""
    passed = {(msr, way) for msr, way in wanted if (filter_ if applied is None else applied).allows(msr, way)}
    words = [sum(((msr, way) not in wanted) << at for at, msr in enumerate(RECORDED)) for way in (READ, WRITE)]
    shadow = (words[0], words[1]) if recorded else None
    made = Vcpu(number, bitmap(vendor, passed), filter_, shadow, ran=True)
    return replace(made, **changes)


def vm(name: str, pid: int, *vcpus: Vcpu, **changes: Any) -> Vm:
    """A VM; without vCPUs, of two without a filter."""
    return replace(Vm(pid, pid << 12, vcpus or (vcpu(0), vcpu(1)), name=name), **changes)


def state(*vms: Vm, vendor: Vendor = VMX, **changes: Any) -> State:
    """A state of a host."""
    return replace(State(vendor, RECORDED, vms), **changes)


def file(*vms: Vm, vendor: Vendor = VMX, also: Iterable[int] = (), **changes: Any) -> StateFile:
    """The file on a state."""
    host = AMD_HOST if vendor is SVM else HOST
    return make_state(state(*vms, vendor=vendor, **changes), host, taken=TAKEN, version="1.0", also=also)
