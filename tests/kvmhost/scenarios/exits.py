# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests access MSRs a known number of times (tests/kvmhost/accesses/), watched by KVM's tracepoints and by msrtrace.

What each access is to come to is said here, so that tests/kvmhost/test_accesses.py holds what the guest counted, and
what the tracepoints saw, against it; test_exits.py what msrtrace counted. Leaves /out/exits/CASE, as ringbuffer.py
reads it.
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exit_ticks import instructions, plainly
from guest import OUT, STOCK, accesses, load, vendor
from kerneltracer import TRACING, define, pages

from tracer.kernel.layout import layout_of
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import BACKENDS, Options
from tracer.model.snapshot import Snapshot
from tracer.trace.engine import Engine
from tracer.trace.tracer import Tracer

INSTANCE = TRACING / "instances/exits"
#: KVM's tracepoints, and their filter by vendor: exit reasons 31 and 32 (SDM vol. 3, appendix C), 0x7c (APM vol. 2, C).
#: Every exit, L2's too; L2's; those that L1 gets; every access that KVM emulated and did not leave to user space.
_OF_MSRS = {"vmx": "{0} == 31 || {0} == 32", "svm": "{0} == 0x7c"}
EVENTS = {
    "kvm_exit": "exit_reason",
    "kvm_nested_vmexit": "exit_reason",
    "kvm_nested_vmexit_inject": "exit_code",
    "kvm_msr": "",
}
#: A probe of the kernel's: the slow path of WRMSR. No tracepoint tells the paths apart.
GROUP, SLOW_WRITE = "exits", "slow_write"
TSC, SYSENTER_CS, PAT, TSC_DEADLINE, X2APIC_ID, ICR = 0x10, 0x174, 0x277, 0x6E0, 0x802, 0x830
EFER, FS_BASE = 0xC0000080, 0xC0000100
#: That KVM does not know: with bits in the bitmaps of both vendors, and without.
UNKNOWN, WITHOUT_BIT = 0x1345, 0x12345678
BAD_PAT = 0xFFFFFFFFFFFFFFFF
#: How many accesses of each kind are made between reloads.
RELOADS = (7, 11, 13)
#: A fixed interrupt to a CPU that there is not.
IPI = 0x200000041


@dataclass(frozen=True)
class Fate:
    """What becomes of an access.

    :param exits: it leaves the guest
    :param user: it ends KVM_RUN, for this reason
    """

    exits: bool = True
    gp: bool = False
    reflected: bool = False
    user: str = ""


PASSED, HANDLED, REFUSED, REFLECTED = Fate(exits=False), Fate(), Fate(gp=True), Fate(reflected=True)
FILTER, NOT_KNOWN, INVALID = Fate(user="filter"), Fate(user="unknown"), Fate(user="invalid")
INVALID_GP, FILTER_GP = Fate(user="invalid", gp=True), Fate(user="filter", gp=True)


@dataclass(frozen=True)
class Op:
    """COUNT accesses, and their fate: on VMX, and on SVM if that differs."""

    option: str  # of accesses
    msr: int
    count: int
    vmx: Fate
    svm: Fate | None = None
    value: int | None = None

    @property
    def access(self) -> str:
        return self.option.removeprefix("l2-")

    @property
    def level(self) -> int:
        return 2 if self.option.startswith("l2-") else 1

    def fate(self, vendor_name: str) -> Fate:
        return self.svm if self.svm and vendor_name == "svm" else self.vmx

    def arguments(self) -> list[str]:
        value = "" if self.value is None else f":{self.value:#x}"
        return [f"--{self.option}", f"{self.msr:#x}={self.count}{value}"]


@dataclass(frozen=True)
class Case:
    """What `accesses` is told, and how often its list is executed: vCPUs times rounds."""

    ops: tuple[Op, ...]
    options: str = ""
    times: int = 1


def deny(*msrs: int) -> str:
    """The options of a filter that denies MSRS."""
    return " ".join(f"--deny {msr:#x}" for msr in msrs)


