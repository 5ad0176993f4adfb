# SPDX-License-Identifier: GPL-2.0-or-later
"""A module that comes and goes, VMMs whose calls probes see, and a stand-in for the engine."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.snapshot import Call, Durations, Map, Outcome, Probe, Snapshot
from tracer.model.vendor import Layout
from tracer.trace.tracer import StateSource, Tracer
from tracer.trace.vm_info import VmInfos

ENABLE, DISABLE, HOOK = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed"


TSC = Call(0x10, "read", "disable", "vcpu_create", "vmx_vcpu_create")


CALL, UPDATE = Outcome(1, 0, 1, 0, 0), Durations(1, 0.25, (1, *[0] * 24))


class Kernel:
    """A kvm_intel that is loaded and unloaded, and VMMs whose calls are seen by the probes on it."""

    def __init__(
        self,
        proc: Path,
        *,
        by_vm: bool = False,
        keep_gone: bool = False,
        states: Callable[[Symbols], StateSource] | None = None,
    ) -> None:
        self.by_vm = by_vm
        self.loads = self.loaded = 1
        self.functions: tuple[str, ...] = (ENABLE, DISABLE, HOOK)
        self.refusal = ""
        self.engines: list[Engine] = []
        self.proc = proc
        self.now = 1000.0
        self.probes_on = True
        self.tracer = Tracer(
            self.attach,
            symbols=lambda: Symbols.of(Symbol(64, name, "kvm_intel") for name in self.functions),
            module=lambda: self.loaded or None,
            vms=VmInfos(proc),
            keep_gone=keep_gone,
            states=states,
            sight=lambda backend: Sight(self, backend),
            clock=lambda: self.now,
        )

    def attach(self, layout: Layout, symbols: Symbols) -> Engine:
        engine = Engine(self, layout)
        engine.attach(symbols)
        self.engines.append(engine)
        return engine

    def load(self) -> None:
        self.loads += 1
        self.loaded = self.loads

    def unload(self) -> None:
        self.loaded = 0

    def reload(self) -> None:
        self.unload()
        self.load()

    def start(self, pid: int, name: str, started: int = 1000) -> None:
        """Start a VMM; whatever had its pid is gone."""
        directory = self.proc / str(pid)
        directory.mkdir(exist_ok=True)
        (directory / "stat").write_text(f"{pid} (qemu) S {'0 ' * 18}{started} 1 2\n")
        (directory / "cmdline").write_text(f"qemu\0-name\0{name}\0")
        (directory / "comm").write_text("qemu\n")

    def end(self, pid: int) -> None:
        shutil.rmtree(self.proc / str(pid))

    def call(self, pid: int = 0, times: int = 1) -> int:
        """Create and update a vCPU of a VMM so many times. Returns how often each was seen: once, or never."""
        seeing = [engine for engine in self.engines if self.probes_on and engine.sees()]
        assert len(seeing) <= 1
        for engine in seeing:
            engine.count(pid if self.by_vm else 0, times)
        return times if seeing else 0

    def lose(self, times: int = 1) -> int:
        """Cause every kind of loss. Returns how often that was seen."""
        for engine in (seeing := [engine for engine in self.engines if engine.sees()]):
            engine.lost += times
        return times if seeing else 0


class Sight:
    """Whether a kernel has its probes switched on."""

    def __init__(self, kernel: Kernel, backend: str) -> None:
        assert backend == Engine.backend
        self._kernel = kernel

    def clear(self) -> bool:
        return self._kernel.probes_on

    def close(self) -> None:
        self._kernel.probes_on = True


class Engine:
    """A fake of tracer.trace.engine.Engine that checks the order of calls."""

    backend = "kprobe"

    def __init__(self, kernel: Kernel, layout: Layout) -> None:
        self.kernel, self.layout = kernel, layout
        self.modules: list[int] = []  # those that it was attached to
        self.attached = self.closed = False
        self.calls: Counter[int] = Counter()
        self.lost = self.vcpus = 0
        self.commands: dict[int, str] = {}
        self.forgotten: list[set[int]] = []
        self.seen: set[int] = set()
        self.busy = threading.Lock()
        self.probes: list[Probe] = []
        self.warnings: list[str] = []

    def attach(self, symbols: Symbols) -> None:
        assert not self.attached
        assert not self.closed
        assert [symbol.name for symbol in symbols.functions] == sorted(self.kernel.functions)
        if self.kernel.refusal:
            raise MsrtraceError(self.kernel.refusal)
        self.attached = True
        self.modules.append(self.kernel.loaded)
        self.probes = [Probe(HOOK, HOOK, True, f"{HOOK} [kvm_intel]"), Probe("vmx_vcpu_create", None, False, "none")]
        self.warnings = ["vmx_vcpu_create is not probed: none"]

    def reattach(self, layout: Layout, symbols: Symbols) -> bool:
        assert self.modules
        if layout != self.layout:
            return False
        self.attach(symbols)
        return True

    def wishes_seen(self) -> frozenset[int]:
        return frozenset(self.seen)

    def detach(self) -> None:
        assert self.attached
        self.attached = False
        self.calls.clear()
        self.lost = self.vcpus = 0

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.attached = False

    def sees(self) -> bool:
        return self.attached and self.modules[-1] == self.kernel.loaded

    def count(self, pid: int, times: int) -> None:
        self.calls[pid] += times
        self.vcpus += times

    def snapshot(self, patience: float = 0) -> Snapshot:
        assert self.attached
        assert self.busy.acquire(blocking=False), "two threads in one engine"
        try:
            return self._snapshot()
        finally:
            self.busy.release()

    def _snapshot(self) -> Snapshot:
        n, calls = self.lost, dict(self.calls)
        return Snapshot(
            layout=self.layout.name,
            calls={replace(TSC, pid=pid): Outcome(count, 0, count, 0, 0) for pid, count in calls.items()},
            updates={pid: Durations(count, count / 4, (count, *[0] * 24)) for pid, count in calls.items()},
            recalcs={pid: Durations(count, count / 8, (0, count, *[0] * 23)) for pid, count in calls.items()},
            probes=tuple(replace(probe, missed=n) for probe in self.probes),
            maps=(Map("calls", len(calls), 8192, n),),
            unpaired_returns=n,
            read_failures=n,
            vcpus_seen=self.vcpus,
            commands=dict(self.commands),
            by_vm=self.kernel.by_vm,
        )

    def forget(self, pids: set[int]) -> None:
        assert self.attached
        self.forgotten.append(set(pids))
        for pid in pids:
            self.calls[0] += self.calls.pop(pid, 0)


def counts(snapshot: Snapshot) -> dict[int, int]:
    """Calls by pid; all other counts of the fake kernel must agree with them."""
    assert {pid: d.count for pid, d in snapshot.updates.items()} == {c.pid: o.calls for c, o in snapshot.calls.items()}
    assert {pid: d.count for pid, d in snapshot.recalcs.items()} == {c.pid: o.calls for c, o in snapshot.calls.items()}
    assert snapshot.vcpus_seen == sum(outcome.calls for outcome in snapshot.calls.values())
    return {call.pid: outcome.calls for call, outcome in snapshot.calls.items()}


def names(snapshot: Snapshot) -> dict[int, str]:
    return {pid: vm.name for pid, vm in snapshot.vms.items()}


def losses(snapshot: Snapshot) -> tuple[int, ...]:
    missed = [probe.missed for probe in snapshot.probes]
    return (*missed, *(m.dropped for m in snapshot.maps), snapshot.unpaired_returns, snapshot.read_failures)
