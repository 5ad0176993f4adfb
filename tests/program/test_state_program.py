# SPDX-License-Identifier: GPL-2.0-or-later
"""bpf/state.c in this machine's kernel, on descriptors that stand for those of vCPUs.

They are of an array: its struct bpf_array is what its file has as private_data, as a vCPU is of its file, and the value
inside is whatever a test puts there. With the address of bpf_map_release() in the place of kvm_vcpu_release()'s, all
maps of all processes are "vCPUs", so most records are of memory that is nothing of the kind.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator as Iterable
from collections.abc import Mapping
from typing import Any

import pytest
from filters import BOTH, allowing
from needs import ROOT_ALONE
from state_kernel import NESTED_RECORD, RECORD, Kernel

from tracer.kernel.btf import Btf
from tracer.kernel.kallsyms import places_of, scan
from tracer.model.msr_filter import READ, WRITE, MsrFilter
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vendors import VENDORS
from tracer.model.vmx import VMX
from tracer.program import syscalls
from tracer.program.compiler import build, compiled
from tracer.program.program import Target, Variant
from tracer.program.resources import resource
from tracer.program.structs import Record
from tracer.program.syscalls import BpfMap, run_program

SOURCE = resource("bpf/state.c")
ARRAY, VALUE_SIZE = 2, 0x9000  # BPF_MAP_TYPE_ARRAY; bytes
#: Where in the value of the array is what.
KVM_MM, KVM_FILTER, VM_TYPE, SRCU, VCPU_KVM, VCPU_ID, REQUESTS, EXITS, BITMAP, SHADOW = range(0x10, 0x60, 8)
GRACE, FILTER, BITS, RANGES = 0x80, 0x200, 0x1000, 0x3000
#: Of the bitmap for nested guests. SVM has what is in use inside other structures.
NESTED_MADE, NESTED_BITMAP, CHANGED, IN_USE, OWN, GUEST_MODE = range(0xA0, 0xD0, 8)
INSIDE, NESTED_BITS = 0x48, 0x7000
NOWHERE = 0x10  # no address of the kernel
FILTER_FAILED, BITMAP_FAILED = 2, 1
MAGIC = b"the value of an array"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE),
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
    pytest.mark.timeout(900),  # the first may download a kernel
]


class Vcpu:
    """An array whose value is a vCPU, its VM and its filter; `read` is what the program writes of it."""

    def __init__(self, vendor: Vendor, **values: int) -> None:
        kernel = Btf.of_kernel()
        fd = syscalls.create_map("vcpu", ARRAY, key_size=4, value_size=VALUE_SIZE, max_entries=1, flags=0)
        self.array, self.memory = BpfMap(fd, 4, VALUE_SIZE), bytearray(VALUE_SIZE)
        self.bitmap_bytes = vendor.bitmap_geometry.size
        with open("/proc/kallsyms", "rb") as kallsyms:
            found = places_of(*scan(kallsyms, [b" bpf_map_release"]), ("bpf_map_release",), ())
        release = found["bpf_map_release"].start
        given = {
            "vcpu_release": release,
            "file_f_op": kernel.offset("file", "f_op"),
            "file_operations_release": kernel.offset("file_operations", "release"),
            "file_private_data": kernel.offset("file", "private_data"),
            "task_tgid": kernel.offset("task_struct", "tgid"),
            # The process' ids stand for its memory: of a thread that is its first, they are the same.
            "task_mm": kernel.offset("task_struct", "pid"),
        }
        # Where the value is in the struct is found by what it holds.
        self._load(given | {"kvm_mm": KVM_MM})
        self.put(0, MAGIC)
        self.address = self.read_raw()["vcpu"]
        inside = self.copy(self.address, 1024).index(MAGIC)
        self.value = self.address + inside
        self.close_program()
        offsets = {"vcpu_kvm": VCPU_KVM, "vcpu_vcpu_id": VCPU_ID, "vcpu_requests": REQUESTS, "vcpu_exits": EXITS}
        offsets |= {"vcpu_bitmap": BITMAP, "vcpu_shadow": SHADOW}
        given |= {name: inside + offset for name, offset in offsets.items()}
        given |= {"kvm_mm": KVM_MM, "kvm_filter": KVM_FILTER, "kvm_vm_type": VM_TYPE, "bitmap_bytes": self.bitmap_bytes}
        places = {"nested_made": NESTED_MADE, "nested_bitmap": NESTED_BITMAP, "nested_changed": CHANGED}
        places |= {"nested_in_use": IN_USE, "vcpu_guest_mode": GUEST_MODE}
        if vendor.nested.inside:
            places |= {"nested_own": OWN}
            given["nested_inside"] = INSIDE
        given |= {name: inside + offset for name, offset in places.items()}
        given |= {"kvm_srcu": SRCU, "srcu_pointer": 1, "srcu_gp_seq": 8, "srcu_gp_seq_needed": 16}
        self._load({name: value for name, value in (given | values).items() if value >= 0})
        self.word(VCPU_KVM, self.value)
        self.word(KVM_MM, os.getpid() << 32 | os.getpid())
        self.word(SRCU, self.value + GRACE)
        self.word(BITMAP, self.value + BITS)

    def _load(self, given: Mapping[str, int]) -> None:
        iterator = Target("iterator", Btf.of_kernel().function_id("bpf_iter_task_file"))
        targets = {"file_listed": iterator, "nested_listed": iterator, "copy_memory": Target("raw_tracepoint")}
        self.loaded = build(SOURCE, [Variant("iterator", {}, targets, given)]).loaded
        self.iterator = syscalls.Iterator(self.loaded.functions["file_listed"])
        self.nested_iterator = syscalls.Iterator(self.loaded.functions["nested_listed"])
        self.record = Record(self.loaded.members["records"])
        self.nested_record = Record(self.loaded.members["nested_records"])

    def close_program(self) -> None:
        self.iterator.close()
        self.nested_iterator.close()
        self.loaded.close()

    def close(self) -> None:
        self.close_program()
        os.close(self.array.fd)

    def put(self, at: int, content: bytes) -> None:
        self.memory[at : at + len(content)] = content
        self.array.update(bytes(4), bytes(self.memory))

    def word(self, at: int, value: int) -> None:
        self.put(at, value.to_bytes(8, "little"))

    def filter(self, one: MsrFilter, *, count: int | None = None, places: Mapping[int, int] = {}) -> None:
        """Install a filter; COUNT instead of the number of its ranges, and PLACES instead of where their bits are."""
        made = struct.pack("<BB6x", len(one.ranges) if count is None else count, 0xFE | one.default_allow)
        for number, part in enumerate(one.ranges):
            at = RANGES + number * 1536
            self.put(at, part.allowed)
            made += struct.pack("<IIIxxxxQ", part.flags, part.count, part.base, places.get(number, self.value + at))
        self.put(FILTER, made)
        self.word(KVM_FILTER, self.value + FILTER)

    def copy(self, address: int, size: int) -> bytes:
        assert run_program(self.loaded.functions["copy_memory"], address, size) == 0
        return self.loaded.arrays["copies"].raw(0, size)

    def all(self) -> Iterable[tuple[Mapping[str, Any], bytes, list[bytes]]]:
        """Every record that the program writes: its members, the bitmap and the bits of ranges."""
        content, at = self.iterator.read(), 0
        while at < len(content):
            members = self.record.read(content, at)
            at += self.record.size
            parts = []
            for size in (members["bitmap_bytes"], *members["range_bytes"][: members["ranges"]]):
                parts.append(content[at : at + size])
                at += size
            yield members, parts[0], parts[1:]
        assert at == len(content)

    def read(self, pid: int = 0) -> tuple[dict[str, int], bytes, list[bytes]]:
        """The record of a process' descriptor, its arrays left out; the bitmap; the bits of ranges."""
        pid = pid or os.getpid()
        [found] = [one for one in self.all() if (one[0]["tgid"], one[0]["fd"]) == (pid, self.array.fd)]
        members, bitmap, ranges = found
        self.columns = {name: numbers for name, numbers in members.items() if isinstance(numbers, tuple)}
        return {name: value for name, value in members.items() if isinstance(value, int)}, bitmap, ranges

    def nested(self) -> list[tuple[Mapping[str, Any], bytes]]:
        """The record on this vCPU's bitmap for nested guests, and the bitmap, of each descriptor of this process."""
        content, at, found = self.nested_iterator.read(), 0, []
        while at < len(content):
            members = self.nested_record.read(content, at)
            at += self.nested_record.size
            bitmap, at = content[at : at + members["bitmap_bytes"]], at + members["bitmap_bytes"]
            if members["vcpu"] == self.address:
                found.append((members, bitmap))
        assert at == len(content)
        return found

    def read_raw(self) -> Mapping[str, Any]:
        [found] = [m for m, _, _ in self.all() if (m["tgid"], m["fd"]) == (os.getpid(), self.array.fd)]
        return found


