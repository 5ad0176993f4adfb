# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m standin DIRECTORY COMMAND...`: `msrtrace COMMAND...` on a fake kernel, which is files in DIRECTORY.

The file `module` exists while the module is loaded, and a changed content means another module; the engine creates
`attached` and `closed`. The counts for each command are fixed, so that its output is known. If the file `vendor` is
there, the kernel is that of an AMD host. The file `vms` has a line for each VM: its name, or NAME@UUID, its pid, how
many vCPUs it has, and the MSRs that its filter denies; each time states are read, one is read from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from made import HOOK, SVM_HOOK, svm_pass, toggle
from made_vms import FS_BASE, denies, state, vcpu, vm

from tracer.cli import main as command_line
from tracer.cli import session
from tracer.doctor import examination
from tracer.kernel.machine import Machine
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.exits import Exit
from tracer.model.msr_filter import NO_FILTER
from tracer.model.options import Options
from tracer.model.snapshot import Call, Durations, Outcome, Probe, Snapshot
from tracer.model.state import State, Vm
from tracer.model.svm import SVM
from tracer.model.vendor import Layout, Vendor
from tracer.model.vmx import VMX
from tracer.program.canary import FtraceSwitch
from tracer.trace import blindness, engine, state_follower, state_reader, tracer
from tracer.trace.vm_info import VmInfos

CALLS = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr")
MODULE, REFUSAL, OBSTACLE, WARNING, VENDOR = "module", "refusal", "obstacle", "warning", "vendor"
VMS, READ, NESTED = "vms", "read", "nested"
ATTACHED, CLOSED, COUNTED, BROKEN, INTERRUPT = "attached", "closed", "counted", "broken", "interrupt"


class Engine:
    """An engine without probes, which returns fixed counts."""

    backend = "kprobe"
    vendor: Vendor = VMX
    functions: tuple[str, ...] = (*CALLS, HOOK)
    directory = Path()

    def __init__(self, layout: Layout, symbols: Symbols, options: Options, explain: Callable[[], str]) -> None:
        (self.directory / ATTACHED).touch()
        self.layout, self.options, self.taken = layout, options, 0
        warning = self.directory / WARNING
        self.warnings = [warning.read_text()] if warning.exists() else []
        self.probes = [Probe(name, name, True, f"{name} [{self.vendor.module}]") for name in self.functions]

    @property
    def pid(self) -> int:
        """The pid of the only VMM, with --by-vm; else 0."""
        return os.getpid() if self.options.by_vm else 0

    def snapshot(self, patience: float = 0) -> Snapshot:
        """Higher counts each time."""
        if (self.directory / BROKEN).exists():
            raise OSError("broken map")
        if (self.directory / INTERRUPT).exists():
            (self.directory / INTERRUPT).unlink()
            raise KeyboardInterrupt
        self.taken += 1
        (self.directory / COUNTED).touch()
        return self.counted()

    def counted(self) -> Snapshot:
        """The counts of the next snapshot."""
        raise NotImplementedError

    @property
    def exits(self) -> dict[Exit, int] | None:
        """With --exits, 70 more of an access that the filter of the only VM denies, and 30 of another."""
        if not self.options.exits:
            return None
        denied = Exit(FS_BASE, "write", "slow", "filtered", "l1", self.pid)
        return {denied: 70 * self.taken, replace(denied, msr=0xCE, access="read", result="ok"): 30 * self.taken}

    def wishes_seen(self) -> frozenset[int]:
        """Of no vCPU."""
        return frozenset()

    def forget(self, pids: set[int]) -> None:
        """Nothing to forget."""

    def detach(self) -> None:
        """No probes to remove."""

    def reattach(self, layout: Layout, symbols: Symbols) -> bool:
        """Succeeds unless there is a refusal."""
        if (self.directory / REFUSAL).exists():
            raise MsrtraceError((self.directory / REFUSAL).read_text())
        return True

    def close(self) -> None:
        """Record that it was closed."""
        (self.directory / CLOSED).touch()


class RunEngine(Engine):
    """Seven calls from the start, on a kernel where only updates can be probed."""

    functions = (HOOK,)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.warnings.append("vmx_vcpu_create is not probed: none")
        self.probes.append(Probe("vmx_vcpu_create", None, False, "none"))

    def counted(self) -> Snapshot:
        """The seven calls."""
        call = Call(0x10, "read", "disable", "vcpu_create", "vmx_vcpu_create", self.options.pid or 0)
        calls = {call: Outcome(7, 0, 7, 0, 0)}
        return Snapshot(self.layout.name, calls=calls, probes=tuple(self.probes), by_vm=self.options.by_vm)


class ReportEngine(Engine):
    """101 filter updates between two snapshots."""

    def counted(self) -> Snapshot:
        """101 more updates."""
        updates = 101 * self.taken - 100
        counted = toggle(updates, pid=self.pid, vcpus=1 + (self.taken > 1), probes=tuple(self.probes))
        return replace(counted, exits=self.exits)


