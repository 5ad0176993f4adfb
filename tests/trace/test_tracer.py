# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracing that goes on: reloads of the module, and scrapes meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from made_kernel import DISABLE, ENABLE, HOOK, TSC, Kernel, counts, losses, names

from tracer.kernel.layout import layout_of
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.module_change import RETRY_SECONDS, ModuleChange, ProbesSwitched
from tracer.model.snapshot import Durations, Outcome, Snapshot
from tracer.model.vendors import VENDORS
from tracer.trace.tracer import loaded_module


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


def test_probes_that_are_switched_off_make_a_lower_bound(kernel: Kernel) -> None:
    tracer = kernel.tracer
    tracer.attach()
    kernel.call(times=7)
    before = tracer.snapshot()
    kernel.probes_on = False
    assert kernel.call(times=5) == 0
    kernel.now += 1
    assert isinstance(tracer.follow(), ProbesSwitched)
    assert not tracer.follow()
    kernel.probes_on = True
    kernel.now += 2
    assert tracer.follow() == ProbesSwitched(seconds=3)
    kernel.call(times=2)
    later = tracer.snapshot()
    assert (counts(later), later.blind_seconds, later.lower_bound) == ({0: 9}, 3, True)
    assert (later.since(before).blind_seconds, later.since(later).lower_bound) == (3, False)
    kernel.reload()
    tracer.follow()
    assert tracer.snapshot().blind_seconds == 3


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


def test_a_module_that_goes_while_it_is_looked_at_is_no_other_kernel(kernel: Kernel) -> None:
    """Its symbols may be gone by then: that is an unload, and what comes next is tried at once."""
    tracer, read = kernel.tracer, kernel.tracer._read_symbols
    tracer.attach()
    kernel.call(times=7)

    def go() -> Symbols:
        kernel.unload()
        raise MsrtraceError("this kernel has none of the functions that msrtrace knows")

    tracer._read_symbols = go
    kernel.reload()
    assert tracer.follow() == ModuleChange("kvm_intel", traced=False)
    tracer._read_symbols = read
    kernel.load()
    assert tracer.follow() == ModuleChange("kvm_intel", traced=True)
    kernel.call(times=3)
    assert counts(tracer.snapshot()) == {0: 10}


def test_symbols_are_those_of_the_module_that_is_attached_to(kernel: Kernel) -> None:
    """Else what was attached would be taken for another's, and taken away again: calls in that time would be lost."""
    tracer, read = kernel.tracer, kernel.tracer._read_symbols
    reads = list[int]()

    def reload_twice() -> Symbols:
        reads.append(kernel.loaded)
        if len(reads) < 3:
            kernel.reload()
        return read()

    tracer.attach()
    tracer._read_symbols = reload_twice
    kernel.reload()
    assert tracer.follow() == ModuleChange("kvm_intel", traced=True)
    assert reads == [2, 3, 4]
    kernel.call(times=3)
    assert tracer.follow() is None
    assert counts(tracer.snapshot()) == {0: 3}


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


@pytest.mark.parametrize("reason", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_a_module_that_cannot_be_looked_at_is_not_gone(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    (tmp_path / "kvm_intel").mkdir()
    (tmp_path / "kvm_intel/initstate").write_text("live\n")

    def failing(*_: object, **__: object) -> str:
        raise OSError(reason, os.strerror(reason))

    kernel.tracer.attach()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(MsrtraceError, match=f"whether kvm_intel is loaded cannot be told: {os.strerror(reason)}"):
            loaded_module(tmp_path)
        patch.setattr(kernel.tracer._following, "module", lambda: loaded_module(tmp_path))
        assert kernel.tracer.follow() is None
    assert kernel.tracer.attached
    assert kernel.tracer.follow() is None


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
        assert names(snapshot) == {pid: name for pid, name in self.alive.items() if self.calls[pid]}
        assert losses(snapshot) == (self.lost,) * 5
        assert snapshot.module_unloads == self.unloads
        assert self.kernel.tracer.attached is (self.traced is not None)
        assert [engine.closed for engine in self.kernel.engines[:-1]] == [True] * (len(self.kernel.engines) - 1)


TestLife = Life.TestCase


TestLife.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


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


def test_a_module_that_was_loaded_comes_before_one_that_is_built_in(tmp_path: Path) -> None:
    for vendor in VENDORS:
        (tmp_path / vendor.module).mkdir()
    assert (loaded_module(tmp_path) or ("",))[0] in {vendor.module for vendor in VENDORS}
    for vendor in VENDORS:
        (tmp_path / vendor.module / "initstate").write_text("live\n")
        assert (loaded_module(tmp_path) or ("",))[0] == vendor.module
        (tmp_path / vendor.module / "initstate").unlink()
