# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs that end during a trace are remembered as they were read last."""

from __future__ import annotations

import pytest
from made_vms import FS_BASE, denies, state, vcpu, vm

from tracer.model.state import State
from tracer.trace import last_states
from tracer.trace.last_states import LastStates

OPEN, FILTERED = vm("web", 1), vm("web", 1, vcpu(0, denies(FS_BASE)))
OTHER, THIRD = vm("db", 2), vm("log", 3)


class Source:
    """Readings, each of which takes some seconds."""

    def __init__(self, *readings: State | Exception | None, takes: float = 0.0) -> None:
        self.readings, self.takes, self.now = list(readings), takes, 100.0

    def state(self, *, steady: bool = False) -> State | None:
        assert not steady  # that takes long
        self.now += self.takes
        reading = self.readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading

    def last(self) -> LastStates:
        return LastStates(self, lambda: self.now)


def test_vms_that_are_gone_are_as_they_were_read_last() -> None:
    source = Source(state(OPEN, OTHER), state(FILTERED, OTHER), state(OTHER))
    last = source.last()
    for _ in range(3):
        last.look()
    assert last.with_gone(state(OTHER, THIRD)).vms == (OTHER, THIRD, FILTERED)
    assert last.with_gone(state(OPEN, notes=("why",))) == state(OPEN, OTHER, notes=("why",))


def test_failures_leave_what_was_read_before() -> None:
    source = Source(state(OPEN), OSError("no"), None, state(OTHER))
    last = source.last()
    for _ in range(4):
        last.look()
    assert last.with_gone(state()).vms == (OPEN, OTHER)


def test_reading_takes_little_of_the_time() -> None:
    source = Source(*[state(OPEN)] * 100, takes=0.25)
    last = source.last()
    for _ in range(1000):
        last.look()
        source.now += 0.05
    assert len(source.readings) == 100 - 10  # 50 seconds, in each five of which a quarter of one is for reading


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_states, "_MOST", 2)
    vms = [vm("x", pid) for pid in range(1, 6)]
    source = Source(*(state(one) for one in vms), state(vms[0], vms[1]))
    last = source.last()
    for _ in range(5):
        last.look()
    assert [one.pid for one in last.with_gone(state(vms[4])).vms] == [5, 3, 4]
    last.look()
    assert [one.pid for one in last.with_gone(state()).vms] == [4, 5, 1, 2]
