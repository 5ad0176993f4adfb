# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of guests (accesses.c) in and out of L2, under filters: what `msrtrace state` says of their bitmaps.

The kernel's own tracer records both bitmaps of each vCPU at the end of each of its ioctls: the last ones are what
`state` must have read.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from guest import OUT, output_of, until, vendor
from kerneltracer import GROUP, PUT, BitmapTracer, Vendor, define, part_events
from states import LIMIT_SECONDS, Process
from vmm import Vm

from tracer.cli.session import state_reader
from tracer.kernel.btf import Btf

TSC, SYSENTER_CS, FS_BASE, GS_BASE, KERNEL_GS_BASE = 0x10, 0x174, 0xC0000100, 0xC0000101, 0xC0000102
LSTAR = 0xC0000082
READS = 12


@dataclass(frozen=True)
class Case:
    """A VM of one vCPU, in whose guest a guest runs. L1 has a `bitmap` for it, which intercepts `reflected` MSRs.

    :param enters: L2 runs at all; `stays`: the vCPU is left in it
    :param denied: by the VM's filter; `denied_in_l2`: since the vCPU is in L2
    """

    reflected: tuple[int, ...] = ()
    denied: tuple[int, ...] = ()
    denied_in_l2: tuple[int, ...] = ()
    enters: bool = True
    stays: bool = True
    bitmap: bool = True

    def options(self) -> Iterator[str]:
        """Of accesses."""
        lists = {"--reflect": self.reflected, "--deny": self.denied, "--deny-in-l2": self.denied_in_l2}
        yield from (word for option, msrs in lists.items() for msr in msrs for word in (option, f"{msr:#x}"))
        yield from ("--l2-write" if self.enters and self.bitmap else "--write", f"{LSTAR:#x}=3")
        if self.stays:
            yield "--stay-in-l2"
        if not self.bitmap:
            yield "--no-msr-bitmap"


CASES = {
    "L1 intercepts nothing": Case(),
    "L1 intercepts": Case(reflected=(TSC, SYSENTER_CS, GS_BASE)),
    "L1 intercepts all": Case(reflected=(SYSENTER_CS, 0x175, 0x176, FS_BASE, GS_BASE, KERNEL_GS_BASE)),
    "denied": Case(reflected=(GS_BASE,), denied=(FS_BASE, 0x175)),
    "denied in L2": Case(reflected=(GS_BASE,), denied=(0x175,), denied_in_l2=(FS_BASE, 0x176)),
    "denied in L2, intercepted before": Case(reflected=(FS_BASE, SYSENTER_CS), denied_in_l2=(FS_BASE, SYSENTER_CS)),
    "back in L1": Case(reflected=(KERNEL_GS_BASE,), denied=(FS_BASE,), stays=False),
    "no bitmap": Case(denied=(FS_BASE,), bitmap=False),
    "no L2": Case(reflected=(KERNEL_GS_BASE,), enters=False, stays=False),
}


class NestedTracer(BitmapTracer):
    """As BitmapTracer; also the bitmap for L2 and, on SVM, the address of the bitmap that the CPU has then."""

    def __init__(self, offset: int, id_offset: int, out: Path, btf: Btf) -> None:
        super().__init__(offset, id_offset, out)
        self._btf = btf

    def _define(self, vendor: Vendor, functions: set[str]) -> None:
        super()._define(vendor, functions)
        start, at = f"vcpu=%di:x64 id=+{self._id_offset}(%di):s32", self._btf.offset
        if vendor.module == "kvm_amd":
            nested = at("vcpu_svm", "nested") + at("svm_nested_state", "msrpm")
            own, address = at("vcpu_svm", "vmcb01"), at("vmcb_control_area", "msrpm_base_pa")
            pointer, physical = (own + at("kvm_vmcb_info", name) for name in ("ptr", "pa"))
            words = f"in_use=+{address}(+{at('vcpu_svm', 'vmcb')}(%di)):x64 nested=+{nested}(%di):x64"
            define([f"p:{GROUP}/place {PUT} {start} {words} ptr=+{pointer}(%di):x64 pa=+{physical}(%di):x64"])
        else:
            vmcs02 = at("vcpu_vmx", "nested") + at("nested_vmx", "vmcs02")
            nested = vmcs02 + at("loaded_vmcs", "msr_bitmap")
        define(part_events(vendor, "nested", start, nested))


