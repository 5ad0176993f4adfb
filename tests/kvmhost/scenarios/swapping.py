# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters are swapped without a pause while states are read: `stress.py` does it where there are several CPUs.

Each VMM has a filter that denies SWAPPED and one that allows all, in turn. Whatever is read, one of the two is in force
or about to be: for the MSRs that KVM passes through, no word may blame KVM.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from guest import until
from states import SPEC_CTRL, Process, denied
from vmm import Filter, Range, Vm

from tracer.cli.session import state_reader
from tracer.model.msr_filter import DIRECTIONS
from tracer.trace.state_reader import StateReader

SYSENTER_CS, SYSENTER_ESP, FS_BASE, UNKNOWN = 0x174, 0x175, 0xC0000100, 0x2FF
#: Passed through by any KVM; by some on a condition that the vCPUs meet; always intercepted.
SWAPPED = (FS_BASE, SYSENTER_CS, SYSENTER_ESP, SPEC_CTRL, UNKNOWN)
READS = 24
DENIES = Filter([denied(msr) for msr in SWAPPED])
ALLOWS = Filter([Range.of(msr, [True]) for msr in SWAPPED])


def vm_to_swap() -> Vm:
    """A VM of two vCPUs that KVM passes SWAPPED through for, but UNKNOWN."""
    vm = Vm(2)
    entries = vm.supported_cpuid()
    for vcpu in vm.vcpus:
        vcpu.set_cpuid(entries)
        vcpu.set_msr(SPEC_CTRL, 1)
        vcpu.run()
    return vm


def swap_in_turn() -> None:
    """Each filter is applied by both vCPUs before the next is set."""
    vm = vm_to_swap()
    while True:
        vm.apply(DENIES)
        vm.apply(ALLOWS)


def swap_and_rest() -> None:
    """The same, and the guest rests between: most that is read is settled."""
    vm = vm_to_swap()
    while True:
        for wanted in (DENIES, ALLOWS):
            vm.apply(wanted)
            time.sleep(0.03)


def swap_and_run() -> None:
    """Filters are set while the vCPUs run, each in a thread of its own."""
    vm = vm_to_swap()

    def run(index: int) -> None:
        while True:
            vm.vcpus[index].run()

    for index in range(2):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    while True:
        vm.set_filter(DENIES)
        vm.set_filter(ALLOWS)


WAYS = {"in turn": swap_in_turn, "and rest": swap_and_rest, "and run": swap_and_run}


def unfiltered(reader: StateReader) -> list[int]:
    """Those of SWAPPED that this host's KVM passes through for such a vCPU, in both directions."""
    vmm = Process(vm_to_swap)
    state = reader.read(steady=True)
    vmm.end()
    bitmap, geometry = state.vms[0].vcpus[0].bitmap, state.vendor.bitmap_geometry
    return [msr for msr in SWAPPED if not any(geometry.intercepted(bitmap or b"", msr, d) for d in DIRECTIONS)]


def said_while(reader: StateReader, swap: Callable[[], None]) -> Counter[str]:
    """How often which words were said of SWAPPED, read and written, of a vCPU."""
    vmm = Process(partial(begin, swap))
    until(lambda: reader.read().vms)
    words: Counter[str] = Counter()
    for _ in range(READS):
        state = reader.read(steady=True)
        for vm in state.vms:
            for vcpu in vm.vcpus:
                said = [state.verdict(vcpu, msr) for msr in SWAPPED]
                words[" ".join(f"{one.read}/{one.write}" for one in said)] += 1
    vmm.end()
    return words


def swapped() -> dict[str, Any]:
    """What was said, by the way of swapping."""
    with state_reader() as reader:
        passed = unfiltered(reader)
        return {"passed": passed, "said": {way: said_while(reader, swap) for way, swap in WAYS.items()}}


def begin(swap: Callable[[], None]) -> threading.Thread:
    """Let it swap in a thread, so that the process can say that it has begun."""
    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    return thread