#: Counts are primes, so that a sum says which they were.
CASES = {
    "passed": Case(
        (
            Op("read", FS_BASE, 7, PASSED),
            Op("write", FS_BASE, 5, PASSED),
            Op("read", SYSENTER_CS, 11, PASSED),
            Op("write", SYSENTER_CS, 3, PASSED),
        )
    ),
    "intercepted": Case(
        (
            Op("read", PAT, 13, HANDLED),
            Op("write", PAT, 7, HANDLED),
            Op("read", EFER, 211, HANDLED),
            Op("read", TSC, 17, PASSED, HANDLED),
            Op("read", FS_BASE, 5, PASSED),
        )
    ),
    "refused": Case(
        (
            Op("read", UNKNOWN, 7, REFUSED),
            Op("write", UNKNOWN, 5, REFUSED),
            Op("read", WITHOUT_BIT, 11, REFUSED),
            Op("write", PAT, 3, REFUSED, value=BAD_PAT),
        )
    ),
    "denied": Case(
        (
            Op("read", FS_BASE, 7, REFUSED),
            Op("write", FS_BASE, 13, REFUSED),
            Op("write", SYSENTER_CS, 11, REFUSED),
            Op("read", PAT, 5, REFUSED),
            Op("write", PAT, 3, HANDLED),
        ),
        f"{deny(FS_BASE, SYSENTER_CS)} --deny-read {PAT:#x}",
    ),
    "to user": Case(
        (
            Op("read", FS_BASE, 7, FILTER),
            Op("write", FS_BASE, 5, FILTER),
            Op("read", UNKNOWN, 11, NOT_KNOWN),
            Op("write", PAT, 3, INVALID, value=BAD_PAT),
            Op("l2-read", FS_BASE, 13, FILTER),
            Op("l2-write", UNKNOWN, 17, NOT_KNOWN),
            Op("read", PAT, 2, HANDLED),
        ),
        f"{deny(FS_BASE)} --to-user filter,unknown,invalid",
    ),
    "to user for some reasons": Case(
        (
            Op("read", FS_BASE, 7, FILTER_GP),
            Op("write", UNKNOWN, 5, REFUSED),
            Op("write", PAT, 3, INVALID_GP, value=BAD_PAT),
            Op("l2-read", FS_BASE, 11, FILTER_GP),
        ),
        f"{deny(FS_BASE)} --to-user filter,invalid --user-error",
    ),
    "nested": Case(
        (
            Op("l2-read", FS_BASE, 7, PASSED),
            Op("l2-write", FS_BASE, 5, PASSED),
            # Not among those that nested_vmx_prepare_msr_bitmap() lets L2 have, though L1 may.
            Op("l2-read", SYSENTER_CS, 11, HANDLED, PASSED),
            Op("read", SYSENTER_CS, 3, PASSED),
            Op("l2-read", PAT, 13, HANDLED),
            Op("read", PAT, 17, HANDLED),
            Op("l2-write", UNKNOWN, 19, REFUSED),
            Op("l2-read", WITHOUT_BIT, 23, REFLECTED),
        )
    ),
    "nested and denied": Case(
        (
            Op("l2-read", FS_BASE, 7, REFUSED),
            Op("l2-write", SYSENTER_CS, 5, REFUSED),
            Op("read", FS_BASE, 3, REFUSED),
        ),
        deny(FS_BASE, SYSENTER_CS),
    ),
    "reflected": Case(
        (
            Op("l2-read", FS_BASE, 7, REFLECTED),
            Op("l2-write", PAT, 5, REFLECTED),
            Op("l2-read", SYSENTER_CS, 11, REFLECTED),
            Op("read", FS_BASE, 3, PASSED),
            Op("read", PAT, 13, HANDLED),
        ),
        # What L1 intercepts is L1's, whatever the filter says.
        f"--reflect {FS_BASE:#x} --reflect {PAT:#x} --reflect {SYSENTER_CS:#x} {deny(SYSENTER_CS)}",
    ),
    "irqchip": Case(
        (
            Op("read", X2APIC_ID, 3, HANDLED),
            Op("write", ICR, 7, HANDLED, value=IPI),
            Op("write", TSC_DEADLINE, 5, HANDLED, value=0),
        ),
        "--irqchip",
    ),
    "vCPUs": Case(
        (Op("read", EFER, 5, HANDLED), Op("l2-read", PAT, 3, HANDLED), Op("write", FS_BASE, 7, PASSED)),
        "--vms 2 --vcpus 3 --rounds 2",
        12,
    ),
    "threads": Case(
        (Op("read", EFER, 5, HANDLED), Op("l2-read", PAT, 3, HANDLED)), "--vms 2 --vcpus 2 --threads --interval 1", 4
    ),
    "in L2": Case((Op("read", EFER, 2, HANDLED),), "--vcpus 2 --stay-in-l2 --done /tmp/in-l2", 2),
}


