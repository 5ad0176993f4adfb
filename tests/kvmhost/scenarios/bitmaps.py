# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in an AMD host: the MSR bitmap of each vCPU under many filters, in each variant of kvm_amd that is named.

A vCPU's bitmap is read from the kernel's memory (/proc/kcore), so that neither msrtrace nor KVM has a say in it. What
was asked of each variant is the same, step by step; tests/kvmhost/test_same_bitmap.py compares what they did.

Leaves /out/bitmaps.json, a list of steps by variant, and /out/VARIANT.raw, the bitmaps: of each step, of each vCPU.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import vmm
from guest import OUT, load
from kerneltracer import TRACING, define
from vmm import READ, WRITE, Filter, Range, Vm

from tracer.kernel.btf import Btf

#: vcpu_svm.msrpm: three ranges of 0x2000 MSRs, of two bits each.
BITMAP_BYTES = 3 * 0x800
BASES = (0, 0xC0000000, 0xC0010000)
SPEC_CTRL, PRED_CMD, DEBUGCTL = 0x48, 0x49, 0x1D9
RANDOM_FILTERS = 100
ACCESSES = {"read": READ, "write": WRITE, "both": READ | WRITE}
GROUP = "bitmaps"
UPDATE, CALL = "svm_msr_filter_changed", "set_msr_interception_bitmap"


class Kcore:
    """The kernel's memory, by virtual address."""

    def __init__(self) -> None:
        self._file = os.open("/proc/kcore", os.O_RDONLY)
        head = os.pread(self._file, 64, 0)
        [at] = struct.unpack_from("<Q", head, 32)  # Elf64_Ehdr: e_phoff, and e_phentsize, e_phnum
        size, number = struct.unpack_from("<HH", head, 54)
        headers = [struct.unpack("<IIQQQQQQ", os.pread(self._file, size, at + n * size)) for n in range(number)]
        # PT_LOAD: where in the file, the address, how much.
        self._parts = [(offset, start, length) for kind, _, offset, start, _, length, *_ in headers if kind == 1]

    def read(self, address: int, length: int) -> bytes:
        for offset, start, size in self._parts:
            if start <= address and address + length <= start + size:
                return os.pread(self._file, length, offset + address - start)
        raise RuntimeError(f"/proc/kcore has no {address:#x}")


def candidates(kcore: Kcore) -> list[int]:
    """The MSRs that KVM may pass through: `direct_access_msrs` of kvm_amd, each {u32 index; bool always}."""
    [line] = re.findall(r"^(\w+) \w direct_access_msrs\t\[kvm_amd\]$", Path("/proc/kallsyms").read_text(), re.M)
    found: list[int] = []
    for n in range(256):
        [msr] = struct.unpack_from("<I", kcore.read(int(line, 16) + 8 * n, 4))
        if msr == 0xFFFFFFFF:
            return found
        found.append(msr)
    raise RuntimeError("direct_access_msrs has no end")


