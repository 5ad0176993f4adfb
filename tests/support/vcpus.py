# SPDX-License-Identifier: GPL-2.0-or-later
"""States of vCPUs for tests: bitmaps with some bits clear, what KVM records, and VMs of both vendors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, MsrFilter
from tracer.model.nested import MERGED, Nested
from tracer.model.state import State, Vcpu, Vm
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

Access = tuple[int, int]
TSC, SPEC_CTRL, FS_BASE, GS_BASE, STAR = 0x10, 0x48, 0xC0000100, 0xC0000101, 0xC0000081
APERF, PERFCTR0, RTIT_STATUS, LBR_FROM, PLATFORM_INFO = 0xE8, 0xC1, 0x571, 0x680, 0xCE
#: vmx_possible_passthrough_msrs[] of 6.12, and the start of direct_access_msrs[].
_MIDDLE = (FS_BASE, GS_BASE, 0xC0000102, 0x1C4, 0x1C5, 0x174, 0x175, 0x176)
VMX_LIST = (SPEC_CTRL, 0x49, 0x10B, TSC, *_MIDDLE, 0x660, 0x3FC, 0x3FD, 0x3FE)
SVM_LIST = (STAR, 0x174, 0x176, 0x175, GS_BASE, FS_BASE, 0xC0000102, SPEC_CTRL, 0x49)


def rw(*msrs: int) -> set[Access]:
    """Both directions of each."""
    return {(msr, direction) for msr in msrs for direction in (READ, WRITE)}


def bitmap(vendor: Vendor, passed: Iterable[Access] = ()) -> bytes:
    """All ones but for these accesses."""
    bits = (1 << vendor.bitmap_geometry.size * 8) - 1
    for msr, direction in passed:
        place = vendor.bitmap_geometry.place(msr, direction)
        assert place is not None
        bits &= ~(1 << place)
    return bits.to_bytes(vendor.bitmap_geometry.size, "little")


def shadow(recorded: tuple[int, ...], passed: Iterable[Access] = ()) -> tuple[int, int]:
    """What `Vcpu.shadow` is where KVM wants to pass these accesses through."""
    words = {READ: (1 << len(recorded)) - 1, WRITE: (1 << len(recorded)) - 1}
    for msr, direction in passed:
        words[direction] &= ~(1 << recorded.index(msr))
    return words[READ], words[WRITE]


def vcpu(
    passed: Iterable[Access] = (),
    vmm_filter: MsrFilter | None = NO_FILTER,
    *,
    vendor: Vendor = VMX,
    wished: Iterable[Access] | None = None,
    id: int = 0,
    **changes: Any,
) -> Vcpu:
    """A vCPU whose bitmap passes PASSED; WISHED is what KVM records that it would pass, None: it records nothing."""
    listed = VMX_LIST if vendor is VMX else SVM_LIST
    words = None if wished is None else shadow(listed, wished)
    return Vcpu(id, bitmap(vendor, passed), vmm_filter, words, **changes)


def merged(vendor: Vendor, passed: Iterable[Access] = (), **changes: Any) -> Nested:
    """Of nested guests for which KVM merges a bitmap that passes PASSED."""
    return Nested(MERGED, bitmap(vendor, passed), **changes)


def state(*vms: Vm, vendor: Vendor = VMX, recording: bool = False, notes: tuple[str, ...] = ()) -> State:
    """A host of 6.17 or newer, or of one that records what KVM wants."""
    listed = VMX_LIST if vendor is VMX else SVM_LIST
    return State(vendor, listed if recording else (), vms, notes)


OLD, NEW = state(recording=True), state()
OLD_AMD, NEW_AMD = state(vendor=SVM, recording=True), state(vendor=SVM)
