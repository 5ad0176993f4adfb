# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads what every vCPU intercepts, by an iterator of the kernel over all open files: see bpf/state.c."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.headers import header_settings
from tracer.kernel.symbols import VCPU_RELEASE, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.msr_filter import FilterRange, MsrFilter
from tracer.model.nested import UNREADABLE, Nested
from tracer.model.snapshot import VmInfo
from tracer.model.state import State, Vcpu, Vm
from tracer.model.vendor import SHADOWED
from tracer.program import syscalls
from tracer.program.compiler import build, is_compiled
from tracer.program.program import NotPermitted, Target, Variant
from tracer.program.resources import resource
from tracer.program.structs import Content, Record
from tracer.trace.nested_reading import NestedReading, nested_readings, nested_values
from tracer.trace.reader import is_in_init_pid_namespace
from tracer.trace.vm_info import VmInfos

SOURCE = "bpf/state.c"
_ITERATOR = "bpf_iter_task_file"
_FAILED = "what vCPUs intercept cannot be read"
_BITMAP_FAILED, _FILTER_FAILED = 1, 2
#: KVM_REQ_MSR_FILTER_CHANGED, since 6.18 KVM_REQ_RECALC_INTERCEPTS: KVM_ARCH_REQ(29), arch/x86/include/asm/kvm_host.h
_REQUEST = 1 << (8 + 29)
_RCU_SEQ_STATE = 3  # a grace period is under way: RCU_SEQ_STATE_MASK, kernel/rcu/rcu.h
#: How often a vCPU that changes is read again, how many reads in a row must find it as it was, and how long to wait
#: before each; the first two also for kernels that do not record what they want. There, a bit that is set says that KVM
#: wants it if the filter allows it and is not newer than the bitmap. While a filter is new, there is a grace period and
#: then a request; before, between and after them there is no trace, as long as a thread waits for a CPU.
_READS, _EQUAL, _PAUSE_SECONDS = 6, 1, 0.02
_UNRECORDED_READS, _UNRECORDED_EQUAL = 10, 5

#: Values of bpf/state.c, and where the structures have them. Those that are needed, and those that only tell more.
_OFFSETS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "file_f_op": (("file", "f_op"),),
    "file_operations_release": (("file_operations", "release"),),
    "file_private_data": (("file", "private_data"),),
    "task_tgid": (("task_struct", "tgid"),),
    "task_mm": (("task_struct", "mm"),),
    "vcpu_kvm": (("kvm_vcpu", "kvm"),),
    "vcpu_vcpu_id": (("kvm_vcpu", "vcpu_id"),),
    "vcpu_requests": (("kvm_vcpu", "requests"),),
    "kvm_mm": (("kvm", "mm"),),
    "kvm_filter": (("kvm", "arch"), ("kvm_arch", "msr_filter")),
}
_MORE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vcpu_exits": (("kvm_vcpu", "stat"), ("kvm_vcpu_stat", "exits")),
    "kvm_vm_type": (("kvm", "arch"), ("kvm_arch", "vm_type")),  # 6.9
}
#: The sequence numbers of a VM's grace periods: since 6.4 struct srcu_struct has a pointer to them.
_SRCU = ("srcu_gp_seq", "srcu_gp_seq_needed")


def state_program_is_compiled() -> bool:
    """Whether the program that reads states is already compiled, for this msrtrace on this machine."""
    return is_compiled(resource(SOURCE), {})


def named(state: State, infos: VmInfos) -> State:
    """The state with the names and UUIDs of its VMs; those of processes that are gone have none."""
    found = ((vm, infos.info(vm.pid) or VmInfo("")) for vm in state.vms)
    return replace(state, vms=tuple(replace(vm, name=info.name, uuid=info.uuid) for vm, info in found))


