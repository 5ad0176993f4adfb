# SPDX-License-Identifier: GPL-2.0-or-later
"""The states of vCPUs beside the counts: through reloads, with names, and with what the calls said that were seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_kernel import Engine, Kernel

from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.msr_filter import READ, WRITE
from tracer.model.snapshot import Call
from tracer.model.state import State, Vcpu, Vm, Wish, seen_wishes

TSC, SPEC_CTRL = 0x10, 0x48


class Reader:
    """Reads two vCPUs of a process, until it is closed."""

    def __init__(self, symbols: Symbols, pid: int, recorded: tuple[int, ...] = ()) -> None:
        self.symbols, self.pid, self.recorded = symbols, pid, recorded
        self.closed = self.steady = False

    def read(self, *, steady: bool = False) -> State:
        assert not self.closed
        self.steady = steady
        vcpus = tuple(Vcpu(number, b"\xff" * 4096, key=64 + number) for number in (0, 1))
        return State(recorded=self.recorded, vms=(Vm(self.pid, 1, vcpus),))

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Readers:
    """Makes them, unless there is a problem."""

    def __init__(self, pid: int, *, recorded: tuple[int, ...] = ()) -> None:
        self.pid, self.recorded, self.problem = pid, recorded, ""
        self.made: list[Reader] = []

    def __call__(self, symbols: Symbols) -> Reader:
        if self.problem:
            raise MsrtraceError(self.problem)
        self.made.append(Reader(symbols, self.pid, self.recorded))
        return self.made[-1]


@pytest.fixture
def readers() -> Readers:
    return Readers(7)


@pytest.fixture
def host(tmp_path: Path, readers: Readers) -> Kernel:
    """With a process 7 that is called web."""
    kernel = Kernel(tmp_path, states=readers)
    kernel.start(7, "web")
    return kernel


def engine_of(kernel: Kernel) -> Engine:
    return kernel.engines[-1]


def test_it_is_read_with_the_names_of_vms(host: Kernel, readers: Readers) -> None:
    host.tracer.attach()
    state = host.tracer.state(steady=True)
    assert state
    assert [(vm.name, vm.pid, len(vm.vcpus)) for vm in state.vms] == [("web", 7, 2)]
    assert readers.made[0].steady


def test_a_reader_follows_reloads_and_ends_with_the_trace(host: Kernel, readers: Readers) -> None:
    host.tracer.attach()
    host.unload()
    host.tracer.follow()
    state = host.tracer.state()
    assert state is not None
    assert not state.vms  # without the module there is no vCPU
    assert readers.made[0].closed
    host.load()
    host.tracer.follow()
    assert host.tracer.state()
    host.tracer.close()
    assert [reader.closed for reader in readers.made] == [True, True]


def test_what_cannot_be_read_keeps_nothing_from_being_counted(host: Kernel, readers: Readers) -> None:
    readers.problem = "no BTF"
    host.tracer.attach()
    assert host.tracer.state() is None
    assert host.tracer.state_problem == "no BTF"
    assert host.call(times=3) == 3
    readers.problem = ""
    host.reload()
    host.tracer.follow()
    assert host.tracer.state()
    assert not host.tracer.state_problem


def test_without_a_reader_there_is_none(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.tracer.attach()
    assert kernel.tracer.state() is None


@pytest.mark.parametrize(("recorded", "known"), [((), True), ((TSC,), False)])
def test_where_nothing_is_recorded_the_calls_that_were_seen_tell(
    tmp_path: Path, recorded: tuple[int, ...], known: bool
) -> None:
    kernel = Kernel(tmp_path, states=Readers(7, recorded=recorded))
    kernel.start(7, "web")
    kernel.tracer.attach()
    kernel.call(times=1)  # a disable for reads of the TSC
    engine_of(kernel).seen = {64}
    state = kernel.tracer.state()
    assert state
    first, second = state.vms[0].vcpus
    assert first.seen == ({(TSC, READ, Wish.PASS)} if known else set())
    assert bool(state.notes) == known
    assert second.seen == set()  # whose calls were before the trace


def call(msr: int, access: str, action: str, pid: int = 0) -> Call:
    return Call(msr, access, action, "recalc", "vmx_recalc_intercepts", pid)


def test_what_calls_say_counts_where_they_agree() -> None:
    calls = [
        call(TSC, "read", "disable", 7),
        call(SPEC_CTRL, "read_write", "enable", 7),
        call(SPEC_CTRL, "write", "disable", 8),
        call(0x49, "write", "enable", 8),
    ]
    assert seen_wishes(calls) == {
        (TSC, READ, Wish.PASS),
        (SPEC_CTRL, READ, Wish.INTERCEPT),
        (0x49, WRITE, Wish.INTERCEPT),
    }
    assert seen_wishes(calls, 8) == {(SPEC_CTRL, WRITE, Wish.PASS), (0x49, WRITE, Wish.INTERCEPT)}
