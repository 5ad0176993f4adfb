# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs under the filters of CASES, descriptors that wander, VMMs that end: what `msrtrace state` says of them at once.

Each VMM is a process of its own. The kernel's own tracer records the bitmap of each vCPU at the end of each of its
ioctls (kerneltracer.BitmapTracer): the last one is what `state` must have read.
"""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from guest import OUT, output_of, until, vendor
from kerneltracer import BitmapTracer
from vmm import READ, WRITE, Filter, Range, Vm

from tracer.cli.session import state_reader
from tracer.kernel.btf import Btf, BtfError

SPEC_CTRL, SYSENTER_CS, FS_BASE, GS_BASE = 0x48, 0x174, 0xC0000100, 0xC0000101
#: Of a VM: the first has no CPUID, the second has one and SPEC_CTRL, the third the same and never runs.
NO_CPUID, WITH_CPUID, NEVER_RUN = VCPUS = range(3)
PR_SET_PDEATHSIG = 1
MANY = 10  # vCPUs of five VMs
LIMIT_SECONDS = 600.0  # of the guest's time
AREA = 0x2000  # MSRs
LONGEST = 0x3000  # of a range: KVM_MSR_FILTER_MAX_BITMAP_SIZE bytes of bits
#: What may pass of a VM whose filter denies all else: sixteen ranges are the most.
SIXTEEN = [
    *(Range.of(base, [True] * count) for base, count in ((0x10, 1), (0x48, 2), (0xE7, 2), (0x10B, 1), (0x174, 3))),
    *(Range.of(base, [True] * count, READ) for base, count in ((0x1C4, 2), (0x1D9, 6), (0x277, 1), (0x3FC, 3))),
    *(Range.of(base, [True] * count, WRITE) for base, count in ((0x660, 1), (0x6A0, 8), (0xDA0, 1))),
    *(Range.of(0xC0000080, [True, True, False, True, True]), Range.of(0xC0000100, [True, False, True, True])),
    *(Range.of(0xC0010200, [n % 2 == 0 for n in range(12)]), Range.of(0x40000000, [True] * 256)),
]


@dataclass(frozen=True)
class Case:
    """A VM: the filters that its first two vCPUs apply one after the other, and one that nobody has applied yet.

    :param spec_ctrl_again: user space writes SPEC_CTRL once more under the first filter
    :param svme: KVM makes a second bitmap for each vCPU then, for guests of its guest
    """

    filters: tuple[Filter, ...] = ()
    unapplied: Filter | None = None
    spec_ctrl_again: bool = False
    svme: bool = False

    @property
    def filter(self) -> Filter:
        """The VM's, at the end."""
        return self.unapplied or (self.filters[-1] if self.filters else Filter())


def denied(base: int, count: int = 1, flags: int = READ | WRITE) -> Range:
    """A range that denies all of its MSRs."""
    return Range.of(base, [False] * count, flags)