class StateReader:
    """Ready to read, which needs no rights; closing it, or the end of its process, removes it from the kernel."""

    def __init__(
        self, symbols: Symbols, explain: Callable[[], str], pid: int | None = None, *, nested: bool = True
    ) -> None:
        """Compile and load. `explain` says why the kernel probably did not permit it. Raises MsrtraceError.

        :param pid: read the VMs of this process alone
        :param nested: read what is intercepted of the guests of guests, too
        """
        self._vendor, self._pid, self._reads_nested = symbols.vendor, pid, nested
        self.notes: list[str] = []
        try:
            kernel = Btf.of_kernel()
            iterator = Target("iterator", kernel.function_id(_ITERATOR))
        except BtfError as error:
            raise MsrtraceError(f"{_FAILED}: {error}") from None
        release = symbols.objects.get(VCPU_RELEASE)
        if release is None:
            needs = "root or CAP_SYSLOG, and kernel.kptr_restrict below 2, show addresses"
            raise MsrtraceError(f"{_FAILED}: /proc/kallsyms has no address of {VCPU_RELEASE}; {needs}")
        given = self._given = self._values(kernel, symbols) | {"vcpu_release": release.start}
        targets = {"file_listed": iterator, "copy_memory": Target("raw_tracepoint")}
        if "nested_made" in given:
            targets["nested_listed"] = iterator
        try:
            self._loaded = build(resource(SOURCE), [Variant("iterator", {}, targets, given)], header_settings).loaded
            functions = self._loaded.functions
            self._iterators = {
                name: syscalls.Iterator(functions[name]) for name, target in targets.items() if target is iterator
            }
        except NotPermitted:
            raise MsrtraceError(explain()) from None
        except OSError as error:
            raise MsrtraceError(f"{_FAILED}: {error.strerror}") from None
        if not is_in_init_pid_namespace():
            self.notes.append("only the VMs of this pid namespace are seen, and by other ids than processes have here")
        self._record = Record(self._loaded.members["records"])
        self._nested_record = Record(self._loaded.members["nested_records"])
        self.recorded = (
            self._recorded(symbols.objects.get(symbols.vendor.shadow.list_)) if given.get("vcpu_shadow") else ()
        )

    def _values(self, kernel: Btf, symbols: Symbols) -> dict[str, int]:
        vendor, btf = symbols.vendor, kernel
        module_btf = True
        if symbols.module:
            try:
                btf = Btf.of_module(symbols.module, base=kernel)
            except BtfError:
                module_btf = False
        try:
            given = {name: btf.nested_offset(path) for name, path in _OFFSETS.items()}
        except BtfError as error:
            raise MsrtraceError(f"{_FAILED}: {error}") from None
        for name, path in _MORE.items():
            with suppress(BtfError):
                given[name] = btf.nested_offset(path)
        with suppress(BtfError):
            given |= _grace_periods(btf)
        try:
            given["vcpu_bitmap"] = btf.nested_offset(vendor.bitmap)
            given["bitmap_bytes"] = vendor.bitmap_geometry.size
        except BtfError as error:
            why = f"/sys/kernel/btf has nothing of {symbols.module}" if not module_btf else str(error)
            self.notes.append(f"bitmaps cannot be read, so who intercepts what is unknown: {why}")
        else:
            with suppress(BtfError):
                given["vcpu_shadow"] = btf.offset(*vendor.shadow.member)
            if self._reads_nested:
                try:
                    given |= nested_values(btf, vendor.nested)
                except BtfError as error:
                    self.notes.append(f"what is intercepted of nested guests cannot be read: {error}")
        if vendor.no_bitmap and "kvm_vm_type" in given:
            given["no_bitmap"] = vendor.no_bitmap[0]
        return given

    def _recorded(self, where: range | None) -> tuple[int, ...]:
        """The MSRs of which this kernel records what KVM wants: of an array in its memory."""
        shadow = self._vendor.shadow
        note = "what KVM itself wants is not known"
        if where is None:
            self.notes.append(f"{note}: /proc/kallsyms has no {shadow.list_}")
            return ()
        size = min(len(where) or SHADOWED * shadow.stride, SHADOWED * shadow.stride)
        if syscalls.run_program(self._loaded.functions["copy_memory"], where.start, size):
            self.notes.append(f"{note}: {shadow.list_} cannot be read")
            return ()
        found = shadow.msrs(self._loaded.arrays["copies"].raw(0, size))
        if found is None:
            self.notes.append(f"{note}: {shadow.list_} does not end as that of known kernels")
        return found or ()

    def read(self, *, steady: bool = False) -> State:
        """What every vCPU intercepts, without names. Raises MsrtraceError.

        :param steady: read again while anything changes, with pauses of 0.2 s at most; what still does is not
            `settled`, and as it was when its filter could last be read. Else there may be filters that were just set,
            and nothing says yet that no vCPU applied them
        """
        found = self._read({})
        if not steady:
            return self._state(found, {key for key, one in found.items() if not one.moves})
        sure: dict[int, Reading] = {}
        whole = _with_filter(found)
        with_nested: set[int] = set()
        same: dict[int, int] = {}
        most, needed = (_READS, _EQUAL) if self.recorded else (_UNRECORDED_READS, _UNRECORDED_EQUAL)
        for _ in range(most):
            time.sleep(_PAUSE_SECONDS)
            before, found = found, self._read(found)
            same = {key: same.get(key, 0) + 1 if one.same_as(before.get(key)) else 0 for key, one in found.items()}
            for key, one in found.items():
                if same[key] >= needed and (one.nested_is_same or key not in with_nested):
                    sure[key] = one
                    with_nested |= {key} if one.nested_is_same else set()
            whole |= _with_filter(found)
            if found.keys() <= with_nested:
                break
        best = whole | sure
        return self._state({key: best.get(key, one) for key, one in found.items()}, sure.keys())

    def _read(self, before: Mapping[int, Reading]) -> dict[int, Reading]:
        """What is read of each vCPU, by its address; BEFORE is what was read then."""
        found = readings(self._raw(), self._record)
        if any(one.has_nested for one in found.values()):
            content = self._raw("nested_listed")
            for key, nested in nested_readings(content, self._nested_record, self._vendor.nested).items():
                if key in found:
                    found[key].nested = nested
            for key in found.keys() & before.keys():
                found[key].nested_before = before[key].nested
        return found

    def _raw(self, iterator: str = "file_listed") -> Iterator[bytes]:
        """What an iterator writes: the records of all vCPUs, or of those with a bitmap for nested guests."""
        try:
            yield from self._iterators[iterator].parts()
        except OSError as error:
            raise MsrtraceError(f"{_FAILED}: {error.strerror}") from None

    def _state(self, found: Mapping[int, Reading], sure: Collection[int]) -> State:
        """What was read, by the addresses of vCPUs; SURE are those of which it is known to fit together."""
        vms: dict[int, list[Reading]] = {}
        for one in found.values():
            vms.setdefault(one.kvm, []).append(one)
        made, no_bitmap = [], self._vendor.no_bitmap
        for kvm, readings in vms.items():
            readings.sort(key=lambda one: one.id)
            owner = next((one for one in readings if one.owned), readings[0])
            if self._pid not in (None, owner.tgid):
                continue
            vcpus = tuple(self._vcpu(one, sure=one.vcpu in sure) for one in readings)
            kind = no_bitmap[1] if no_bitmap and no_bitmap[0] == owner.vm_type else ""
            made.append(Vm(owner.tgid, kvm, vcpus, owned=owner.owned, kind=kind))
        vms_sorted = tuple(sorted(made, key=lambda vm: (vm.pid, vm.key)))
        return State(self._vendor, self.recorded, vms_sorted, tuple(self.notes))

    def _vcpu(self, one: Reading, *, sure: bool) -> Vcpu:
        shadow, mask = None, (1 << len(self.recorded)) - 1
        if self.recorded:
            words = one.shadow
            read, write = (~word if self._vendor.shadow.passes else word for word in words)
            shadow = (read & mask, write & mask)
        readable = "vcpu_bitmap" in self._given and one.vm_type != self._given.get("no_bitmap", -1)
        bitmap = one.bitmap if readable and not one.failed & _BITMAP_FAILED else None
        ran = bool(one.exits) if "vcpu_exits" in self._given else None
        nested = None
        if one.has_nested:
            nested = one.nested.model(one.nested_before, self._given) if one.nested else Nested(UNREADABLE)
        settled = sure and not one.requested
        return Vcpu(one.id, bitmap, one.filter, shadow, settled=settled, ran=ran, nested=nested, key=one.vcpu)

    def close(self) -> None:
        """Release everything in the kernel."""
        for iterator in self._iterators.values():
            iterator.close()
        self._loaded.close()