@pytest.fixture(params=VENDORS, ids=lambda vendor: str(vendor.name))
def vcpu(request: pytest.FixtureRequest, headers: None) -> Iterable[Vcpu]:
    made = Vcpu(request.param)
    yield made
    made.close()


def test_a_vcpu(vcpu: Vcpu) -> None:
    """Every member from its own place; what is beside the bitmap is not in the copy."""
    vcpu.put(BITS - 8, b"\xee" * (vcpu.bitmap_bytes + 16))
    bits = os.urandom(vcpu.bitmap_bytes)
    vcpu.put(BITS, bits)
    for at, value in ((VCPU_ID, 5), (REQUESTS, 1 << 37), (EXITS, 77), (SHADOW, 0xABC), (SHADOW + 8, 0xDEF)):
        vcpu.word(at, value)
    vcpu.word(VM_TYPE, 0xFF03)  # a byte
    vcpu.word(GRACE + 8, 41)
    vcpu.word(GRACE + 16, 44)
    one, bitmap, ranges = vcpu.read()
    assert bitmap == bits
    assert ranges == []
    assert one == {
        "vcpu": vcpu.address,
        "kvm": vcpu.value,
        "owned": 1,
        "bitmap": vcpu.value + BITS,
        "filter": 0,
        "filter_after": 0,
        "requests": 1 << 37,
        "exits": 77,
        "gp_seq": 41,
        "gp_seq_needed": 44,
        "shadow_read": 0xABC,
        "shadow_write": 0xDEF,
        "nested": 0,
        "tgid": os.getpid(),
        "fd": vcpu.array.fd,
        "vcpu_id": 5,
        "failed": 0,
        "vm_type": 3,
        "bitmap_bytes": vcpu.bitmap_bytes,
        "default_allow": 1,
        "ranges": 0,
    }


