# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM of a few lines, on the plain KVM API: VMs under any MSR filter, vCPUs of any CPUID, in any order of ioctls.

The workload (tests/kvmhost/workload.c) counts and measures; this is for states that it does not reach. The guest is as
the workload's: `out %al,$0x10; jmp`, so that each KVM_RUN ends at the out, after the requests that were pending.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass, field

CODE = b"\xe6\x10\xeb\xfc"
TSS_ADDRESS = 0x7FFBD000  # guest-physical, of three pages: what VMX may need for real mode
GUEST_PAGE = 0x1000  # guest-physical address and size of the only page
EXIT_IO = 2

# linux/kvm.h
CREATE_VM, GET_VCPU_MMAP_SIZE, GET_SUPPORTED_CPUID = 0xAE01, 0xAE04, 0xC008AE05
CREATE_VCPU, SET_USER_MEMORY_REGION, SET_TSS_ADDR, SET_MSR_FILTER = 0xAE41, 0x4020AE46, 0xAE47, 0x4188AEC6
RUN, SET_REGS, GET_SREGS, SET_SREGS = 0xAE80, 0x4090AE82, 0x8138AE83, 0x4138AE84
SET_MSRS, SET_CPUID2 = 0x4008AE89, 0x4008AE90
READ, WRITE = 1, 2  # KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE
DEFAULT_DENY = 1
MAX_RANGES = 16

# struct kvm_sregs: where the code segment's base and selector and EFER are.
SREGS_BYTES, CS_BASE, CS_SELECTOR, EFER = 312, 0, 12, 264
EFER_SVME = 1 << 12
# struct kvm_cpuid2: the number of entries, and entries of function, index, flags, eax, ebx, ecx, edx and padding.
CPUID_ENTRIES = 256
CPUID_ENTRY = struct.Struct("7I12x")
INTEL = tuple(struct.unpack("<I", word)[0] for word in (b"Genu", b"ntel", b"ineI"))  # ebx, ecx, edx of leaf 0


