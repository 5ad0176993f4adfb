# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for the kernel in which state.c runs: it writes what tests give, made of the members of its record."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.symbols import Symbols
from tracer.model.msr_filter import NO_FILTER, MsrFilter
from tracer.model.svm import SVM
from tracer.model.vendor import NO_MSR, Vendor
from tracer.model.vmx import VMX
from tracer.program import syscalls
from tracer.program.compiler import Built
from tracer.program.program import Target
from tracer.program.resources import resource
from tracer.program.structs import Member
from tracer.trace import state_reader
from tracer.trace.state_reader import StateReader

REQUEST = 1 << 37  # KVM_ARCH_REQ(29)
NESTED_LISTED = 13  # a descriptor
PART = 1000  # bytes
LISTS = {VMX.name: (0x48, 0x10, 0xC0000100, 0x3FE), SVM.name: (0xC0000081, 0x48, 0xC0000100, NO_MSR)}


def members_of(name: str) -> dict[str, Member]:
    """The members of a struct of numbers in state.c, as a C compiler lays them out."""
    source = resource("bpf/state.c").read_text()
    lengths = {name: int(length) for name, length in re.findall(r"^#define (\w+) (\d+)\b", source, re.MULTILINE)}
    [body] = re.findall(rf"^struct {name} {{(.*?)^}};", source, re.MULTILINE | re.DOTALL)
    found, end = dict[str, Member](), 0
    for bits, member, length in re.findall(r"^\tu(\d+) (\w+)(?:\[(\w+)\])?;", body, re.MULTILINE):
        size = int(bits) // 8
        end += -end % size
        found[member] = Member(end, size, lengths[length] if length else 1)
        end += found[member].bytes
    return found


RECORD, NESTED_RECORD = members_of("record"), members_of("nested_record")


def packed(members: Mapping[str, Member], values: Mapping[str, int | tuple[int, ...]]) -> bytes:
    """A struct in which these members have these values."""
    made = bytearray(max(member.offset + member.bytes for member in members.values()))
    for name, value in values.items():
        member, numbers = members[name], value if isinstance(value, tuple) else (value,)
        struct.pack_into(f"<{len(numbers)}{ {4: 'I', 8: 'Q'}[member.size] }", made, member.offset, *numbers)
    return bytes(made)


def record(
    vcpu: int = 0x1000, bits: bytes = bytes(4096), vmm_filter: MsrFilter = NO_FILTER, **given: int | tuple[int, ...]
) -> bytes:
    """What state.c writes for a descriptor of the vCPU at an address, whose bitmap is BITS; the rest is as usual."""
    ranges = vmm_filter.ranges
    values: dict[str, int | tuple[int, ...]] = {
        "vcpu": vcpu,
        "kvm": 0x9000,
        "owned": 1,
        "bitmap": 0x5000,
        "filter": 0x7000 if ranges or not vmm_filter.default_allow else 0,
        "exits": 7,
        "gp_seq": 40,
        "gp_seq_needed": 40,
        "tgid": 100,
        "bitmap_bytes": len(bits),
        "default_allow": int(vmm_filter.default_allow),
        "ranges": len(ranges),
        "range_flags": tuple(one.flags for one in ranges),
        "range_base": tuple(one.base for one in ranges),
        "range_nmsrs": tuple(one.count for one in ranges),
        "range_bytes": tuple(len(one.allowed) for one in ranges),
    }
    values |= {"filter_after": given.get("filter", values["filter"])} | given
    return packed(RECORD, values) + bits + b"".join(one.allowed for one in ranges)


def nested_record(vcpu: int = 0x1000, bits: bytes = bytes(4096), **given: int) -> bytes:
    """What state.c writes of the bitmap for nested guests of the vCPU at an address; by default one that was merged."""
    values = {"vcpu": vcpu, "nested": 0x6000, "in_use": 0xB000 | 1 << 28, "own": 0xA000, "bitmap_bytes": len(bits)}
    values |= {"nested_after": given.get("nested", values["nested"])} | given
    return packed(NESTED_RECORD, values) + bits


def _result(scripts: list[bytes | OSError], run: int) -> bytes:
    """What a run, counted from 1, gives."""
    script = scripts[min(run, len(scripts)) - 1]
    if isinstance(script, OSError):
        raise script
    return script


