# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracing through reloads of kvm_intel and the lives of VMs, with a fake kernel in place of BPF."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tracer.kernel.layout import layout_of
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.module_change import RETRY_SECONDS, ModuleChange
from tracer.model.snapshot import Call, Durations, Map, Outcome, Probe, Snapshot
from tracer.model.vendor import Layout
from tracer.trace.tracer import Tracer, loaded_module
from tracer.trace.vm_names import VmNames

ENABLE, DISABLE, HOOK = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed"
TSC = Call(0x10, "read", "disable", "vcpu_create", "vmx_vcpu_create")
CALL, UPDATE = Outcome(1, 0, 1, 0, 0), Durations(1, 0.25, (1, *[0] * 24))


class Kernel:
    """A kvm_intel that is loaded and unloaded, and VMMs whose calls are seen by the probes on it."""

    def __init__(self, proc: Path, *, by_vm: bool = False, keep_gone: bool = False) -> None:
        self.by_vm = by_vm
        self.loads = self.loaded = 1
        self.functions: tuple[str, ...] = (ENABLE, DISABLE, HOOK)
        self.refusal = ""
        self.engines: list[Engine] = []
        self.proc = proc
        self.now = 1000.0
        self.tracer = Tracer(
            self.attach,
            symbols=lambda: Symbols.of(Symbol(64, name, "kvm_intel") for name in self.functions),
            module=lambda: self.loaded or None,
            names=VmNames(proc),
            keep_gone=keep_gone,
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
        seeing = [engine for engine in self.engines if engine.sees()]
        assert len(seeing) <= 1
        for engine in seeing:
            engine.count(pid if self.by_vm else 0, times)
        return times if seeing else 0

    def lose(self, times: int = 1) -> int:
        """Cause every kind of loss. Returns how often that was seen."""
        for engine in (seeing := [engine for engine in self.engines if engine.sees()]):
            engine.lost += times
        return times if seeing else 0


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


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.fixture
def by_vm(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path, by_vm=True)
    kernel.start(100, "web")
    kernel.start(200, "db")
    kernel.tracer.attach()
    return kernel


def counts(snapshot: Snapshot) -> dict[int, int]:
    """Calls by pid; all other counts of the fake kernel must agree with them."""
    assert {pid: d.count for pid, d in snapshot.updates.items()} == {c.pid: o.calls for c, o in snapshot.calls.items()}
    assert {pid: d.count for pid, d in snapshot.recalcs.items()} == {c.pid: o.calls for c, o in snapshot.calls.items()}
    assert snapshot.vcpus_seen == sum(outcome.calls for outcome in snapshot.calls.values())
    return {call.pid: outcome.calls for call, outcome in snapshot.calls.items()}


def losses(snapshot: Snapshot) -> tuple[int, ...]:
    missed = [probe.missed for probe in snapshot.probes]
    return (*missed, *(m.dropped for m in snapshot.maps), snapshot.unpaired_returns, snapshot.read_failures)


# --- reloads ---


def test_an_attached_tracer_has_counts_and_probes(kernel: Kernel) -> None:
    tracer = kernel.tracer
    assert (tracer.attached, tracer.probes, tracer.warnings) == (False, [], [])
    with pytest.raises(MsrtraceError, match=r"^nothing is attached$"):
        tracer.snapshot()
    tracer.attach()
    assert kernel.call(times=7) == 7
    [engine] = kernel.engines
    assert tracer.attached
    assert tracer.probes == engine.probes
    assert tracer.warnings == engine.warnings
    assert not tracer.follow()
    assert tracer.snapshot() == engine.snapshot()
    assert counts(tracer.snapshot()) == {0: 7}


def test_counts_survive_a_reload(kernel: Kernel) -> None:
    tracer = kernel.tracer
    tracer.attach()
    kernel.call(times=7)
    kernel.lose(2)
    kernel.reload()
    assert kernel.call() == 0  # the old probes are dead
    assert tracer.follow()
    assert not tracer.follow()
    assert [engine.modules for engine in kernel.engines] == [[1, 2]]
    assert (counts(tracer.snapshot()), losses(tracer.snapshot())) == ({0: 7}, (2,) * 5)
    kernel.call(times=3)
    kernel.lose()
    snapshot = tracer.snapshot()
    assert (counts(snapshot), losses(snapshot), snapshot.module_unloads) == ({0: 10}, (3,) * 5, 1)
    assert snapshot.calls == {TSC: Outcome(10, 0, 10, 0, 0)}
    assert snapshot.updates == {0: Durations(10, 2.5, (10, *[0] * 24))}
    assert [probe.attached for probe in snapshot.probes] == [True, False]


def test_every_unload_is_counted(kernel: Kernel) -> None:
    kernel.tracer.attach()
    seen = []
    for _ in range(3):
        kernel.reload()
        kernel.tracer.follow()
        seen.append(kernel.tracer.snapshot().module_unloads)
    assert seen == [1, 2, 3]


def test_counts_stay_while_the_module_is_unloaded(kernel: Kernel) -> None:
    tracer = kernel.tracer
    tracer.attach()
    kernel.call(times=7)
    kernel.lose()
    kernel.unload()
    assert tracer.follow()
    assert not tracer.follow()
    assert (tracer.attached, tracer.probes, tracer.warnings) == (False, [], [])
    snapshot = tracer.snapshot()
    assert (counts(snapshot), losses(snapshot)) == ({0: 7}, (1,) * 5)
    assert [(p.function, p.attached, p.detail) for p in snapshot.probes] == [
        (HOOK, False, "kvm_intel was unloaded"),
        ("vmx_vcpu_create", False, "kvm_intel was unloaded"),
    ]
    assert [(m.entries, m.capacity) for m in snapshot.maps] == [(0, 8192)]
    kernel.load()
    assert tracer.follow()
    kernel.call(times=3)
    assert counts(tracer.snapshot()) == {0: 10}


def test_the_layout_may_change_with_a_reload(kernel: Kernel) -> None:
    kernel.tracer.attach()
    kernel.call(times=7)
    kernel.functions = ("vmx_set_intercept_for_msr", "vmx_recalc_intercepts")
    kernel.reload()
    kernel.tracer.follow()
    assert [(e.layout.name, e.modules, e.closed) for e in kernel.engines] == [
        ("toggle", [1], True),
        ("recalc", [2], False),
    ]
    assert (kernel.tracer.snapshot().layout, counts(kernel.tracer.snapshot())) == ("recalc", {0: 7})


@pytest.mark.parametrize("functions", [(ENABLE, DISABLE, HOOK), (HOOK,)])
def test_a_module_that_cannot_be_traced_is_retried(kernel: Kernel, functions: tuple[str, ...]) -> None:
    tracer = kernel.tracer
    tracer.attach()
    kernel.call(times=7)
    kernel.refusal, kernel.functions = "no probe could be attached", functions
    kernel.reload()
    refused = ModuleChange("kvm_intel", traced=False, problem="no probe could be attached")
    for _ in range(2):
        assert tracer.follow() == refused
        assert tracer.follow() is None
        assert not tracer.attached
        assert counts(tracer.snapshot()) == {0: 7}
        kernel.now += RETRY_SECONDS
    kernel.refusal = ""
    assert tracer.follow() == ModuleChange("kvm_intel", traced=True)
    kernel.call(times=3)
    assert (counts(tracer.snapshot()), tracer.snapshot().module_unloads) == ({0: 10}, 1)
    tracer.close()
    assert all(engine.closed for engine in kernel.engines)


def test_it_can_be_closed_while_the_module_is_unloaded(kernel: Kernel) -> None:
    kernel.tracer.attach()
    kernel.unload()
    kernel.tracer.follow()
    kernel.tracer.close()
    assert kernel.engines[0].closed


def test_closing_releases_everything_even_if_the_last_reading_fails(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.tracer.attach()

    def fails(_: object) -> Snapshot:
        raise OSError("no")

    monkeypatch.setattr(type(kernel.engines[0]), "snapshot", fails)
    kernel.tracer.close()
    assert kernel.engines[0].closed


def test_a_kernel_without_known_functions_is_an_error(kernel: Kernel) -> None:
    kernel.functions = ("vmx_vcpu_run",)
    message = "^this kernel's kvm_intel has none of the functions that msrtrace knows .*vmx_recalc_intercepts"
    with pytest.raises(MsrtraceError, match=message):
        kernel.tracer.attach()
    with pytest.raises(MsrtraceError, match=r"report its output$"):
        layout_of(Symbols.of([]))
    assert not kernel.tracer.attached


def test_counts_stay_after_closing(kernel: Kernel) -> None:
    kernel.tracer.attach()
    kernel.call(times=7)
    kernel.tracer.close()
    kernel.tracer.close()
    assert kernel.engines[0].closed
    assert counts(kernel.tracer.snapshot()) == {0: 7}
    assert not any(probe.attached for probe in kernel.tracer.snapshot().probes)
    assert not kernel.tracer.follow()


def test_a_reloaded_module_is_another_one(tmp_path: Path) -> None:
    module = tmp_path / "kvm_intel"
    assert loaded_module(tmp_path) is None
    module.mkdir()
    built_in = loaded_module(tmp_path)
    assert built_in is not None
    for state, live in (("coming", False), ("live", True), ("going", False)):
        (module / "initstate").write_text(f"{state}\n")
        assert (loaded_module(tmp_path) is not None) is live
    (module / "initstate").write_text("live\n")
    first = loaded_module(tmp_path)
    assert first == loaded_module(tmp_path)
    module.rename(tmp_path / "old")
    module.mkdir()
    (module / "initstate").write_text("live\n")
    assert loaded_module(tmp_path) not in (None, first)


# --- VMs ---


def test_vms_are_counted_separately(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.call(200, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == ({100: 7, 200: 3}, {100: "web", 200: "db"})
    assert by_vm.engines[0].forgotten == []


def test_vms_are_looked_up_only_by_vm(kernel: Kernel) -> None:
    kernel.tracer.attach()
    kernel.call(100, 7)
    assert (counts(kernel.tracer.snapshot()), kernel.tracer.snapshot().vms) == ({0: 7}, {})


def test_the_counts_of_an_ended_vm_stay_in_the_totals(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.call(200, 3)
    by_vm.tracer.snapshot()
    by_vm.end(100)
    for _ in range(3):
        snapshot = by_vm.tracer.snapshot()
        assert (counts(snapshot), snapshot.vms) == ({0: 7, 200: 3}, {200: "db"})
    assert by_vm.engines[0].forgotten == [{100}]  # once: its entries in the maps are free
    by_vm.call(200, 2)
    assert counts(by_vm.tracer.snapshot()) == {0: 7, 200: 5}


def test_a_vm_that_ended_before_any_snapshot_is_counted(by_vm: Kernel) -> None:
    by_vm.call(300, 5)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == ({0: 5}, {})


def test_vms_keep_their_counts_through_a_reload(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.call(200, 3)
    by_vm.unload()
    by_vm.tracer.follow()
    assert counts(by_vm.tracer.snapshot()) == {100: 7, 200: 3}
    by_vm.load()
    by_vm.tracer.follow()
    by_vm.call(100, 2)
    assert counts(by_vm.tracer.snapshot()) == {100: 9, 200: 3}
    by_vm.end(100)
    for _ in range(3):
        assert counts(by_vm.tracer.snapshot()) == {0: 9, 200: 3}
    assert by_vm.engines[0].forgotten == [{100}]


def test_a_vm_may_end_while_nothing_is_attached(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.unload()
    by_vm.tracer.follow()
    by_vm.end(100)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == ({0: 7}, {})


def test_the_end_of_a_vm_loses_no_other_count(by_vm: Kernel) -> None:
    """Earlier losses and unloads stay the same."""
    by_vm.call(100, 7)
    by_vm.lose(3)
    by_vm.reload()
    by_vm.tracer.follow()
    by_vm.call(100, 1)
    before = by_vm.tracer.snapshot()
    assert (losses(before), before.module_unloads) == ((3,) * 5, 1)
    by_vm.end(100)
    by_vm.tracer.snapshot()
    after = by_vm.tracer.snapshot()
    assert (losses(after), after.module_unloads, counts(after)) == ((3,) * 5, 1, {0: 8})


def test_calls_of_a_vm_just_before_its_end_are_not_lost(by_vm: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the snapshot in which it was gone, and before its entries are freed."""
    by_vm.call(100, 7)
    by_vm.tracer.snapshot()
    by_vm.end(100)
    [engine] = by_vm.engines
    forget = engine.forget

    def late(pids: set[int]) -> None:
        by_vm.call(100, 5)
        forget(pids)
        by_vm.call(100, 3)

    monkeypatch.setattr(engine, "forget", late)
    assert sum(counts(by_vm.tracer.snapshot()).values()) == 15
    monkeypatch.undo()
    assert counts(by_vm.tracer.snapshot()) == {0: 15}


def test_a_reused_pid_has_the_new_name(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.tracer.snapshot()
    by_vm.start(100, "new", started=2000)
    by_vm.tracer.snapshot()  # what it finds was counted before it could know of another VM
    by_vm.call(100, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == ({0: 7, 100: 3}, {100: "new"})


def test_a_reused_pid_does_not_inherit_counts(by_vm: Kernel) -> None:
    """Neither the counts of another VM before a reload, nor those before its end."""
    by_vm.call(100, 7)
    by_vm.reload()
    by_vm.tracer.follow()
    by_vm.tracer.snapshot()
    by_vm.end(100)
    by_vm.tracer.snapshot()
    by_vm.start(100, "new", started=2000)
    by_vm.call(100, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == ({0: 7, 100: 3}, {100: "new"})


# --- a trace with an end: VMs that are gone stay apart ---


@pytest.fixture
def kept(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path, by_vm=True, keep_gone=True)
    kernel.start(100, "web")
    kernel.start(200, "db")
    kernel.tracer.attach()
    return kernel


def test_ended_vms_keep_their_names_in_a_report(kept: Kernel) -> None:
    kept.call(100, 7)
    kept.call(200, 3)
    kept.tracer.snapshot()
    kept.end(100)
    for _ in range(2):
        snapshot = kept.tracer.snapshot()
        assert (counts(snapshot), snapshot.vms) == ({100: 7, 200: 3}, {100: "web", 200: "db"})
    assert kept.engines[0].forgotten == []


def test_a_vm_that_ended_unnamed_has_the_name_of_its_command(kept: Kernel) -> None:
    kept.call(100, 7)
    kept.call(300, 5)
    kept.end(100)
    kept.call(400, 1)
    kept.engines[0].commands = {100: "qemu", 300: "q\x1b[2Jemu"}
    snapshot = kept.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == (
        {100: 7, 300: 5, 400: 1},
        {100: "qemu", 300: "q\N{REPLACEMENT CHARACTER}[2Jemu", 400: ""},
    )


def test_kept_names_survive_a_reload_and_closing(kept: Kernel) -> None:
    kept.call(100, 7)
    kept.tracer.snapshot()
    kept.end(100)
    kept.reload()
    kept.tracer.follow()
    kept.call(200, 3)
    kept.tracer.snapshot()
    kept.tracer.close()
    snapshot = kept.tracer.snapshot()
    assert (counts(snapshot), snapshot.vms) == ({100: 7, 200: 3}, {100: "web", 200: "db"})
    assert counts(snapshot.since(snapshot)) == {}


def test_no_names_are_kept_without_by_vm(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, keep_gone=True)
    kernel.tracer.attach()
    kernel.call(100, 7)
    assert (counts(kernel.tracer.snapshot()), kernel.tracer.snapshot().vms) == ({0: 7}, {})


# --- both, in any order ---


class Life(RuleBasedStateMachine):
    """Whatever happens, each call that probes could see is counted once, for its VM while that lives."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="msrtrace-test-"))
        self.kernel = Kernel(self.directory, by_vm=True)
        self.kernel.tracer.attach()
        self.clock = 0
        self.alive: dict[int, str] = {}
        self.calls: Counter[int] = Counter()  # of those that live; 0: of the dead
        self.lost = self.unloads = 0
        self.traced: int | None = 1

    def teardown(self) -> None:
        self.kernel.tracer.close()
        assert all(engine.closed for engine in self.kernel.engines)
        shutil.rmtree(self.directory)

    @rule(pid=st.sampled_from([100, 200, 300]))
    def start_or_end(self, pid: int) -> None:
        self.clock += 1
        if pid in self.alive:
            del self.alive[pid]
            self.kernel.end(pid)
            self.calls[0] += self.calls.pop(pid, 0)
            self.kernel.tracer.snapshot()  # so that it is seen to be gone before its pid is used again
        else:
            self.alive[pid] = f"vm-{self.clock}"
            self.kernel.start(pid, self.alive[pid], self.clock)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), times=st.integers(1, 5))
    def call(self, data: st.DataObject, times: int) -> None:
        pid = data.draw(st.sampled_from(sorted(self.alive)))
        if seen := self.kernel.call(pid, times):
            self.calls[pid] += seen

    @rule()
    def lose(self) -> None:
        self.lost += self.kernel.lose()

    @rule(functions=st.sampled_from([(), (ENABLE, DISABLE, HOOK), (HOOK,)]))
    def load_or_unload(self, functions: tuple[str, ...]) -> None:
        self.kernel.unload()
        if functions:
            self.kernel.functions = functions
            self.kernel.load()

    @rule(refuse=st.booleans())
    def follow(self, refuse: bool) -> None:
        self.kernel.refusal = "refused" if refuse else ""
        changed = (self.kernel.loaded or None) != self.traced
        self.unloads += changed and self.traced is not None
        if changed and refuse and self.kernel.loaded:
            change = self.kernel.tracer.follow()
            assert change
            assert change.problem == "refused"
            self.traced = None
            self.kernel.now += RETRY_SECONDS
        else:
            assert bool(self.kernel.tracer.follow()) is changed
            self.traced = self.kernel.loaded or None

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        snapshot = self.kernel.tracer.snapshot()
        assert counts(snapshot) == {pid: n for pid, n in self.calls.items() if n}
        assert snapshot.vms == {pid: name for pid, name in self.alive.items() if self.calls[pid]}
        assert losses(snapshot) == (self.lost,) * 5
        assert snapshot.module_unloads == self.unloads
        assert self.kernel.tracer.attached is (self.traced is not None)
        assert [engine.closed for engine in self.kernel.engines[:-1]] == [True] * (len(self.kernel.engines) - 1)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# --- threads ---


@pytest.fixture
def restless() -> Iterator[None]:
    """Switch threads as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_concurrent_scrapes_and_reloads_lose_nothing(by_vm: Kernel) -> None:
    problems: list[BaseException] = []
    scrapes: Counter[int] = Counter()
    stop = threading.Event()

    def scrape(number: int) -> None:
        last = 0
        try:
            while not stop.is_set():
                total = sum(outcome.calls for outcome in by_vm.tracer.snapshot().calls.values())
                assert total >= last
                last = total
                scrapes[number] += 1
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=scrape, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    expected, rounds, end = 0, 0, time.monotonic() + 20
    while not problems and (rounds < 50 or min(scrapes[n] for n in range(3)) < 5) and time.monotonic() < end:
        expected += by_vm.call(100 if rounds % 2 else 200, 3)
        (by_vm.unload if rounds % 3 else by_vm.load)()
        assert bool(by_vm.tracer.follow()) is (rounds % 3 < 2)
        rounds += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert min(scrapes[n] for n in range(3)) >= 5
    assert sum(counts(by_vm.tracer.snapshot()).values()) == expected > 0
