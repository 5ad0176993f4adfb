# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine: what it attaches, what it says, and its maps, filled by hand."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from known import KnownBtf, symbols
from kvm_standin import BOTH, CREATE, DISABLE, ENABLE, FREE, HOOK, READ, RECALC, TABLES, TOGGLE, WRITE

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.livepatch import Livepatch
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import Options
from tracer.model.snapshot import Call, Durations, Map, Outcome, Probe
from tracer.model.vendor import VCPU_CREATED
from tracer.trace.engine import Engine, expected_backends
from tracer.trace.plan import preemptible, values, variants
from tracer.trace.probes import Probes
from tracer.trace.reader import Reader


class Probing:
    """Attaching and detaching are the kernel's; here a probe is an open file, and some are REFUSED."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: set[str] = set()
        self.reason = errno.ENOENT
        self.held = Counter[str]()
        self._of: dict[int, str] = {}
        monkeypatch.setattr(Probes, "_link", lambda _, symbol, symbols, program, at_return: self.link(symbol.name))
        monkeypatch.setattr(Btf, "of_module", lambda *_: KnownBtf())
        close = os.close

        def closing(fd: int) -> None:
            if fd in self._of:
                self.held[self._of.pop(fd)] -= 1
            close(fd)

        monkeypatch.setattr("tracer.trace.probes.os.close", closing)

    def link(self, symbol: str) -> int:
        if symbol in self.refused:
            raise OSError(self.reason, "refused")
        fd = os.open("/dev/null", os.O_RDONLY)
        self._of[fd] = symbol
        self.held[symbol] += 1
        return fd


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> Probing:
    return Probing(monkeypatch)


def write(engine: Engine, array: str, index: int, **members: int | Sequence[int]) -> None:
    """Fill a place of ARRAY, and say that it is taken; `outcome` and `call` are left out of the names of members."""
    there = engine._reader._arrays[array]
    for name, value in members.items():
        size, at = there._place(index, next(whole for whole in there.members if whole.rpartition(".")[2] == name))
        for n, one in enumerate([value] if isinstance(value, int) else value):
            there._views[size][at + n] = one
    if array in TABLES:
        engine._built.loaded.maps["taken"].update(struct.pack("II", index, TABLES.index(array)), b"\1")
        engine._reader._taken.forget()


def what(msr: int, type_: int, enables: int, within: int) -> dict[str, int]:
    """The members of struct call."""
    return {"msr": msr, "type": type_, "enables": enables, "within": within, "state": 1}


def put(engine: Engine, **counts: int) -> None:
    for name, value in counts.items():
        engine._reader._arrays["counts"].set(0, name, value)


IN_HOOK, IN_CREATE, OUTSIDE = 0x1010, 0x13FF, 0x0FFF


NO_UPDATE, FILTER_CHANGE, RECOMPUTED = 0, 1, 2


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TOGGLE, symbols(TOGGLE), Options(by_vm=True, backend="kprobe"))
    try:
        assert engine.warnings == []
        for index, (caller, pid, made, counted) in enumerate(
            (
                (IN_CREATE, 100, what(0x10, READ, 0, NO_UPDATE), {"changed": 6, "changed_read": 6, "redundant": 1}),
                (IN_CREATE - 16, 100, what(0x10, READ, 0, NO_UPDATE), {"redundant": 2}),
                (
                    IN_HOOK,
                    100,
                    what(0xC0000100, BOTH, 0, FILTER_CHANGE),
                    {"changed": 3, "redundant": 2, "changed_write": 3, "refused": 4},
                ),
                (IN_HOOK, 200, what(0x48, WRITE, WRITE, FILTER_CHANGE), {"redundant": 2, "unknown": 1}),
                (OUTSIDE, 200, what(0x48, WRITE, WRITE, NO_UPDATE), {"redundant": 1}),
                (OUTSIDE, 200, what(0x49, WRITE, WRITE, NO_UPDATE), {}),  # a place alone
                (IN_HOOK, 0, what(0x48, READ, 0, FILTER_CHANGE), {"redundant": 4}),  # of those that ended
            )
        ):
            site = caller if caller != IN_HOOK else 0
            write(engine, "counters", 5 + index, caller=caller, site=site, vmm=pid, **made, **counted)
        buckets = [0, 2, 1, *[0] * 22, 1, *[0] * 5, 1]
        write(engine, "updates", 7, count=5, nanoseconds=2_500_000_000, buckets=buckets, vmm=100, kind=FILTER_CHANGE)
        write(engine, "updates", 9, count=1, nanoseconds=500_000_000, vmm=200, kind=RECOMPUTED)
        write(engine, "updates", 10, vmm=300, kind=NO_UPDATE)  # free again
        write(engine, "vcpus", 3, vcpu=0xFFFF)
        write(engine, "vmms", 17, id=200, command=b"qemu-system-x86\0")
        losses = {"dropped_calls": 1, "dropped_vcpus": 2, "dropped_updates": 3}
        losses |= {"unpaired_update": 6, "unpaired_return": 7, "read_failed": 8}
        put(engine, **losses, vcpus_seen=9, vmms_seen=4)
        taken = engine.snapshot()
        assert taken.calls == {
            Call(0x10, "read", "disable", "vcpu_create", CREATE, 100): Outcome(9, 3, 6, 0, 0),
            Call(0xC0000100, "read_write", "disable", "filter_change", HOOK, 100): Outcome(5, 2, 0, 3, 4),
            Call(0x48, "write", "enable", "filter_change", HOOK, 200): Outcome(3, 2, 0, 0, 0),
            Call(0x48, "write", "enable", "other", "0xfff", 200): Outcome(1, 1, 0, 0, 0),
            Call(0x48, "read", "disable", "filter_change", HOOK, 0): Outcome(4, 4, 0, 0, 0),
        }
        assert taken.updates == {100: Durations(5, 2.5, (2, 1, *[0] * 22, 2))}
        assert taken.recalcs == {200: Durations(1, 0.5, (0,) * 25)}
        assert [(probe.function, probe.missed) for probe in taken.probes] == [
            (HOOK, 6),
            (CREATE, 0),
            (VCPU_CREATED, 0),
            (FREE, 0),
            (TOGGLE.writers[0], 0),
            (ENABLE, 0),
            (DISABLE, 0),
        ]
        assert taken.maps == (Map("calls", 7, 65536, 1), Map("vcpus", 1, 16384, 2), Map("updates", 2, 4096, 3))
        assert taken.commands == {200: "qemu-system-x86"}
        assert (taken.unpaired_returns, taken.read_failures) == (7, 8)
        assert (taken.vcpus_seen, taken.vmms_seen, taken.open_calls) == (9, 4, 0)
        assert (taken.layout, taken.redundancy, taken.by_vm, taken.lower_bound) == ("toggle", "exact", True, True)
        assert taken.backend == "kprobe"

        engine.forget({100})
        left = engine.snapshot()
        assert left.calls == taken.without_vms({100}).calls
        assert (left.updates, list(left.recalcs), left.vcpus_seen) == ({0: taken.updates[100]}, [200], 9)
        assert left.commands == {200: "qemu-system-x86"}
        # The one with an open call stays as it is until that is counted.
        write(engine, "vcpus", 3, seq=1, vmm=200)
        monkeypatch.setattr(Reader, "_still_open", lambda _, program, indices: indices)
        engine.forget({200})
        assert engine.snapshot().calls == left.calls
        write(engine, "vcpus", 3, seq=2)
        engine.forget({200})
        gone = engine.snapshot()
        assert gone.calls == taken.without_vms({100, 200}).calls
        assert ({0}, {}) == (gone.recalcs.keys() | gone.updates.keys() | {c.pid for c in gone.calls}, gone.commands)
        assert (
            gone.maps[0].entries == 7
        )  # six kinds of ended processes, and one that was put where it is not looked for

        functions = engine._built.loaded.functions
        engine.detach()
        assert engine.reattach(TOGGLE, symbols(TOGGLE, TOGGLE.writers[0]))
        fresh_snapshot = engine.snapshot()
        assert (fresh_snapshot.calls, fresh_snapshot.updates, fresh_snapshot.recalcs) == ({}, {}, {})
        assert (fresh_snapshot.vcpus_seen, fresh_snapshot.lower_bound) == (0, False)
        assert fresh_snapshot.maps == (Map("calls", 0, 65536), Map("vcpus", 0, 16384), Map("updates", 0, 4096))
        assert engine._built.loaded.maps["taken"].keys() == []
        assert not engine.reattach(RECALC, symbols(RECALC))
        assert engine._built.loaded.functions is functions
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine_without_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Btf:
        raise BtfError("/sys/kernel/btf/kvm_intel: No such file or directory")

    monkeypatch.setattr(Btf, "of_module", missing)
    assert RECALC.filter_set
    engine = Engine(RECALC, symbols(RECALC, RECALC.filter_set), Options())
    try:
        assert engine.warnings == [
            f"{RECALC.filter_set} is not probed: no such function in this kernel",
            "filter updates cannot be told from other recalculations, so they are not counted",
            "which calls are redundant is unknown: /sys/kernel/btf/kvm_intel: No such file or directory",
            "creations of vCPUs cannot be followed, so they are not counted",
        ]
        write(engine, "counters", 3, caller=0x1010, **what(0x10, READ, 0, RECOMPUTED), unknown=7)
        taken = engine.snapshot()
        assert taken.calls == {Call(0x10, "read", "disable", "recalc", RECALC.update): Outcome(7)}
        assert (taken.redundancy, taken.calls_observable, taken.updates_observable) == ("unknown", True, False)
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine_beside_a_livepatch() -> None:
    """Its copies are not probed, and what they call is of the function that they replace, or of none."""
    replaced = frozenset({("kvm_intel", HOOK), ("kvm_intel", DISABLE), ("kvm_intel", CREATE)})
    copies = [Symbol(0x9000 + 0x100 * n, name, "kpatch_x") for n, name in enumerate((HOOK, DISABLE, CREATE, "helper"))]
    there = Symbols.of(symbols(TOGGLE).functions, others=copies, bounds=[0x9400])
    engine = Engine(TOGGLE, replace(there, livepatches=(Livepatch("kpatch_x", True, replaced),)), Options(by_vm=True))
    try:
        assert engine.backend == "kprobe"
        assert [probe.detail for probe in engine.probes if probe.function == HOOK] == [
            f"{HOOK} [kvm_intel], not on {HOOK} [kpatch_x]"
        ]
        assert engine.warnings == [
            f"calls that kpatch_x may make to its own {DISABLE} are not counted (it has {HOOK}, {CREATE}, too)"
        ]
        for index, caller in enumerate((0x9210, 0x9310, 0x9410)):
            made = what(0x10, READ, 0, NO_UPDATE)
            write(engine, "counters", index, caller=caller, site=caller, vmm=7, **made, redundant=1)
        taken = engine.snapshot()
        assert (list(taken.uncounted), taken.lower_bound) == (engine.warnings, True)
        assert {(call.cause, call.caller) for call in taken.calls} == {
            ("vcpu_create", f"{CREATE} [kpatch_x]"),
            ("other", "helper [kpatch_x]"),
            ("other", "0x9410"),
        }
    finally:
        engine.close()
    with pytest.raises(MsrtraceError, match=r"have functions that are probed: .*kpatch_x.*; --backend kprobe can"):
        Engine(TOGGLE, there, Options(backend="fentry"))


@pytest.mark.usefixtures("headers", "no_probes")
def test_runs_that_were_skipped_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """bpf_prog->stats.misses goes on counting while the program stays loaded."""
    misses = {"update_entered": 2, "update_returned": 1, "writer_entered": 4, "disable_entered": 8}
    monkeypatch.setattr(Probes, "_misses", lambda _, program: misses.get(program, 0))
    there = Symbols.of(
        Symbol(0x100 * n, name, "kvm_intel")
        for n, name in enumerate((HOOK, CREATE, VCPU_CREATED, FREE, ENABLE, DISABLE, *TOGGLE.inlined_into))
    )
    engine = Engine(TOGGLE, there, Options())
    one, other = TOGGLE.inlined_into
    try:
        missed = {probe.function: probe.missed for probe in engine.snapshot().probes}
        assert missed == {HOOK: 3, CREATE: 0, VCPU_CREATED: 0, FREE: 0, one: 4, other: 0, ENABLE: 0, DISABLE: 8}
        engine.detach()
        assert engine.reattach(TOGGLE, there)
        misses["disable_entered"] = 13
        again = {probe.function: probe.missed for probe in engine.snapshot().probes}
        assert again == {HOOK: 0, CREATE: 0, VCPU_CREATED: 0, FREE: 0, one: 0, other: 0, ENABLE: 0, DISABLE: 5}
    finally:
        engine.close()


@pytest.mark.usefixtures("headers")
def test_updates_are_not_claimed_to_be_seen_without_the_probe_that_tells_them_apart(no_probes: Probing) -> None:
    assert RECALC.filter_set
    no_probes.refused = {RECALC.filter_set}
    engine = Engine(RECALC, symbols(RECALC), Options(backend="kprobe"))
    try:
        assert not engine.snapshot().updates_observable
    finally:
        engine.close()


@pytest.mark.usefixtures("headers")
@pytest.mark.parametrize("refused", ["", CREATE, VCPU_CREATED, str(RECALC.filter_set)])
def test_creations_are_followed_only_from_beginning_to_end(no_probes: Probing, refused: str) -> None:
    no_probes.refused = {refused}
    engine = Engine(RECALC, symbols(RECALC), Options(backend="kprobe"))
    try:
        for attached in (False, True):
            followed = engine._reader._arrays["counts"].get(0, "follow_creations")
            assert followed == engine.snapshot().creations_observable == (not refused)
            assert ("creations of vCPUs cannot be followed, so they are not counted" in engine.warnings) == bool(
                refused
            )
            if not attached:
                engine.detach()
                assert engine.reattach(RECALC, symbols(RECALC))
    finally:
        engine.close()


@pytest.mark.usefixtures("headers")
def test_a_reattachment_that_fails_leaves_no_probe(no_probes: Probing) -> None:
    engine = Engine(TOGGLE, symbols(TOGGLE), Options(backend="kprobe"))
    try:
        held = {HOOK: 2, CREATE: 1, VCPU_CREATED: 1, FREE: 1, TOGGLE.writers[0]: 1, ENABLE: 1, DISABLE: 1}
        assert +no_probes.held == held
        engine.detach()
        assert not +no_probes.held
        no_probes.refused = {HOOK, ENABLE, DISABLE}
        with pytest.raises(MsrtraceError, match="no probe could be attached"):
            engine.reattach(TOGGLE, symbols(TOGGLE))
        assert not +no_probes.held  # or it would be there twice after the next attempt
    finally:
        engine.close()


@pytest.mark.usefixtures("headers")
@pytest.mark.parametrize("reason", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_is_no_missing_probe(no_probes: Probing, reason: int) -> None:
    """Without descriptors for all probes, counts would be of the few that are attached."""
    no_probes.refused, no_probes.reason = {DISABLE}, reason
    with pytest.raises(MsrtraceError, match=f"{DISABLE}.* is not probed: .*(limit on open files|too many|memory)"):
        Engine(TOGGLE, symbols(TOGGLE), Options(backend="kprobe"))
    assert not +no_probes.held


@pytest.mark.parametrize(
    ("version", "model", "may"),
    [
        ("#1 SMP Debian 4.19", None, False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1", "none (voluntary) full lazy \n", False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.1.1", "(none) voluntary full \n", False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 7.2.13-1", "full (lazy) \n", True),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1", None, True),
        ("#1 SMP PREEMPT_RT Debian 6.12", None, True),
    ],
)
def test_where_programs_at_fentry_may_be_preempted(version: str, model: str | None, may: bool, tmp_path: Path) -> None:
    if model:
        (tmp_path / "preempt").write_text(model)
    assert preemptible(tmp_path / "preempt", version) == may


@pytest.mark.usefixtures("headers", "no_probes")
def test_where_fentry_is_refused_kprobes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no kvm_intel, so the kernel has no BTF of it."""
    monkeypatch.setattr("tracer.trace.plan.preemptible", lambda: False)
    engine = Engine(TOGGLE, symbols(TOGGLE), Options(backend="auto"))
    try:
        assert engine.snapshot().backend == "kprobe"
        assert engine._built.passed_over == ("the kernel gives no BTF of kvm_intel: No such file or directory",)
    finally:
        engine.close()
    with pytest.raises(MsrtraceError, match="the kernel gives no BTF of kvm_intel"):
        Engine(TOGGLE, symbols(TOGGLE), Options(backend="fentry"))