class Reading:
    """A record of bpf/state.c, and what follows it."""

    #: What was read of the bitmap for nested guests, now and in the reading before.
    nested: NestedReading | None = None
    nested_before: NestedReading | None = None

    def __init__(self, members: Mapping[str, Any], bitmap: bytes, filter_: MsrFilter) -> None:
        self.vcpu, self.kvm = members["vcpu"], members["kvm"]
        self.tgid, self.id = members["tgid"], members["vcpu_id"]
        self.owned, self.vm_type, self.exits = bool(members["owned"]), members["vm_type"], members["exits"]
        self.bitmap, self.failed = bitmap, members["failed"]
        self.shadow = members["shadow_read"], members["shadow_write"]
        self.requested = bool(members["requests"] & _REQUEST)
        self._grace_periods = members["gp_seq"]
        ahead = (members["gp_seq_needed"] - self._grace_periods) % (1 << 64)
        waits = bool(self._grace_periods & _RCU_SEQ_STATE) or 0 < ahead < 1 << 63
        self._address = members["filter"]
        replaced = self._address != members["filter_after"]
        #: Its filter may be a new one without a request yet, which follows a grace period; others wait for those, too.
        self.moves = replaced or waits
        self.filter = None if replaced or self.failed & _FILTER_FAILED else filter_
        #: Whether there is a bitmap for nested guests.
        self.has_nested = bool(members["nested"])

    def same_as(self, other: Reading | None) -> bool:
        """Whether an earlier reading of this vCPU found all of it as it is, and no filter was replaced in between."""
        return other is not None and not self.moves and self._content == other._content

    @property
    def nested_is_same(self) -> bool:
        """Whether the reading before found the same of nested guests."""
        return not self.has_nested or (self.nested is not None and self.nested.same_as(self.nested_before))

    @property
    def _content(self) -> tuple[object, ...]:
        # A filter may be where the one before the last was, and the same.
        return self.bitmap, self.failed, self.shadow, self.requested, self.filter, self._address, self._grace_periods