class TopEngine(Engine):
    """Ten filter updates between two snapshots, each with two calls, and ten other calls."""

    def counted(self) -> Snapshot:
        """Ten more updates."""
        n, pid = 10 * self.taken, self.pid
        calls = {
            Call(0x10, "read", "disable", "filter_change", "x", pid): Outcome(2 * n, n, n, 0, 0),
            Call(0x48, "read", "disable", "vcpu_create", "x", pid): Outcome(n, n, 0, 0, 0),
        }
        updates = {pid: Durations(n, n * 1e-4, (n, *[0] * 24))}
        return Snapshot(
            self.layout.name,
            calls=calls,
            updates=updates,
            exits=self.exits,
            probes=tuple(self.probes),
            by_vm=self.options.by_vm,
        )


class AmdEngine(Engine):
    """Ten filter updates between two snapshots, on kvm_amd."""

    vendor = SVM
    functions = ("set_msr_interception_bitmap", SVM_HOOK)

    def counted(self) -> Snapshot:
        """Ten more updates."""
        return svm_pass(10 * self.taken, pid=self.pid, vcpus=1 + (self.taken > 1), probes=tuple(self.probes))


class States:
    """A reader of states: of the VMs in the file, else of one vCPU of this process, whose filter denies FS_BASE."""

    directory = Path()

    def __init__(self, symbols: Symbols, explain: Callable[[], str], pid: int | None = None, *, nested: bool = True):
        self.vendor, self.pid = symbols.vendor, pid
        if nested:
            (self.directory / NESTED).touch()

    def read(self, *, steady: bool = False) -> State:
        """The state."""
        file = self.directory / VMS
        if not file.exists():
            one = vcpu(0, denies(FS_BASE), bitmap=b"\xff" * self.vendor.bitmap_geometry.size, shadow=None)
            return State(self.vendor, vms=(vm("", os.getpid(), one),))
        content = file.read_text()
        if content == "broken":
            raise MsrtraceError("what vCPUs intercept cannot be read: broken")
        (self.directory / READ).touch()
        vms = (self.vm(*line.split()) for line in content.splitlines())
        return state(*(one for one in vms if self.pid in (None, one.pid)))

    def vm(self, name: str, pid: str, vcpus: str, *denied: str) -> Vm:
        """A VM of a line."""
        one = denies(*(int(number, 16) for number in denied)) if denied else NO_FILTER
        name, _, uuid = name.partition("@")
        return vm(name, int(pid), *(vcpu(number, one) for number in range(int(vcpus))), uuid=uuid)

    def close(self) -> None:
        """Record that it was closed."""
        (self.directory / f"{READ}.{CLOSED}").touch()


def named(found: State, infos: VmInfos) -> State:
    """The state with the names that its VMs have in the file, or else their processes."""
    processes = ((one, infos.info(one.pid)) for one in found.vms)
    return replace(
        found, vms=tuple(replace(one, name=one.name or (info.name if info else "")) for one, info in processes)
    )


ENGINES: dict[str, type[Engine]] = {"run": RunEngine, "report": ReportEngine, "top": TopEngine}


def main() -> None:
    """Install the stand-ins, and run the command."""
    directory, command = Path(sys.argv.pop(1)), sys.argv[1]
    chosen = AmdEngine if (directory / VENDOR).exists() else ENGINES.get(command, ReportEngine)
    chosen.directory = States.directory = directory

    def symbols(*_: Path) -> Symbols:
        found = (Symbol(64 + n, name, chosen.vendor.module) for n, name in enumerate(chosen.functions))
        return Symbols.of(found, chosen.vendor.module, vendor=chosen.vendor)

    def module(*_: Path) -> str | None:
        return (directory / MODULE).read_text() if (directory / MODULE).exists() else None

    def obstacle(*_: object, **__: object) -> str | None:
        return (directory / OBSTACLE).read_text() if (directory / OBSTACLE).exists() else None

    def machine(_: Options) -> Machine:
        return Machine(directory / "machine" if (directory / "machine").exists() else Path("/"))

    places: tuple[tuple[Any, str, Any], ...] = (
        (Machine, "vendor", chosen.vendor),
        (Symbols, "read", symbols),
        (examination, "obstacle", obstacle),
        (session, "this_machine", machine),
        (engine, "Engine", chosen),
        (blindness, "sight_of", lambda _: FtraceSwitch()),
        (state_reader, "StateReader", States),
        (tracer, "loaded_module", module),
        (state_follower, "StateFollower", partial(state_follower.StateFollower, symbols=symbols, module=module)),
        (state_follower, "named", named),
        (tracer, "named", named),
        (tracer, "Tracer", partial(tracer.Tracer, symbols=symbols, module=module)),
    )
    for place, name, standin in places:
        setattr(place, name, standin)
    command_line.main()


if __name__ == "__main__":
    main()
