# SPDX-License-Identifier: GPL-2.0-or-later
"""What was read last of each VM during a trace, so that exits of VMs that end before it does can be explained."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from tracer.model.state import State, Vm

#: Reading takes at most one in so many seconds.
_SHARE = 20
#: Of VMs that are gone: a state has a bitmap of 4 KiB for each vCPU.
_MOST = 1000


class Source(Protocol):
    """The part of `Tracer` that this module needs."""

    def state(self, *, steady: bool = False) -> State | None:
        """What every vCPU intercepts now; None if that cannot be read."""


class LastStates:
    """The VMs that were seen since it was made."""

    def __init__(self, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads nothing yet; `clock` returns seconds."""
        self._source, self._clock = source, clock
        self._seen: dict[tuple[int, int], Vm] = {}
        self._due = 0.0

    def look(self) -> None:
        """Read what vCPUs intercept now, unless that was done just now. A failure leaves what was read before."""
        began = self._clock()
        if began < self._due:
            return
        with suppress(Exception):
            if now := self._source.state():
                self._see(now)
        ended = self._clock()
        self._due = ended + _SHARE * (ended - began)

    def _see(self, now: State) -> None:
        for vm in now.vms:
            self._seen.pop((vm.pid, vm.key), None)  # the newest are last
            self._seen[vm.pid, vm.key] = vm
        for old in list(self._seen)[: max(0, len(self._seen) - len(now.vms) - _MOST)]:
            del self._seen[old]

    def with_gone(self, now: State) -> State:
        """The state, together with the VMs that are gone, as they were read last."""
        there = {(vm.pid, vm.key) for vm in now.vms}
        return replace(now, vms=(*now.vms, *(vm for key, vm in self._seen.items() if key not in there)))