class _Btf:
    """Of a kernel, or of its module: it has every member but those that are missing."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        self.missing = missing

    def offset(self, structure: str, member: str) -> int:
        if member in self.missing or structure in self.missing:
            raise BtfError(f"there is no {member} in struct {structure}")
        return 8

    def nested_offset(self, path: tuple[tuple[str, str], ...]) -> int:
        return sum(self.offset(structure, member) for structure, member in path)

    def function_id(self, name: str) -> int:
        if name in self.missing:
            raise BtfError(f"there is no function {name}")
        return 1


@dataclass
class Kernel:
    """A kernel. `scripts` are what its iterator writes, one run after the other; the last is repeated.

    `nested`: the same of the iterator over bitmaps for nested guests.
    `missing`: members, structures and functions that its BTF lacks; `memory` is what its list of MSRs is.
    """

    vendor: Vendor = VMX
    scripts: list[bytes | OSError] = field(default_factory=lambda: [b""])
    nested: list[bytes | OSError] = field(default_factory=lambda: [b""])
    missing: tuple[str, ...] = ()
    module_btf: bool = True
    symbols: tuple[str, ...] = ("kvm_vcpu_release", VMX.shadow.list_, SVM.shadow.list_)
    memory: bytes | None = None
    init_pids: bool = True
    reads: int = 0
    nested_reads: int = 0
    closed: int = 0
    slept: float = 0
    values: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)

    # What stands for the iterator and for what was loaded:

    members = property(lambda self: {"records": RECORD, "nested_records": NESTED_RECORD})
    functions = property(lambda self: {"file_listed": 11, "copy_memory": 12, "nested_listed": NESTED_LISTED})
    arrays = property(lambda self: {"copies": self})

    def read(self) -> bytes:
        """A run of the iterator."""
        self.reads += 1
        return _result(self.scripts, self.reads)

    def read_nested(self) -> bytes:
        """A run of the iterator over bitmaps for nested guests."""
        self.nested_reads += 1
        return _result(self.nested, self.nested_reads)

    def iterator(self, function: int) -> SimpleNamespace:
        """One of them."""
        read = self.read_nested if function == NESTED_LISTED else self.read

        def parts() -> Iterator[bytes]:
            """As the kernel gives it: in parts that end anywhere."""
            content = read()
            yield from (content[at : at + PART] for at in range(0, len(content), PART))

        return SimpleNamespace(parts=parts, close=self.close)

    def close(self) -> None:
        """An iterator, and what was loaded."""
        self.closed += 1

    def raw(self, _: int, size: int) -> bytes:
        """Of the array of copies."""
        return (self.memory or b"")[:size]

    def run_program(self, _: int, address: int, size: int) -> int:
        """Whether copying fails."""
        assert (address, size) == (0xA000, 64 * self.vendor.shadow.stride)
        return int(self.memory is None)

    def build(self, _: object, variants: list[Any], __: object) -> Built:
        """Load."""
        [variant] = variants
        self.values, self.targets = variant.values, variant.functions
        return Built("iterator", self)  # type: ignore[arg-type] # stands for Loaded

    def reader(self, patch: pytest.MonkeyPatch, **options: bool) -> StateReader:
        """A reader in this kernel."""
        if self.memory is None and "list" not in self.missing:
            stride = self.vendor.shadow.stride
            self.memory = b"".join(msr.to_bytes(4, "little").ljust(stride, b"\1") for msr in LISTS[self.vendor.name])
        places = {name: range(0xA000, 0xA000) for name in self.symbols}

        def of_module(module: str, base: object) -> _Btf:
            if not self.module_btf:
                raise BtfError(f"/sys/kernel/btf/{module}: No such file or directory")
            return _Btf(self.missing)

        def sleep(seconds: float) -> None:
            self.slept += seconds

        patch.setattr(Btf, "of_kernel", lambda: _Btf((*self.missing, *self._only_in_module)))
        patch.setattr(Btf, "of_module", of_module)
        patch.setattr(state_reader, "build", self.build)
        patch.setattr(syscalls, "Iterator", self.iterator)
        patch.setattr(syscalls, "run_program", self.run_program)
        patch.setattr(state_reader, "is_in_init_pid_namespace", lambda: self.init_pids)
        patch.setattr(time, "sleep", sleep)
        symbols = replace(Symbols.of([], self.vendor.module, vendor=self.vendor), objects=places)
        return StateReader(symbols, lambda: "the kernel refused: a reason", **options)

    @property
    def _only_in_module(self) -> tuple[str, ...]:
        nested = self.vendor.nested
        paths = (*self.vendor.bitmap, self.vendor.shadow.member, *nested.made, *nested.in_use)
        return tuple(structure for structure, _ in paths)