@contextmanager
def guests(cases: dict[str, Case]) -> Iterator[dict[str, int]]:
    """A process for each of the cases, which has done all that it is to do; their pids."""
    with ExitStack() as at_end:
        running = {}
        for number, (name, case) in enumerate(cases.items()):
            done = Path(f"/tmp/nesting-{number}")
            command = ["accesses", *case.options(), "--done", str(done), "--hold", "10000"]
            running[name] = process = subprocess.Popen(command)
            at_end.callback(process.wait)
            at_end.callback(process.kill)
            until(lambda: done.exists() or process.poll() is not None, LIMIT_SECONDS)  # noqa: B023 (called at once)
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
        yield {name: process.pid for name, process in running.items()}


def nesting() -> dict[str, Any]:
    """What `msrtrace state` says of all cases; and how readings are while nested guests come, go and run."""
    btf = Btf.of_module(vendor().module)
    id_offset = btf.offset("kvm_vcpu", "vcpu_id")
    offset = btf.nested_offset(vendor().bitmap)
    with NestedTracer(offset, id_offset, OUT / "witness-nesting", btf), guests(CASES) as pids:
        found: dict[str, Any] = {"pids": pids}
        found["state"] = output_of("msrtrace", "state", "--format", "json", timeout=LIMIT_SECONDS)
        found["text"] = output_of("msrtrace", "state", "--pid", str(pids["L1 intercepts"]), timeout=LIMIT_SECONDS)
    return found | {"busy": busy(), "toggled": toggled() if vendor().name == "svm" else None}


def readings(times: int) -> dict[str, Any]:
    """Steady readings, one after the other: which bitmaps were in use, how they were, and the longest in seconds."""
    uses, seen, longest = Counter[str](), Counter[str](), 0.0
    with state_reader() as reader:
        for _ in range(times):
            begun = time.monotonic()
            state = reader.read(steady=True)
            longest = max(longest, time.monotonic() - begun)
            for vcpu in (one for vm in state.vms for one in vm.vcpus):
                uses[vcpu.nested.use if vcpu.nested else "none yet"] += 1
                if vcpu.nested and vcpu.nested.bitmap is not None:
                    verdict = state.verdict(vcpu, GS_BASE)
                    words: Iterable[str] = (verdict.read, verdict.nested.read) if verdict.nested else ()
                    seen[", ".join(words)] += 1
    return {"uses": uses, "said": seen, "longest": longest}


def busy() -> dict[str, Any]:
    """Two vCPUs go in and out of L2 all the time, and L1 intercepts GS_BASE."""
    ready = Path("/tmp/nesting-busy")
    command = [
        "accesses",
        "--forever",
        "--threads",
        "--vcpus",
        "2",
        "--reflect",
        f"{GS_BASE:#x}",
        "--ready",
        str(ready),
    ]
    process = subprocess.Popen([*command, "--l2-read", f"{FS_BASE:#x}=100", "--l2-read", f"{GS_BASE:#x}=3"])
    try:
        until(ready.exists, LIMIT_SECONDS)
        time.sleep(1)
        found = readings(READS)
    finally:
        process.terminate()
    return found | {"status": process.wait(LIMIT_SECONDS)}


def toggling() -> Vm:
    """A VM whose vCPU ends its use of SVM and begins anew, without an end."""

    def toggle() -> None:
        while True:
            vm.vcpus[0].set_svme(on=True)
            vm.vcpus[0].set_svme(on=False)

    vm = Vm(1)
    vm.vcpus[0].set_cpuid(vm.supported_cpuid())
    Thread(target=toggle, daemon=True).start()
    return vm


def toggled() -> dict[str, Any]:
    """The bitmap for L2 of a vCPU is made and freed again and again while it is read."""
    process = Process(toggling)
    try:
        return readings(READS)
    finally:
        process.end()