LARGEST = MsrFilter(False, tuple(allowing(0x1000 * n, 12288, [0x1000 * n + n]) for n in range(16)))
MIXED = MsrFilter(True, (allowing(0x10, 1, flags=READ), allowing(0x174, 65, [0x175], WRITE), allowing(0xC0000080, 64)))


@pytest.mark.parametrize(
    "vmm_filter", [MsrFilter(), MsrFilter(False), MIXED, LARGEST], ids=["empty", "deny", "mixed", "largest"]
)
def test_a_filter(vcpu: Vcpu, vmm_filter: MsrFilter) -> None:
    vcpu.filter(vmm_filter)
    one, bitmap, ranges = vcpu.read()
    assert (one["failed"], one["ranges"], one["default_allow"]) == (0, len(vmm_filter.ranges), vmm_filter.default_allow)
    assert one["filter"] == one["filter_after"] == vcpu.value + FILTER
    assert ranges == [part.allowed for part in vmm_filter.ranges]
    number = len(vmm_filter.ranges)
    assert vcpu.columns["range_flags"][:number] == tuple(part.flags for part in vmm_filter.ranges)
    assert vcpu.columns["range_base"][:number] == tuple(part.base for part in vmm_filter.ranges)
    assert vcpu.columns["range_nmsrs"][:number] == tuple(part.count for part in vmm_filter.ranges)
    assert len(bitmap) == vcpu.bitmap_bytes


def test_the_kernel_has_room_for_the_largest_record() -> None:
    """bpf_seq_read() gives eight pages to what is written of one file."""
    record, nested = (Record(members).size for members in (RECORD, NESTED_RECORD))
    assert record + SVM.bitmap_geometry.size + 16 * 1536 < 8 * 4096
    # The two bitmaps together would not do: bpf_seq_write() would fail, and the vCPU be left out.
    assert record + 2 * SVM.bitmap_geometry.size + 16 * 1536 > 8 * 4096
    assert nested + SVM.bitmap_geometry.size < 8 * 4096