SPEC_CTRL_DENIED, SPEC_CTRL_ALLOWED = "SPEC_CTRL, then denied", "SPEC_CTRL while denied, then allowed"
#: By name. `none` has no filter: it is what KVM itself wants.
CASES = {
    "none": Case(),
    "one MSR": Case((Filter([denied(FS_BASE)]),)),
    "one direction": Case((Filter([denied(0x174, 1, READ), denied(GS_BASE, 1, WRITE), denied(SPEC_CTRL, 1, READ)]),)),
    "all but sixteen ranges": Case((Filter(SIXTEEN, default_allow=False),)),
    "x2APIC": Case((Filter([denied(0x7F0, 0x120)]),)),
    "the first range decides": Case(
        (
            Filter(
                [
                    *(Range.of(0x174, [True], READ), denied(0x170, 16), Range.of(0x176, [True])),
                    *(Range.of(FS_BASE, [True, False]), denied(0xC0000080, 0x100, WRITE)),
                    *(Range.of(0xC0000081, [True] * 4), denied(0xC0000082, 2)),
                ]
            ),
        )
    ),
    "denied by default": Case((Filter([Range.of(SPEC_CTRL, [True])], default_allow=False),)),
    "all in ranges": Case((Filter([denied(base, AREA) for base in (0, 0xC0000000, 0xC0010000, 0x40000000)]),)),
    "the longest": Case(
        (Filter([Range.of(at * LONGEST, [n >> 10 & 1 == at & 1 for n in range(LONGEST)]) for at in range(16)]),)
    ),
    "every second": Case((Filter([Range.of(base, [n % 2 == 0 for n in range(64)]) for base in (0x170, 0xC00000F0)]),)),
    "beyond the bitmap": Case((Filter([denied(0x1FF0, 32), denied(0xC0001FFF, 2), denied(0xFFFFFFF0, 15)]),)),
    "replaced": Case((Filter([denied(FS_BASE)]), Filter([denied(GS_BASE)]))),
    "denied, not applied": Case((Filter(),), Filter([denied(FS_BASE), denied(0x175), denied(SPEC_CTRL)])),
    SPEC_CTRL_DENIED: Case((Filter([denied(SPEC_CTRL)]),)),
    SPEC_CTRL_ALLOWED: Case((Filter([denied(SPEC_CTRL)]), Filter()), spec_ctrl_again=True),
    "allowed, not applied": Case((Filter([denied(FS_BASE), denied(0x175), denied(SPEC_CTRL)]),), Filter()),
}
#: For guests of guests, where there is SVM.
NESTED = {"nested": Case((Filter([denied(FS_BASE)]),), svme=True)}


def cases(vendor_name: str) -> dict[str, Case]:
    """Those of a vendor's hosts."""
    return CASES | (NESTED if vendor_name == "svm" else {})


def made(case: Case) -> Vm:
    """The VM of a case."""
    vm = Vm(len(VCPUS))
    entries = vm.supported_cpuid()
    for vcpu in vm.vcpus[WITH_CPUID:]:
        vcpu.set_cpuid(entries)
        vcpu.set_msr(SPEC_CTRL, 1)
        if case.svme:
            vcpu.set_svme(on=True)
    for number, wanted in enumerate(case.filters or (None,)):
        if wanted:
            vm.set_filter(wanted)
        for vcpu in vm.vcpus[:NEVER_RUN]:
            vcpu.run()
        if case.spec_ctrl_again and number == 0:
            for vcpu in vm.vcpus[WITH_CPUID:]:
                vcpu.set_msr(SPEC_CTRL, 1)
    if case.unapplied:
        vm.set_filter(case.unapplied)
    return vm


class Process:
    """A process that does its work and then waits to be killed; what the work returns lives as long."""

    def __init__(self, work: Callable[[], object]) -> None:
        ready, done = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(work, done)
        os.close(done)
        said = os.read(ready, 1 << 16)  # not to the end: children of its own hold the pipe, too
        os.close(ready)
        if said != b"done":
            raise RuntimeError(said.decode() or "a process ended early")

    def end(self) -> None:
        """Kill it; afterwards it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _be_child(work: Callable[[], object], done: int) -> None:
    """What a child does: it never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _alive = work()
        os.write(done, b"done")
        while True:
            signal.pause()
    except BaseException:
        os.write(done, traceback.format_exc().encode())
    os._exit(1)


def send(to: socket.socket, *descriptors: int) -> None:
    """Pass descriptors to another process (SCM_RIGHTS)."""
    to.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive(from_: socket.socket) -> None:
    """Take descriptors that another process passes."""
    from_.recvmsg(1, socket.CMSG_SPACE(64))


def passing(to: socket.socket) -> Vm:
    """A VMM that passes the descriptor of a vCPU to another process."""
    vm = made(CASES["one MSR"])
    send(to, vm.vcpus[WITH_CPUID].fd)
    return vm


def forking(pid: Path) -> tuple[Vm, Process]:
    """A VMM that forks; its child, whose id goes into a file, outlives it and holds all that it held."""
    vm = made(CASES["one MSR"])
    child = Process(lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0))
    pid.write_text(str(child.pid))
    return vm, child