def test_fentry_has_a_program_for_each_function_that_writes_without_a_call() -> None:
    """Also where the one was inlined into two."""
    callers = symbols(TOGGLE, TOGGLE.writers[0]).functions
    inlined = Symbols.of([*callers, *(Symbol(0x9000, name, "kvm_intel") for name in TOGGLE.inlined_into)])
    options = Options(backend="fentry")
    found = variants(TOGGLE, inlined, values(TOGGLE, KnownBtf(), inlined, options), options, KnownBtf())
    assert {"writer_entered", "other_writer_entered"} <= found[0].functions.keys()


def test_the_backends_of_a_trace_are_known_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def backends(backend: str) -> tuple[str, ...]:
        return expected_backends(symbols(TOGGLE), Options(backend=backend))

    monkeypatch.setattr(Btf, "of_module", _no_btf)
    assert (backends("auto"), backends("kprobe")) == (("kprobe",), ("kprobe",))
    with pytest.raises(MsrtraceError, match="the backend fentry cannot be used here"):
        backends("fentry")


def _no_btf(*_: object) -> Btf:
    raise BtfError("there is none")


@pytest.mark.usefixtures("headers")
def test_where_exits_cannot_be_counted_nothing_stays_attached(
    no_probes: Probing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it attaches again, too."""

    class Exits:
        refused = False

        def __init__(self, *_: object) -> None:
            pass

        def fits(self, _: Symbols) -> bool:
            return True

        def attach(self, _: Symbols) -> list[Probe]:
            if self.refused:
                raise MsrtraceError("exits cannot be counted")
            return []

        def detach(self) -> None:
            pass

        close = detach

    monkeypatch.setattr("tracer.trace.engine.ExitCounter", Exits)
    there = symbols(TOGGLE, TOGGLE.writers[0])
    engine = Engine(TOGGLE, there, Options(backend="kprobe", exits=True))
    try:
        assert +no_probes.held
        engine.detach()
        Exits.refused = True
        with pytest.raises(MsrtraceError, match="exits cannot be counted"):
            engine.reattach(TOGGLE, there)
        assert not +no_probes.held
    finally:
        engine.close()
    with pytest.raises(MsrtraceError, match="exits cannot be counted"):
        Engine(TOGGLE, there, Options(backend="kprobe", exits=True))
    assert not +no_probes.held