def test_what_the_last_record_had_is_not_in_the_next(vcpu: Vcpu) -> None:
    vcpu.filter(LARGEST, places={3: NOWHERE})
    assert vcpu.read()[0]["failed"] == FILTER_FAILED
    vcpu.filter(MIXED)
    one, _, ranges = vcpu.read()
    assert (one["failed"], ranges) == (0, [part.allowed for part in MIXED.ranges])


def test_what_cannot_be_read(vcpu: Vcpu) -> None:
    """Each alone; the rest is there."""
    vcpu.filter(MIXED, places={1: NOWHERE})
    one, bitmap, ranges = vcpu.read()
    assert (one["failed"], len(bitmap), ranges) == (
        FILTER_FAILED,
        vcpu.bitmap_bytes,
        [MIXED.ranges[0].allowed, b"", MIXED.ranges[2].allowed],
    )
    vcpu.word(KVM_FILTER, NOWHERE)
    one, bitmap, ranges = vcpu.read()
    assert (one["failed"], len(bitmap), ranges, one["filter"]) == (FILTER_FAILED, vcpu.bitmap_bytes, [], NOWHERE)
    vcpu.filter(MIXED)
    vcpu.word(BITMAP, NOWHERE)
    one, bitmap, ranges = vcpu.read()
    assert (one["failed"], bitmap, len(ranges)) == (BITMAP_FAILED, b"", 3)


def test_what_is_no_filter(vcpu: Vcpu) -> None:
    """Memory that was freed may hold anything."""
    vcpu.filter(MsrFilter(True, (allowing(0x10, 1),)), count=200)
    one, _, ranges = vcpu.read()
    assert one["ranges"] == 200
    assert len(ranges) == 16
    vcpu.put(FILTER, struct.pack("<BB6xIII", 1, 1, BOTH, 0xFFFFFFFF, 0))
    assert vcpu.read()[0]["failed"] == FILTER_FAILED


def test_a_vcpu_without_a_bitmap(vcpu: Vcpu) -> None:
    vcpu.word(BITMAP, 0)
    one, bitmap, _ = vcpu.read()
    assert (one["failed"], bitmap) == (0, b"")


def test_a_bitmap_for_nested_guests(vcpu: Vcpu) -> None:
    """Every member from its own place; what is in use is in another structure, or a word of which a part counts."""
    svm = vcpu.bitmap_bytes == SVM.bitmap_geometry.size
    assert vcpu.nested() == []
    bits = os.urandom(vcpu.bitmap_bytes)
    vcpu.put(NESTED_BITS - 8, b"\xee" * (vcpu.bitmap_bytes + 16))
    vcpu.put(NESTED_BITS, bits)
    for at, value in ((NESTED_MADE, 0xAB), (NESTED_BITMAP, vcpu.value + NESTED_BITS), (GUEST_MODE, 1)):
        vcpu.word(at, value)
    vcpu.word(CHANGED, 0xFF01)  # a byte
    vcpu.word(IN_USE, vcpu.value + FILTER if svm else 0xB5186DFA)
    vcpu.word(OWN, vcpu.value + FILTER + 8)
    vcpu.word(FILTER + INSIDE, 0x1234000)
    vcpu.word(FILTER + 8 + INSIDE, 0x5678000)
    assert vcpu.read()[0]["nested"] == 0xAB
    [(one, bitmap)] = vcpu.nested()
    assert bitmap == bits
    assert one == {
        "vcpu": vcpu.address,
        "nested": 0xAB,
        "nested_after": 0xAB,
        "in_use": 0x1234000 if svm else 0xB5186DFA,
        "own": 0x5678000 if svm else 0,
        "guest_mode": 1,
        "changed": 1,
        "failed": 0,
        "bitmap_bytes": vcpu.bitmap_bytes,
        "unused": 0,
    }


def test_a_bitmap_for_nested_guests_beside_the_largest_filter(vcpu: Vcpu) -> None:
    """Both iterators write all that they have to."""
    vcpu.filter(LARGEST)
    vcpu.word(NESTED_MADE, 1)
    vcpu.word(NESTED_BITMAP, vcpu.value + BITS)
    _, bitmap, ranges = vcpu.read()
    assert (len(bitmap), len(ranges)) == (vcpu.bitmap_bytes, 16)
    [(_, nested)] = vcpu.nested()
    assert nested == bitmap


