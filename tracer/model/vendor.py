# SPDX-License-Identifier: GPL-2.0-or-later
"""The type of the tables of what differs between kinds of hardware virtualisation; vmx.py is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tracer.model.bitmap import Geometry
from tracer.model.cause import OTHER
from tracer.model.nested import NestedBitmap
from tracer.model.symbol_name import plain_name

#: Of KVM itself (vcpu): a vCPU has been created. arch/x86/kvm/x86.c, called by kvm_main.c alone.
VCPU_CREATED = "kvm_arch_vcpu_postcreate"


@dataclass(frozen=True)
class Layout:
    """The functions of KVM's MSR-intercept code in a range of kernels.

    `enable`, `disable` and `set_` take (vcpu, msr, type); `set_` has `bool set` as fourth argument. `pass_` takes
    (vcpu, bitmap, msr, int read, int write); it names both directions, and passes those through that are not 0.
    `update` (vcpu) recomputes a vCPU's bitmap; `filter_set` (kvm, filter) is probed where the update function runs for
    other reasons too, to tell those from a new filter.

    `writers` (vcpu) write or free a bitmap without a call, so the outcome of the last call is read before they run;
    `inlined_into` are the callers of the first, for where a compiler inlined it. At most two of each.
    """

    name: str
    kernels: str
    update: str
    enable: str | None = None
    disable: str | None = None
    set_: str | None = None
    pass_: str | None = None
    filter_set: str | None = None
    writers: tuple[str, ...] = ()
    inlined_into: tuple[str, ...] = ()

    @property
    def calls(self) -> tuple[str, ...]:
        """The functions whose every call is counted."""
        return tuple(f for f in (self.enable, self.disable, self.set_, self.pass_) if f)

    @property
    def functions(self) -> tuple[str, ...]:
        """All functions; those whose calls are counted come first."""
        return tuple(f for f in (*self.calls, self.update, self.filter_set) if f)


@dataclass(frozen=True)
class FilterLoop:
    """The MSRs that a filter update of kernels before 6.17 enables: they show whether a kernel has verdict.py's patch.

    `msrs` are those of the loop that the patch changed; `also_enabled` are enabled with the patch and without.
    """

    msrs: tuple[range, ...]
    also_enabled: tuple[range, ...]


@dataclass(frozen=True)
class Passable:
    """MSRs that KVM may let a guest access itself, in the directions `flags` (READ, WRITE of msr_filter.py).

    `always`: for every guest, on kernels that do not record it (6.17+), unless the filter denies it.
    `unlisted`: kernels that record what KVM wants may pass these through without a record of it.
    `merged`: for guests of the guest, what KVM passes through and L1 does, too, passes: in every kernel (True), in none
    (False), or in some.
    """

    msrs: range
    flags: int
    always: bool = False
    unlisted: bool = False
    merged: bool | None = None


#: MSR_INVALID of KVM.
NO_MSR = 0xFFFFFFFF
#: MSRs of which a kernel records what KVM wants, at most: a word for each direction.
SHADOWED = 64


@dataclass(frozen=True)
class Shadow:
    """Where kernels before 6.17 record what KVM itself wants: a word for reads and one for writes.

    A bit is for the MSR at the same place in the array `list_` (a symbol), whose elements have `stride` bytes and begin
    with the MSR. `last` is the last of them in every kernel; it may be NO_MSR, which is none. `passes`: a set bit means
    that KVM passes accesses through; else that it intercepts them.
    """

    member: tuple[str, str]
    list_: str
    stride: int
    last: int
    passes: bool

    def msrs(self, content: bytes) -> tuple[int, ...] | None:
        """The MSRs of the array, from the memory that begins with it; None unless that is such an array."""
        found: list[int] = []
        for at in range(0, min(len(content), SHADOWED * self.stride) - 3, self.stride):
            msr = int.from_bytes(content[at : at + 4], "little")
            if msr in found:
                return None
            found.append(msr)
            if msr == self.last:
                return tuple(one for one in found if one != NO_MSR)
        return None


@dataclass(frozen=True)
class Vendor:
    """One kind of hardware virtualisation and its KVM module. No other code names either."""

    name: str
    #: For people: the maker and the feature.
    title: str
    #: Its flag in /proc/cpuinfo, and its name.
    cpu_flag: str
    cpu_feature: str
    #: `vendor_id` in /proc/cpuinfo of the CPUs that may have it
    makers: tuple[str, ...]
    #: The fix where the firmware has disabled it, and whether the CPU has the flag even then, in some kernels.
    firmware_fix: str
    flag_if_disabled: bool
    module: str
    #: The module's file below /lib/modules, and the option that builds it.
    module_file: str
    config_option: str
    #: Parameters of the module that change which MSRs are passed through, and how often that changes.
    parameters: tuple[str, ...]
    #: The prefix of the module's functions, and one whose presence shows that they are built into the kernel image.
    prefix: str
    marker: str
    #: Newest first: the order in which they are tried.
    layouts: tuple[Layout, ...]
    #: The creation and the destruction of a vCPU, by any of these names.
    vcpu_create: tuple[str, ...]
    vcpu_free: tuple[str, ...]
    #: Pairs of structure and member, each inside the one before, from the vCPU to the address of its bitmap.
    bitmap: tuple[tuple[str, str], ...]
    #: Values of bpf/values.h that say where the bits of an MSR are in it, and the same for readers of a whole bitmap.
    geometry: Mapping[str, int]
    bitmap_geometry: Geometry
    nested: NestedBitmap
    shadow: Shadow
    passable: tuple[Passable, ...]
    #: By which an exit of a nested guest becomes its guest's, by any of these names: bpf/exits.c knows its arguments.
    nested_exit: tuple[str, ...]
    #: Callers, as regular expressions that match whole names, and their causes; the first match wins.
    callers: tuple[tuple[str, str], ...]
    #: None: KVM never had the patch for this vendor.
    filter_loop: FilterLoop | None = None
    #: The kind of VM (KVM_CREATE_VM's type) whose vCPUs have no bitmap of KVM's, and its name.
    no_bitmap: tuple[int, str] | None = None
    #: Where the structure around a vCPU has the address of what says why its guest exited, and where it is there; None:
    #: the arguments of `nested_exit` say it. Before 5.11, without BTF, it is next to the vCPU.
    control_block: tuple[str, str] | None = None
    control_block_values: Mapping[str, int] = field(default_factory=dict)

    @property
    def module_name(self) -> str:
        """The module's name as modprobe and the files of /lib/modules spell it."""
        return self.module_file.removesuffix(".ko")

    @cached_property
    def _callers(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple((re.compile(pattern), cause) for pattern, cause in self.callers)

    def cause_of(self, function: str) -> str:
        """The cause of a call by this function of KVM, whatever suffix a compiler has added to its name."""
        name = plain_name(function)
        return next((cause for pattern, cause in self._callers if pattern.fullmatch(name)), OTHER)

    @property
    def probed(self) -> tuple[str, ...]:
        """Every function that may be probed."""
        layouts = [f for one in self.layouts for f in (one.update, *one.calls, one.filter_set) if f]
        writers = [f for one in self.layouts for f in (*one.writers, *one.inlined_into)]
        return tuple(dict.fromkeys([*layouts, *self.vcpu_create, VCPU_CREATED, *self.vcpu_free, *writers]))

    def layout(self, name: str) -> Layout | None:
        """The layout of that name, or None."""
        return next((layout for layout in self.layouts if layout.name == name), None)

    def counted_functions(self, layout: str) -> frozenset[str]:
        """The functions whose probes the counts of the named layout depend on: without one of them counts are missing.

        Where calls are counted, these include the functions before which the outcome of a call must be read.
        """
        known = self.layout(layout)
        if known is None:
            return frozenset()
        settling = (*self.vcpu_free, *known.writers, *known.inlined_into) if known.calls else ()
        return frozenset((known.update, *known.calls, *settling))