@dataclass(frozen=True)
class Range:
    """So many MSRs from `base` on, a bit for each: whether the filter allows the accesses of `flags` to it."""

    base: int
    nmsrs: int
    bitmap: bytes  # of whole longs, as the kernel copies it
    flags: int = READ | WRITE

    @classmethod
    def of(cls, base: int, allowed: list[bool], flags: int = READ | WRITE) -> Range:
        bits = sum(allow << n for n, allow in enumerate(allowed))
        return cls(base, len(allowed), bits.to_bytes(-(-len(allowed) // 64) * 8, "little"), flags)


@dataclass(frozen=True)
class Filter:
    """A filter of KVM_X86_SET_MSR_FILTER: the first range that has the MSR and the access decides, else the default."""

    ranges: list[Range] = field(default_factory=list)
    default_allow: bool = True


class Vcpu:
    """A vCPU that `run` lets reach the guest's next `out`."""

    def __init__(self, vm: int, index: int, run_bytes: int) -> None:
        self.fd = fcntl.ioctl(vm, CREATE_VCPU, index)
        self._run = mmap.mmap(self.fd, run_bytes)
        sregs = self._sregs()
        struct.pack_into("Q", sregs, CS_BASE, 0)
        struct.pack_into("H", sregs, CS_SELECTOR, 0)
        fcntl.ioctl(self.fd, SET_SREGS, sregs)
        # rip and rflags are the last two of struct kvm_regs' 18 words.
        fcntl.ioctl(self.fd, SET_REGS, struct.pack("18Q", *[0] * 16, GUEST_PAGE, 2))

    def _sregs(self) -> bytearray:
        sregs = bytearray(SREGS_BYTES)
        fcntl.ioctl(self.fd, GET_SREGS, sregs)
        return sregs

    def run(self) -> None:
        """One KVM_RUN. Raises unless it ended at the out."""
        fcntl.ioctl(self.fd, RUN, 0)
        [reason] = struct.unpack_from("I", self._run, 8)  # struct kvm_run: exit_reason
        if reason != EXIT_IO:
            raise RuntimeError(f"KVM_RUN: exit reason {reason}, not {EXIT_IO} (IO)")

    def set_cpuid(self, entries: list[tuple[int, ...]]) -> None:
        table = struct.pack("II", len(entries), 0) + b"".join(CPUID_ENTRY.pack(*entry) for entry in entries)
        fcntl.ioctl(self.fd, SET_CPUID2, bytearray(table))

    def set_msr(self, msr: int, value: int) -> bool:
        """Write MSR as the host's user space; whether KVM took it."""
        taken: int = fcntl.ioctl(self.fd, SET_MSRS, bytearray(struct.pack("IIIIQ", 1, 0, msr, 0, value)))
        return taken == 1

    def set_svme(self, on: bool) -> None:
        """Set or clear EFER.SVME, with which the guest may run guests of its own."""
        sregs = self._sregs()
        [efer] = struct.unpack_from("Q", sregs, EFER)
        struct.pack_into("Q", sregs, EFER, efer | EFER_SVME if on else efer & ~EFER_SVME)
        fcntl.ioctl(self.fd, SET_SREGS, sregs)

    def close(self) -> None:
        self._run.close()
        os.close(self.fd)


class Vm:
    """A VM of so many vCPUs; the context manager destroys it."""

    def __init__(self, vcpus: int) -> None:
        self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = fcntl.ioctl(self._kvm, CREATE_VM, 0)
        fcntl.ioctl(self.fd, SET_TSS_ADDR, TSS_ADDRESS)
        self._page = mmap.mmap(-1, GUEST_PAGE)
        self._page[: len(CODE)] = CODE
        # slot, flags, guest address, size, address here
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        fcntl.ioctl(self.fd, SET_USER_MEMORY_REGION, struct.pack("IIQQQ", 0, 0, GUEST_PAGE, GUEST_PAGE, address))
        run_bytes = fcntl.ioctl(self._kvm, GET_VCPU_MMAP_SIZE, 0)
        self.vcpus = [Vcpu(self.fd, index, run_bytes) for index in range(vcpus)]

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        os.close(self.fd)
        os.close(self._kvm)

    def supported_cpuid(self) -> list[tuple[int, ...]]:
        """What KVM_GET_SUPPORTED_CPUID gives, an entry each: function, index, flags, eax, ebx, ecx, edx."""
        table = bytearray(8 + CPUID_ENTRIES * CPUID_ENTRY.size)
        struct.pack_into("I", table, 0, CPUID_ENTRIES)
        fcntl.ioctl(self._kvm, GET_SUPPORTED_CPUID, table)
        [number] = struct.unpack_from("I", table)
        return [CPUID_ENTRY.unpack_from(table, 8 + n * CPUID_ENTRY.size) for n in range(number)]

    def set_filter(self, wanted: Filter) -> None:
        """KVM_X86_SET_MSR_FILTER; each vCPU applies it in its next KVM_RUN."""
        packed = struct.pack("II", 0 if wanted.default_allow else DEFAULT_DENY, 0)
        bitmaps = [ctypes.create_string_buffer(one.bitmap) for one in wanted.ranges]
        for one, bitmap in zip(wanted.ranges, bitmaps, strict=True):
            packed += struct.pack("III4xQ", one.flags, one.nmsrs, one.base, ctypes.addressof(bitmap))
        packed += bytes(24 * (MAX_RANGES - len(wanted.ranges)))
        fcntl.ioctl(self.fd, SET_MSR_FILTER, packed)

    def apply(self, wanted: Filter) -> None:
        """A filter update: set the filter, and run each vCPU once."""
        self.set_filter(wanted)
        for vcpu in self.vcpus:
            vcpu.run()


def with_vendor(entries: list[tuple[int, ...]], ebx: int, ecx: int, edx: int) -> list[tuple[int, ...]]:
    """The CPUID entries with another vendor in leaf 0."""
    return [(*entry[:4], ebx, ecx, edx) if entry[0] == 0 else entry for entry in entries]