class Wandering:
    """Descriptors of vCPUs with others than the VMM, which lives or has ended."""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}
        for name in ("passed", "passed, VMM ended"):
            here, there = socket.socketpair()

            self.processes[name] = Process(partial(passing, here))
            self.processes[f"{name}: holder"] = Process(partial(receive, there))
            here.close()
            there.close()
        for name in ("forked", "forked, VMM ended"):
            self.processes[name] = Process(partial(forking, OUT / f"{name}.pid"))
        self.forked = [int((OUT / f"{name}.pid").read_text()) for name in ("forked", "forked, VMM ended")]
        for name in ("passed, VMM ended", "forked, VMM ended"):
            self.processes[name].end()

    @property
    def pids(self) -> dict[str, int]:
        """By name."""
        found = {name: process.pid for name, process in self.processes.items()}
        return found | dict(zip(("forked: child", "forked, VMM ended: child"), self.forked, strict=True))

    def end(self) -> None:
        """End all."""
        for name, process in self.processes.items():
            if name not in ("passed, VMM ended", "forked, VMM ended"):
                process.end()
        for pid in self.forked:
            os.kill(pid, signal.SIGKILL)


@contextmanager
def many_vms(number: int) -> Iterator[list[int]]:
    """So many VMs of one vCPU; their pids."""
    options = ["--processes", "--vms", str(number), "--updates", "2", "--initial-run", "--hold", "600"]
    workload = subprocess.Popen(["workload", *options, "--ready", "/tmp/many"], stdout=subprocess.DEVNULL)
    until(Path("/tmp/many").exists, 300)
    time.sleep(5)  # of the guest's: until each has applied its filters
    try:
        yield [int(pid) for pid in Path(f"/proc/{workload.pid}/task/{workload.pid}/children").read_text().split()]
    finally:
        workload.terminate()
        workload.wait()


def own_bitmap_offset() -> int | None:
    """Where a vCPU has the address of its bitmap, where the kernel says so."""
    try:
        return Btf.of_module(vendor().module).nested_offset(vendor().bitmap)
    except BtfError:
        return None


def states(number: int) -> dict[str, Any]:
    """What `msrtrace state` says of all cases, of descriptors that wander, and of so many VMs more."""
    id_offset = Btf.of_kernel().offset("kvm_vcpu", "vcpu_id")
    with ExitStack() as at_end:
        at_end.enter_context(BitmapTracer(own_bitmap_offset(), id_offset, OUT / "witness-states"))
        many = at_end.enter_context(many_vms(number))
        by_case = {}
        for name, case in cases(vendor().name).items():
            by_case[name] = Process(partial(made, case))
            at_end.callback(by_case[name].end)
        wandering = Wandering()
        at_end.callback(wandering.end)
        begun = time.monotonic()
        found: dict[str, Any] = {"state": output_of("msrtrace", "state", "--format", "json", timeout=LIMIT_SECONDS)}
        found["seconds"] = time.monotonic() - begun
        found |= {"cases": {name: process.pid for name, process in by_case.items()}}
        found |= {"wandering": wandering.pids, "many": many}
    return found


def closing() -> dict[str, Any]:
    """VMs come and go, and VMMs are killed, while states are read without a pause: how many vCPUs were seen, and when.

    At the end there are none.
    """
    vcpus, seconds = [], []
    with state_reader() as reader:

        def read() -> int:
            begun = time.monotonic()
            state = reader.read()
            seconds.append(time.monotonic() - begun)
            vcpus.append(sum(len(vm.vcpus) for vm in state.vms))
            return vcpus[-1]

        coming = subprocess.Popen(["workload", "--create-vms", "60", "--vcpus", "3", "--updates", "0"])
        while coming.poll() is None:
            vmms = subprocess.Popen(["workload", "--processes", "--vms", "5", "--vcpus", "2", "--forever"])
            until(lambda: read() >= MANY)  # ten readings take less time than they take to begin
            vmms.kill()
            for _ in range(10):
                read()
            vmms.wait()
        until(lambda: not reader.read().vms)
        steady = reader.read(steady=True)
    return {"vcpus": vcpus, "longest": max(seconds), "status": coming.returncode, "left": len(steady.vms)}