class Events:
    """The kernel's own events at each filter update, which tell where a vCPU's bitmap is, and at each call."""

    def __enter__(self) -> Events:
        offset = Btf.of_module("kvm_amd").nested_offset((("vcpu_svm", "msrpm"),))
        define([f"p:{GROUP}/update {UPDATE} msrpm=+{offset}(%di):x64", f"p:{GROUP}/call {CALL}"])
        self._enable(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._enable(False)
        (TRACING / "kprobe_events").write_text("")

    def _enable(self, on: bool) -> None:
        (TRACING / f"events/{GROUP}/enable").write_text(str(int(on)))

    def clear(self) -> None:
        (TRACING / "trace").write_text("")

    def addresses(self) -> list[int]:
        """Of the bitmaps that were updated since `clear`, in order."""
        return [int(word, 16) for word in re.findall(r"msrpm=0x(\w+)", (TRACING / "trace").read_text())]

    def hits(self) -> dict[str, int]:
        """How often each event happened."""
        lines = (TRACING / "kprobe_profile").read_text().splitlines()
        return {name: int(hits) for name, hits, _ in map(str.split, lines)}


def described(wanted: Filter) -> dict[str, Any]:
    """A filter, for JSON: bitmaps in hexadecimal."""
    ranges = [{**vars(one), "bitmap": one.bitmap.hex()} for one in wanted.ranges]
    return {"default_allow": wanted.default_allow, "ranges": ranges}


class Recorder:
    """Lets a VM take step after step, and records each vCPU's bitmap after each of them."""

    def __init__(self, vm: Vm, kcore: Kcore, events: Events, raw: Path) -> None:
        self.vm, self._kcore, self._events = vm, kcore, events
        self._raw = raw.open("wb")
        self.steps: list[dict[str, Any]] = []
        events.clear()
        before = events.hits()
        vm.apply(Filter())
        self._addresses = events.addresses()
        if len(self._addresses) != len(vm.vcpus):
            raise RuntimeError(f"{len(vm.vcpus)} vCPUs applied {len(self._addresses)} updates")
        self._record("start", before, Filter())

    def _record(self, name: str, before: dict[str, int], wanted: Filter | None = None) -> None:
        after = self._events.hits()
        for address in self._addresses:
            self._raw.write(self._kcore.read(address, BITMAP_BYTES))
        hits = {event: after[event] - before[event] for event in after}
        self.steps.append({"name": name, **hits, "filter": wanted and described(wanted)})

    def apply(self, name: str, wanted: Filter) -> None:
        """A filter update."""
        before = self._events.hits()
        self.vm.apply(wanted)
        self._record(name, before, wanted)

    def act(self, name: str, action: Callable[[], Any]) -> None:
        """What changes which MSRs KVM itself passes through, beside the filter."""
        before = self._events.hits()
        action()
        self._record(name, before)

    def close(self) -> None:
        self._raw.close()


def single(msrs: list[int]) -> Iterator[tuple[str, Filter]]:
    """Each of MSRS denied: reads, writes, both."""
    for msr in msrs:
        for access, flags in ACCESSES.items():
            yield f"deny {access} of {msr:#x}", Filter([Range.of(msr, [False], flags)])


def wide(msrs: list[int]) -> Iterator[tuple[str, Filter]]:
    """Filters on many MSRs: whole ranges, all by default, and all but one or reads or writes of one."""
    for access, flags in ACCESSES.items():
        yield f"deny {access} of all in ranges", Filter([Range.of(base, [False] * 0x2000, flags) for base in BASES])
        yield (
            f"allow {access} of all, else deny",
            Filter([Range.of(base, [True] * 0x2000, flags) for base in BASES], False),
        )
        yield f"deny {access} of sixteen", Filter([Range.of(msr, [False], flags) for msr in msrs[: vmm.MAX_RANGES]])
        for msr in msrs:
            yield f"allow {access} of {msr:#x}, else deny", Filter([Range.of(msr, [True], flags)], False)
    yield "deny odd ones in ranges", Filter([Range.of(base, [n % 2 == 0 for n in range(0x2000)]) for base in BASES])
    yield "the first of two ranges decides", Filter([Range.of(msrs[0], [True]), Range.of(msrs[0], [False])])


def mixed(msrs: list[int], number: int) -> Iterator[tuple[str, Filter]]:
    """So many filters of random ranges around MSRS, the same in each run."""
    numbers = random.Random(1)
    for n in range(number):
        ranges = []
        for _ in range(numbers.randint(1, vmm.MAX_RANGES)):
            base = max(0, numbers.choice(msrs) - numbers.randint(0, 8))
            allowed = [numbers.random() < 0.5 for _ in range(numbers.randint(1, 80))]
            ranges.append(Range.of(base, allowed, numbers.choice([*ACCESSES.values()])))
        yield f"random {n}", Filter(ranges, numbers.random() < 0.5)


def actions(vm: Vm) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What KVM itself passes more MSRs through for, or fewer, on vCPUs that have a CPUID."""
    for index, vcpu in enumerate(vm.vcpus[1:], 1):
        for name, msr in (("SPEC_CTRL", SPEC_CTRL), ("PRED_CMD", PRED_CMD)):
            yield f"write {name} on {index}", partial(vcpu.set_msr, msr, 1)
        for on in (1, 0, 1):
            yield f"LBR {on} on {index}", partial(vcpu.set_msr, DEBUGCTL, on)
    for on in (True, False, True):  # allocates and frees nested.msrpm
        yield f"SVME {on} on 1", partial(vm.vcpus[1].set_svme, on)


def record(recorder: Recorder, msrs: list[int]) -> None:
    """All steps."""
    everything = Filter([Range.of(base, [False] * 0x2000) for base in BASES])
    for name, wanted in single(msrs):
        recorder.apply(name, wanted)
    # Each under a filter that allows and under one that denies, before and after the next update.
    for wanted in (Filter(), everything):
        for name, action in actions(recorder.vm):
            recorder.apply(f"before {name}", wanted)
            recorder.act(name, action)
            recorder.apply(f"after {name}", Filter() if wanted is everything else everything)
    recorder.apply("start", Filter())
    for name, wanted in (*single(msrs), *wide(msrs), *mixed(msrs, RANDOM_FILTERS)):
        recorder.apply(name, wanted)


def main() -> None:
    """Record for each variant named on the command line."""
    found: dict[str, Any] = {}
    for variant in sys.argv[1:]:
        load(variant)
        kcore = Kcore()
        msrs = candidates(kcore)
        with Events() as events, Vm(vcpus=3) as vm:
            entries = vm.supported_cpuid()
            vm.vcpus[1].set_cpuid(entries)
            vm.vcpus[2].set_cpuid(vmm.with_vendor(entries, *vmm.INTEL))
            recorder = Recorder(vm, kcore, events, OUT / f"{variant}.raw")
            record(recorder, msrs)
            recorder.close()
        found[variant] = {"msrs": msrs, "vcpus": len(vm.vcpus), "steps": recorder.steps}
    (OUT / "bitmaps.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