class ExitTracer:
    """KVM's tracepoints of MSR exits, and SLOW_WRITE, on from `with` to its end."""

    def __enter__(self) -> ExitTracer:
        define([f"p:{GROUP}/{SLOW_WRITE} kvm:kvm_emulate_wrmsr"])
        INSTANCE.mkdir()
        (INSTANCE / "events" / GROUP / SLOW_WRITE / "enable").write_text("1")
        for name, member in EVENTS.items():
            event = INSTANCE / "events/kvm" / name
            if member:
                (event / "filter").write_text(_OF_MSRS[vendor().name].format(member))
            (event / "enable").write_text("1")
        return self

    def __exit__(self, *_: object) -> None:
        for name in EVENTS:
            (INSTANCE / "events/kvm" / name / "enable").write_text("0")
        (INSTANCE / "events" / GROUP / SLOW_WRITE / "enable").write_text("0")
        INSTANCE.rmdir()
        define([f"-:{GROUP}/{SLOW_WRITE}"])

    def take(self, out: Path) -> None:
        """Leave in OUT what was seen since the last time."""
        out.mkdir(parents=True)
        events = [f"kvm/{name}" for name in EVENTS] + [f"{GROUP}/{SLOW_WRITE}"]
        formats = [(TRACING / "events" / event / "format").read_text() for event in events]
        (out / "formats").write_text("".join(formats))
        (out / "symbols").write_text("")
        (out / "stats").write_text("".join(path.read_text() for path in sorted(INSTANCE.glob("per_cpu/cpu*/stats"))))
        for cpu in INSTANCE.glob("per_cpu/cpu*"):
            (out / f"{cpu.name}.raw").write_bytes(pages(cpu / "trace_pipe_raw"))


def engines(stack: ExitStack) -> dict[str, Engine]:
    """Engines that count at once: by each backend that this kernel has, and one without exits."""
    symbols, found = Symbols.read(), {}
    wanted = {backend: Options(backend=backend, exits=True, by_vm=True) for backend in BACKENDS}
    for name, options in (wanted | {"without": Options(backend="kprobe", by_vm=True)}).items():
        try:
            found[name] = Engine(layout_of(symbols), symbols, options)
        except MsrtraceError as error:
            if "--backend kprobe can" not in str(error):
                raise
        else:
            stack.callback(found[name].close)
    return found


def counted(now: Snapshot, before: Snapshot | None) -> dict[str, Any]:
    """What an engine counted in between."""
    new = now.since(before) if before else now
    exits = [asdict(kind) | {"exits": count} for kind, count in (new.exits or {}).items()]
    calls = sorted([*map(str, asdict(call).values()), outcome.calls] for call, outcome in new.calls.items())
    lost = {"open": now.open_exits, "refusals": new.unpaired_refusals, "dropped": sum(m.dropped for m in new.maps)}
    missed = {probe.function: probe.missed for probe in new.probes if probe.missed}
    unattached = [probe.function for probe in new.probes if not probe.attached]
    return {"exits": exits, "calls": calls, **lost, "missed": missed, "unattached": unattached}


def prices() -> dict[str, dict[str, float]]:
    """What an exit takes without a tracer, and while an engine of a backend counts it."""
    found, symbols = {"none": instructions(plainly)}, Symbols.read()
    for backend in BACKENDS:
        with suppress(MsrtraceError):  # engines() says which a host has
            engine = Engine(layout_of(symbols), symbols, Options(backend=backend, exits=True))
            found[backend] = instructions(plainly)
            engine.close()
    return found


def across_reloads() -> dict[str, Any]:
    """RELOADS of the vendor's module and of kvm itself, which moves its functions; accesses before and after."""
    options = Options(backend="kprobe", exits=True)
    tracer = Tracer(lambda layout, symbols: Engine(layout, symbols, options))
    tracer.attach()
    seen = []
    for count in RELOADS:
        accesses("--read", f"{EFER:#x}={count}", "--read", f"{FS_BASE:#x}={count}", *deny(FS_BASE).split())
        seen.append(counted(tracer.snapshot(5.0), None))
        load("none")
        subprocess.run(["rmmod", "kvm"], check=True)
        tracer.follow()
        load(STOCK[vendor().name])
        tracer.follow()
    unloads = tracer.snapshot().module_unloads
    tracer.close()
    return {"seen": seen, "unloads": unloads}


def exits() -> Any:
    """Each of CASES: what the guest counted, and what each engine did."""
    load(STOCK[vendor().name])
    found: dict[str, Any] = {"vendor": vendor().name, "counted": {}, "engines": {}}
    before: dict[str, Snapshot] = {}
    with ExitStack() as stack, ExitTracer() as tracer:
        running = engines(stack)
        for name, case in CASES.items():
            arguments = [word for op in case.ops for word in op.arguments()]
            found["counted"][name] = accesses(*case.options.split(), *arguments)
            tracer.take(OUT / "exits" / name)
            for engine, one in running.items():
                now = one.snapshot(5.0)
                found["engines"].setdefault(engine, {})[name] = counted(now, before.get(engine))
                before[engine] = now
    return found | {"left": INSTANCE.exists(), "prices": prices(), "reloads": across_reloads()}