def _with_filter(found: Mapping[int, Reading]) -> dict[int, Reading]:
    """Those whose filter was not replaced, and so freed perhaps, while it was read."""
    return {key: one for key, one in found.items() if one.filter is not None}


def _grace_periods(btf: Btf) -> dict[str, int]:
    """The values on a VM's grace periods. Raises BtfError where there are no numbers of them (without CONFIG_SMP)."""
    srcu, structure, pointer = btf.offset("kvm", "srcu"), "srcu_struct", {}
    with suppress(BtfError):
        srcu += btf.offset("srcu_struct", "srcu_sup")
        structure, pointer = "srcu_usage", {"srcu_pointer": 1}
    return {"kvm_srcu": srcu, **pointer} | {name: btf.offset(structure, name) for name in _SRCU}


def readings(parts: Iterable[bytes], record: Record) -> dict[int, Reading]:
    """What is read of each vCPU, by its address; of several descriptors, that of the process that made the VM.

    :param parts: what the iterator writes, which may end anywhere. Equal bitmaps of it are one object
    """
    found: dict[int, Reading] = {}
    filters: dict[object, MsrFilter] = {}
    bitmaps: dict[bytes, bytes] = {}
    content = Content(parts)
    while content:
        members = record.read(content.take(record.size), 0)
        bitmap = content.take(members["bitmap_bytes"])
        bitmap = bitmaps.setdefault(bitmap, bitmap)
        allowed = [content.take(size) for size in members["range_bytes"][: members["ranges"]]]
        one = Reading(members, bitmap, _filter(members, allowed, filters))
        if one.vcpu not in found or one.owned:
            found[one.vcpu] = one
    return found


def _filter(members: Mapping[str, Any], allowed: Sequence[bytes], known: dict[object, MsrFilter]) -> MsrFilter:
    """The filter of a record; equal ones are one object."""
    columns = (members[name] for name in ("range_flags", "range_base", "range_nmsrs"))
    key = (members["default_allow"], tuple(zip(*columns, allowed, strict=False)))
    if key not in known:
        ranges = tuple(FilterRange(flags, base, count, bits) for flags, base, count, bits in key[1])
        known[key] = MsrFilter(bool(key[0]), ranges)
    return known[key]
