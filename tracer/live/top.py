# SPDX-License-Identifier: GPL-2.0-or-later
"""The content of `msrtrace top`, as plain data: the counts of an interval, or of all time since the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Protocol

from tracer.model import msr
from tracer.model.cause import FILTER_CHANGE
from tracer.model.exit_table import ExitTable
from tracer.model.loss import loss_of
from tracer.model.module_change import Change
from tracer.model.quantity import listed, per_second
from tracer.model.snapshot import Durations, Outcome, Snapshot
from tracer.model.state import State
from tracer.model.vendors import FIRST, vendor_named
from tracer.model.vmm_id import pid_of

SORTS = ("calls", "redundant", "share", "msr", "cause")


@dataclass(frozen=True)
class Row:
    """Calls with the same values in all parts that are not None; `pid` is the VMM (vmm_id.py), 0 for VMs that ended."""

    outcome: Outcome
    pid: int | None = None
    msr: int | None = None
    access: str | None = None
    action: str | None = None
    cause: str | None = None

    @property
    def share(self) -> Fraction | None:
        """The redundant share of the calls; None where that is unknown."""
        if self.outcome.redundant is None or not self.outcome.calls:
            return None
        return Fraction(self.outcome.redundant, self.outcome.calls)


@dataclass(frozen=True)
class Frame:
    """The counts of `seconds`; `whole` if that is all the time since the start. None: not observable.

    `rows` are as detailed as the counts are; `updates`, `recalcs` and `vms` are keyed by the pid of the VMM, as in
    Snapshot.
    """

    seconds: float
    whole: bool
    layout: str
    redundancy: str
    rows: tuple[Row, ...] | None
    updates: Mapping[int, Durations] | None
    recalcs: Mapping[int, Durations] | None = None
    vms: Mapping[int, str] = field(default_factory=dict)
    by_vm: bool = False
    vendor: str = FIRST.name
    traced: bool = True  # whether any probe is attached at the end
    lost: str = ""  # in words
    not_probed: tuple[str, ...] = ()
    exits: ExitTable | None = None  # None: not counted

    @property
    def calls(self) -> Outcome | None:
        """The sum of all calls."""
        return None if self.rows is None else _sum(row.outcome for row in self.rows)

    @property
    def all_updates(self) -> Durations | None:
        """The filter updates of all VMs."""
        return None if self.updates is None else sum(self.updates.values(), Durations())

    @property
    def all_recalcs(self) -> Durations | None:
        """The recalculations of all VMs for other reasons than a new filter."""
        return None if self.recalcs is None else sum(self.recalcs.values(), Durations())

    @property
    def per_update(self) -> tuple[Fraction, Fraction | None] | None:
        """Calls and redundant calls per filter update; None if there was no update, or something was missed."""
        updates = self.all_updates
        if self.rows is None or updates is None or not updates.count or self.lost or self.not_probed:
            return None
        inside = _sum(row.outcome for row in self.rows if row.cause == FILTER_CHANGE)
        known = inside.redundant is not None and self.redundancy == "exact"
        return Fraction(inside.calls, updates.count), Fraction(inside.redundant or 0, updates.count) if known else None

    def rate(self, count: int) -> float | None:
        """The count per second; None if no time has passed."""
        return count / self.seconds if self.seconds > 0 else None

    def amount(self, count: int) -> str:
        """The count if this is all the time since the start, else the count per second."""
        return f"{count:,}" if self.whole else per_second(self.rate(count))

    @property
    def unit(self) -> str:
        """What follows the name of an amount."""
        return "" if self.whole else "/s"

    def figure(self, count: int) -> str:
        """The amount with its unit."""
        return f"{self.amount(count)}{self.unit}"

    def grouped(self, parts: Collection[str], sort: str) -> list[Row]:
        """The rows summed over all but the given parts, sorted by one of SORTS."""
        sums: dict[tuple[object, ...], Outcome] = {}
        names = ("pid", "msr", "access", "action", "cause")
        for row in self.rows or ():
            key = tuple(getattr(row, name) if name in parts else None for name in names)
            sums[key] = sums[key] + row.outcome if key in sums else row.outcome
        rows = [Row(outcome, *key) for key, outcome in sums.items()]  # type: ignore[arg-type]
        return sorted(rows, key=lambda row: _order(row, sort))


def _sum(outcomes: Iterable[Outcome]) -> Outcome:
    return sum(outcomes, Outcome(0, 0, 0, 0, 0))


def _order(row: Row, sort: str) -> tuple[object, ...]:
    """The sort key: the most first, unknown last, and equal ones by MSR and the other parts."""
    share = row.share
    first: dict[str, tuple[object, ...]] = {
        "calls": (),
        "redundant": (row.outcome.redundant is None, -(row.outcome.redundant or 0)),
        "share": (share is None, -(share or 0)),
        "msr": (row.msr or 0, row.access or "", row.action or ""),
        "cause": (row.cause or "",),
    }
    parts = (row.msr or 0, row.access or "", row.action or "", row.cause or "", row.pid or 0)
    return (*first[sort], -row.outcome.calls, *parts)


def lost(counted: Snapshot) -> str:
    """What the snapshot missed, in words; empty if nothing.

    Exits that are still in progress, as the last one of a vCPU that runs may be, are in the next interval.
    """
    parts = loss_of(replace(counted, open_exits=0)).words()
    if counted.module_unloads:
        parts.append(f"{vendor_named(counted.vendor).module} unloaded: {counted.module_unloads:,}")
    return ", ".join(parts)


def frame(counted: Snapshot, seconds: float, *, whole: bool = False, state: State | None = None) -> Frame:
    """The frame of the counts of so many seconds.

    :param whole: these are all since the start
    :param state: what vCPUs intercepted afterwards; None: unknown
    """
    sums: dict[tuple[int, int, str, str, str], Outcome] = {}
    for call, outcome in counted.calls.items():  # summed over callers with the same cause
        key = (call.pid, call.msr, call.access, call.action, call.cause)
        sums[key] = sums[key] + outcome if key in sums else outcome
    probes = counted.probes
    traced = any(p.attached for p in probes) or not probes
    return Frame(
        seconds=seconds,
        whole=whole,
        layout=counted.layout,
        redundancy=counted.redundancy,
        rows=tuple(Row(outcome, *key) for key, outcome in sums.items()) if counted.calls_observable else None,
        updates=dict(counted.updates) if counted.updates_observable else None,
        recalcs=dict(counted.recalcs) if counted.recalcs_observable else None,
        vms={pid: vm.name for pid, vm in counted.vms.items()},
        by_vm=counted.by_vm,
        vendor=counted.vendor,
        traced=traced,
        lost=lost(counted),
        not_probed=tuple(p.function for p in probes if not p.attached) if traced else (),
        exits=None if counted.exits is None else ExitTable(counted.exits, state, counted.by_vm),
    )


def between(later: Snapshot, earlier: Snapshot) -> Snapshot:
    """What was counted between two snapshots, including VMs that ended in between.

    The later snapshot has these under pid 0, with all that ended before; so the earlier one must have them there, too.
    """
    return later.since(earlier.without_vms(earlier.pids - later.vms.keys()))


@dataclass(frozen=True)
class Sample:
    """The last interval and the time since the start, both up to the time of day `at`; `notes` are on failures."""

    at: str
    interval: Frame | None = None
    whole: Frame | None = None
    notes: tuple[str, ...] = ()

    def chosen(self, whole: bool) -> Frame | None:
        """The frame since the start, or that of the interval."""
        return self.whole if whole else self.interval


class Source(Protocol):
    """The part of `Tracer` that this module needs."""

    def snapshot(self) -> Snapshot:
        """The present counts."""

    def follow(self) -> Change | None:
        """Follow a reload of the module."""

    def state(self) -> State | None:
        """What vCPUs intercept now; None if that cannot be read."""

    @property
    def state_problem(self) -> str:
        """Why not, if so."""


class Sampler:
    """Takes snapshots and keeps the newest sample. The first is taken at once, to begin the first interval.

    Where exits are counted, what vCPUs intercept is read, too.
    """

    def __init__(
        self,
        source: Source,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], str] = lambda: time.strftime("%H:%M:%S"),
    ) -> None:
        """Read from `source`; `clock` returns seconds, `wall` the time of day."""
        self._source, self._clock, self._wall = source, clock, wall
        self._started = clock()
        self._last: tuple[float, Snapshot] | None = None
        self._failure = self._state_failure = self._module = ""
        self._sample = Sample(wall())
        self.take()

    @property
    def sample(self) -> Sample:
        """The last sample, with the present notes."""
        notes = (self._failure, self._state_failure, self._module)
        return replace(self._sample, notes=tuple(filter(None, notes)))

    def take(self) -> None:
        """Read the counts. If that fails, the last sample stays, with a note."""
        began = self._clock()
        try:
            now = self._source.snapshot()
        except Exception as error:  # whatever it was, the last sample stays on screen
            self._failure = f"reading failed at {self._wall()}, the numbers are older: {type(error).__name__}: {error}"
            return
        self._failure = ""
        state = self._read_state() if now.exits is not None else None
        interval = None
        if self._last:
            then, before = self._last
            interval = frame(between(now, before), began - then, state=state)
        self._last = (began, now)
        self._sample = Sample(self._wall(), interval, frame(now, began - self._started, whole=True, state=state))

    def _read_state(self) -> State | None:
        """What vCPUs intercept now. If that fails, a note says so: exits are shown without it."""
        try:
            state = self._source.state()
            problem = "" if state is not None else self._source.state_problem
        except Exception as error:
            state, problem = None, str(error) or type(error).__name__
        self._state_failure = f"who intercepts an access is unknown: {problem}" if problem else ""
        return state

    def follow(self) -> None:
        """Follow a reload of the module; a note says so."""
        if change := self._source.follow():
            self._module = f"{change} ({self._wall()})"


def vm_name(shown: Frame, vmm: int) -> str:
    """The pid and name of a VMM."""
    return f"{pid_of(vmm)} {shown.vms.get(vmm, '')}".rstrip() if vmm else "(ended)"


def msr_name(row: Row) -> str:
    """The MSR of a row, in hex where it has no name."""
    return "" if row.msr is None else msr.name(row.msr)


def not_probed_line(shown: Frame) -> str:
    """Which functions are not probed, as a sentence; empty if all are."""
    return f"NOT PROBED: {listed(shown.not_probed)}" if shown.not_probed else ""