def test_a_bitmap_for_nested_guests_that_is_not_there(vcpu: Vcpu) -> None:
    """What the last record had is not in the next."""
    vcpu.word(NESTED_MADE, 1)
    vcpu.word(CHANGED, 1)
    vcpu.word(NESTED_BITMAP, NOWHERE)
    [(one, bitmap)] = vcpu.nested()
    assert (one["failed"], one["changed"], bitmap) == (BITMAP_FAILED, 1, b"")
    vcpu.word(NESTED_BITMAP, 0)  # a CPU without bitmaps
    vcpu.word(CHANGED, 0)
    [(one, bitmap)] = vcpu.nested()
    assert (one["failed"], one["changed"], bitmap) == (0, 0, b"")


def test_a_kind_of_vm_without_bitmaps(headers: None) -> None:
    vcpu = Vcpu(VMX, no_bitmap=5)
    try:
        assert len(vcpu.read()[1]) == 4096
        vcpu.word(VM_TYPE, 5)
        vcpu.word(NESTED_MADE, 1)
        one, bitmap, _ = vcpu.read()
        assert (one["bitmap"], one["vm_type"], one["nested"], bitmap) == (0, 5, 0, b"")
        assert vcpu.nested() == []
    finally:
        vcpu.close()


def test_what_is_not_known_of_a_kernel_is_not_read(headers: None) -> None:
    """As on 5.10; -1 takes a value away."""
    unknown = ("vcpu_bitmap", "vcpu_shadow", "vcpu_exits", "kvm_vm_type", "kvm_srcu", "srcu_pointer", "bitmap_bytes")
    vcpu = Vcpu(VMX, **dict.fromkeys(unknown, -1))
    try:
        vcpu.filter(MIXED)
        for at in (EXITS, SHADOW, VM_TYPE, GRACE + 8):
            vcpu.word(at, 0xFFFF)
        one, bitmap, ranges = vcpu.read()
        assert (bitmap, len(ranges)) == (b"", 3)
        absent = ("bitmap", "shadow_read", "shadow_write", "exits", "vm_type", "gp_seq", "gp_seq_needed", "failed")
        assert {name: one[name] for name in absent} == dict.fromkeys(absent, 0)
    finally:
        vcpu.close()


def test_before_6_4_the_numbers_of_grace_periods_are_in_the_vm(headers: None) -> None:
    vcpu = Vcpu(VMX, srcu_pointer=-1)
    try:
        vcpu.word(SRCU + 8, 0)  # VCPU_KVM's place: the numbers begin there
        vcpu.word(VCPU_KVM, vcpu.value)
        one, _, _ = vcpu.read()
        assert (one["gp_seq"], one["gp_seq_needed"]) == (vcpu.value, 0)
    finally:
        vcpu.close()


def test_the_descriptor_of_another_process(vcpu: Vcpu) -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(vcpu.array.fd,)) as other:
        one, _, _ = vcpu.read(other.pid)
        own, _, _ = vcpu.read()
        other.communicate(b"\n")
    assert (one["tgid"], one["owned"], one["vcpu"]) == (other.pid, 0, own["vcpu"])
    assert own["owned"] == 1


def test_copying_memory(vcpu: Vcpu) -> None:
    vcpu.put(0x300, bytes(range(200)))
    assert vcpu.copy(vcpu.value + 0x300, 200) == bytes(range(200))
    run = vcpu.loaded.functions["copy_memory"]
    assert run_program(run, NOWHERE, 8) == 1
    assert run_program(run, vcpu.value, 6145) == 1


def test_the_members_of_the_record(headers: None) -> None:
    """As other tests have them, without a compiler; and all that a reader gives is a value of the program."""
    program = compiled(SOURCE, {})
    for name, members in (("records", RECORD), ("nested_records", NESTED_RECORD)):
        [records] = [one for one in program.maps if one.name == name]
        assert dict(records.members) == members
        assert records.value_size == Record(members).size
    given = set[str]()
    for kernel in (Kernel(), Kernel(SVM)):
        with pytest.MonkeyPatch.context() as patch:
            kernel.reader(patch)
        given |= {*kernel.values}
    assert given == {*program.values}
