# SPDX-License-Identifier: GPL-2.0-or-later
"""Any fleet: the totals are exactly what its hosts made, or it is refused with the name of a label or a series."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from fleets import CALLS, REDUNDANT, START, UPDATES, InMemory, Stored
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.fleet import compared

NOW = 1_700_000_000.0
WINDOW, INTERVAL, TICKS = 600, 15.0, 12
FIRST_SCRAPE = NOW - TICKS * INTERVAL
KINDS = ("0x10", "0x48", "0x174")
#: Stores a sample: metric, labels of the target, labels of its own, time, value.
Put = Callable[[str, Mapping[str, str], Mapping[str, str], float, float], None]
EXAMPLES = int(os.environ.get("MSRTRACE_EXAMPLES", "300"))


@dataclass(frozen=True)
class Scrape:
    """What a process exports: counts of calls by MSR, and of filter updates."""

    calls: Mapping[str, int]
    updates: int


@dataclass
class Run:
    """A process of a host: its start time, whether it runs --by-vm, and what each tick added to its counts."""

    start: float
    by_vm: bool
    before: int  # updates made before the first tick
    made: list[int]  # updates in each tick
    since: int  # the first tick of it
    kinds_from: Mapping[str, int]  # the tick from which an update makes a call of that kind

    def at(self, tick: int) -> Scrape:
        """Its counts at the end of the tick."""
        counted = {kind: self.before if first < 0 else 0 for kind, first in self.kinds_from.items()}
        for number in range(self.since, tick + 1):
            for kind, first in self.kinds_from.items():
                counted[kind] += self.made[number] if number >= first else 0
        return Scrape(
            {kind: count for kind, count in counted.items() if count},
            self.before + sum(self.made[self.since : tick + 1]),
        )


@dataclass
class Host:
    """A host of a fleet, and how it is scraped."""

    target: dict[str, str]
    patch: str
    runs: list[Run]
    copies: list[dict[str, str]]  # the additional labels of each copy
    federated: bool  # a federating server stores it, too, under its own labels
    relabel: tuple[int, int, dict[str, str], dict[str, str]] | None  # between two ticks; labels outside, and inside
    pods: bool  # a restart changes the label `pod`
    seen: list[list[bool]]  # by copy: in which ticks a scrape succeeds
    late: list[float]  # by tick: seconds that scrapes are late
    start_stored: bool
    collides: bool = False  # its target has a label `name`
    scraped: dict[int, set[int]] = field(default_factory=dict)  # the ticks in which a run was scraped, by its number

    def run_at(self, tick: int) -> int:
        """The number of the process that runs at the end of the tick."""
        return max(number for number, run in enumerate(self.runs) if run.since <= tick)

    def labels(self, tick: int, copy: int) -> dict[str, str]:
        """The labels of its target, in the given copy."""
        labels = {**self.target, **self.copies[copy], "patch": self.patch}
        if self.relabel:
            since, until, outside, inside = self.relabel
            labels |= inside if since <= tick < until else outside
        if self.pods:
            labels["pod"] = f"msrtrace-{self.run_at(tick)}"
        if self.collides:
            labels["name"] = "mine"
        return labels

    def store(self, stored: Stored) -> None:
        """Add its scrapes to the stored series."""
        series: dict[tuple[str, tuple[tuple[str, str], ...]], dict[float, float]] = {}

        def put(metric: str, labels: Mapping[str, str], own: Mapping[str, str], time: float, value: float) -> None:
            renamed = {f"exported_{name}" if name in labels else name: it for name, it in own.items()}
            series.setdefault((metric, tuple(sorted({**labels, **renamed}.items()))), {})[time] = value

        for copy in range(len(self.copies)):
            for tick in range(TICKS):
                if self.seen[copy][tick]:
                    number = self.run_at(tick)
                    self.scraped.setdefault(number, set()).add(tick)
                    time = FIRST_SCRAPE + (tick + 1) * INTERVAL - 8 + self.late[tick] + 0.37 * copy
                    labels = self.labels(tick, copy)
                    self.show(self.runs[number], tick, labels, time, put)
                    if self.federated:
                        above = {"job": "federate", "instance": "prom:9090"}
                        above |= {f"exported_{n}" if n in ("job", "instance") else n: v for n, v in labels.items()}
                        self.show(self.runs[number], tick, above, time, put)
        for (metric, named), samples in series.items():
            stored.setdefault(metric, []).append((dict(named), samples))

    def show(self, run: Run, tick: int, labels: Mapping[str, str], time: float, put: Put) -> None:
        """One scrape of a run."""
        shown = run.at(tick)
        info = {"layout": "toggle", "redundancy": "exact", "kernel": "6.1", "version": "1", "backend": "kprobe"}
        put("msrtrace_build_info", labels, info, time, 1)
        if self.start_stored:
            put(START, labels, {}, time, run.start)
        put("msrtrace_unpaired_returns_total", labels, {}, time, 0)
        prefix = "msrtrace_host_" if run.by_vm else "msrtrace_"
        put(UPDATES.replace("msrtrace_", prefix), labels, {}, time, shown.updates)
        for kind, count in shown.calls.items():
            own = {"msr": kind, "name": "?", "access": "read", "action": "disable", "cause": "filter_change"}
            for metric in (CALLS, REDUNDANT):
                put(metric.replace("msrtrace_", prefix), labels, own, time, count)
                if run.by_vm and tick < TICKS // 2:
                    put(metric, labels, {**own, "vm": "x", "pid": "1"}, time, count // 2)

    def made(self) -> tuple[int, int]:
        """The calls and updates that it made in the window, as far as the scrapes show.

        Where its start is not stored, its first process counts from its first scrape on (and a warning says so).
        """
        calls = updates = 0
        for number, ticks in self.scraped.items():
            run = self.runs[number]
            last, first = run.at(max(ticks)), run.at(min(ticks))
            from_zero = run.start > NOW - WINDOW if self.start_stored else number > min(self.scraped)
            calls += sum(last.calls.values()) - (0 if from_zero else sum(first.calls.values()))
            updates += last.updates - (0 if from_zero else first.updates)
        return calls, updates

    @property
    def hides_a_restart(self) -> bool:
        """Whether a copy saw no lower count after a restart, so that only the start time shows it."""
        for seen in self.seen:
            ticks = [tick for tick in range(TICKS) if seen[tick]]
            for before, after in pairwise(ticks):
                old, new = self.runs[self.run_at(before)], self.runs[self.run_at(after)]
                was, now = old.at(before), new.at(after)
                kept = all(now.calls.get(kind, 0) >= count for kind, count in was.calls.items())
                if old is not new and now.updates >= was.updates and kept:
                    return True
        return False


@st.composite
def hosts(draw: st.DrawFn, number: int, plain: bool, agents: bool, start_stored: bool) -> Host:
    """One host of a fleet; `plain`: nothing about it is ambiguous."""
    equal_starts = not plain and draw(st.booleans())
    began = NOW - 50_000 - (0 if equal_starts else 7 * (number + 1))
    idle = draw(st.sampled_from([False, False, False, True]))
    most = 0 if idle else draw(st.sampled_from([2, 40]))
    kinds = {kind: draw(st.sampled_from([-1, -1, 0, 5])) for kind in KINDS}
    kinds[KINDS[0]] = -1

    def run(start: float, since: int, before: int) -> Run:
        made = draw(st.lists(st.integers(0, most), min_size=TICKS, max_size=TICKS))
        return Run(start, draw(st.booleans()), before, made, since, kinds)

    if draw(st.booleans()):
        runs = [run(began, 0, draw(st.sampled_from([0, 1, 1000])))]
    else:  # started in the window, before the first scrape
        runs = [run(FIRST_SCRAPE - 60 - number, 0, draw(st.sampled_from([0, 7])))]
    if draw(st.sampled_from([False, False, True])):
        since = draw(st.integers(1, TICKS - 1))
        runs.append(run(FIRST_SCRAPE + since * INTERVAL + 1 + 0.01 * number, since, 0))
        if draw(st.booleans()) and since < TICKS - 1:
            more = draw(st.integers(since + 1, TICKS - 1))
            runs.append(run(FIRST_SCRAPE + more * INTERVAL + 1 + 0.01 * number, more, 0))
    replica = draw(st.sampled_from(["", "", "prometheus_replica", "replica", *([] if plain else ["shard"])]))
    copies = [{replica: "a"}, {replica: "b"}] if replica else [{}]
    target = {"job": "msrtrace", "instance": "127.0.0.1:9753" if agents else f"kvm{number}:9753"}
    if agents:
        target["host"] = f"kvm{number}"
    relabel = draw(
        st.none()
        | st.tuples(
            st.integers(0, TICKS),
            st.just(TICKS) | st.integers(0, TICKS),
            st.sampled_from([({}, {"dc": "eu"}), ({"dc": "eu"}, {}), ({"dc": "eu"}, {"dc": "us"})]),
        )
    )
    added = draw(st.sampled_from([0, 0, 0, 4])) if not equal_starts else 0
    missed = st.lists(st.sampled_from([True, True, True, False]), min_size=TICKS, max_size=TICKS)
    seen = [[ok and tick >= added for tick, ok in enumerate(draw(missed))] for _ in copies]
    late = [0.0, 0.0, 6.5]
    if plain and relabel and 0 < relabel[0] < relabel[1] < TICKS:
        # With other scrapes missing, one that came and went could not be told from a second target.
        seen, late = [[tick >= added for tick in range(TICKS)] for _ in copies], [0.0, 0.0, 3.0]
    if equal_starts:  # by chance: one that comes just when another goes could not be told from one that is renamed
        seen = [[True, *ticks[1:-1], True] for ticks in seen]
    return Host(
        target=target,
        patch=draw(st.sampled_from(["a", "b"])),
        runs=runs,
        copies=copies,
        federated=draw(st.sampled_from([False, False, True])),
        relabel=(*relabel[:2], *relabel[2]) if relabel else None,
        pods=draw(st.sampled_from([False, False, True])),
        seen=seen,
        late=draw(st.lists(st.sampled_from(late), min_size=TICKS, max_size=TICKS)),
        start_stored=start_stored,
        collides=draw(st.sampled_from([False, False, False, True])),
    )


@st.composite
def fleets(draw: st.DrawFn, plain: bool) -> list[Host]:
    """Up to three hosts."""
    agents = draw(st.booleans())
    start_stored = plain or draw(st.booleans())
    return [draw(hosts(number, plain, agents, start_stored)) for number in range(draw(st.integers(1, 3)))]


def ask(fleet: list[Host]) -> tuple[dict[str, tuple[int, int]], list[str], dict[str, int]]:
    """By group of hosts: calls and updates in the reports; warnings; and the number of reports with updates."""
    stored: Stored = {}
    for host in fleet:
        host.store(stored)
    groups = sorted({host.patch for host in fleet if host.scraped})
    found = compared(InMemory(stored), [[f'patch="{group}"'] for group in groups], WINDOW, NOW)
    totals, numbers = {}, {}
    for group, reports in zip(groups, found.sides, strict=True):
        totals[group] = (
            sum(report.totals.calls or 0 for report in reports),
            sum(report.totals.filter_updates or 0 for report in reports),
        )
        assert len({report.title for report in reports}) == len(reports)
        numbers[group] = sum(bool(report.totals.filter_updates) for report in reports)
    return totals, found.warnings, numbers


def made(fleet: list[Host]) -> dict[str, tuple[int, int]]:
    """By group of hosts: the calls and updates that they made."""
    result: dict[str, tuple[int, int]] = {}
    for host in fleet:
        if host.scraped:
            calls, updates = host.made()
            before = result.get(host.patch, (0, 0))
            result[host.patch] = (before[0] + calls, before[1] + updates)
    return result


@pytest.mark.timeout(60 + EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(fleets(plain=True))
def test_with_start_times_a_fleet_is_counted_exactly_and_never_refused(fleet: list[Host]) -> None:
    if not any(any(seen) for host in fleet for seen in host.seen):
        return
    totals, warnings, numbers = ask(fleet)
    assert totals == made(fleet)
    assert warnings == []
    for group, number in numbers.items():
        assert number >= sum(host.patch == group and host.made()[1] > 0 for host in fleet)


@pytest.mark.timeout(60 + EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(fleets(plain=False))
def test_any_fleet_is_counted_exactly_or_refused(fleet: list[Host]) -> None:
    if not any(any(seen) for host in fleet for seen in host.seen):
        return
    refusal = ""
    try:
        totals, warnings, _ = ask(fleet)
    except MsrtraceError as error:
        refusal = str(error)
    if refusal:
        event("refused")
        assert re.search(r"label|_total|process_start_time_seconds", refusal)
        assert "\n" not in refusal
        return
    if any(not host.start_stored and host.hides_a_restart for host in fleet):
        event("a hidden restart")
        assert any(START in warning for warning in warnings) or totals == made(fleet)
        return
    event("exact")
    assert totals == made(fleet)
