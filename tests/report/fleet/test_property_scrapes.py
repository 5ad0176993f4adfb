# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that count at any moment, scraped at any other: test_property.py has one count for each interval.

Replicas scrape at different times within the interval, begin and end in the window, and change labels one after the
other; federating servers copy what is newest at times of their own; processes, pods and their addresses change.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

import pytest
from fleets import CALLS, REDUNDANT, START, UPDATES, InMemory, Stored
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.fleet import compared

NOW = 1_700_000_000.0
KINDS = ("0x48", "0x10b", "0x174")
EXAMPLES = int(os.environ.get("MSRTRACE_EXAMPLES", "300"))
#: How a server above stores a copy: with the target's labels renamed (`honor_labels: false`), or with one of its own.
Federation = Literal["no", "renamed", "labelled"]
Labels = dict[str, str]
Totals = tuple[int, int]  # calls and updates


@dataclass(frozen=True)
class Process:
    """A process: when it started, what it had counted before any of `updates` (times), and whether it runs --by-vm."""

    start: float
    before: int
    by_vm: bool
    updates: list[float]

    def at(self, time: float, kinds: Mapping[str, float]) -> tuple[int, dict[str, int]]:
        """Its updates and, by MSR, its calls: one in each update since the time in `kinds`, if that is not 0."""
        made = bisect_right(self.updates, time)
        calls = {
            msr: self.before + made if not since else made - min(made, bisect_left(self.updates, since))
            for msr, since in kinds.items()
        }
        return self.before + made, {msr: count for msr, count in calls.items() if count}


class Host:
    """One host of a fleet: what happens to it, and how it is scraped, all drawn from `random`."""

    def __init__(self, random: Random, number: int, begin: float, agents: bool, start_stored: bool) -> None:
        self.start_stored, self.begin, self.number = start_stored, begin, number
        self.group, self.kinds = random.choice("ab"), {"0x10": 0.0} | dict.fromkeys(KINDS, 0.0)
        for msr in KINDS:
            if random.random() < 0.3:  # it is first called in the window
                self.kinds[msr] = random.uniform(begin, NOW)
        self.processes = self._processes(random)
        self.interval = random.choice([10.0, 15.0, 30.0])
        self.target: Labels = {"job": "msrtrace", "instance": "127.0.0.1:9753" if agents else f"kvm{number}:9753"}
        if agents or random.random() < 0.3:
            self.target["host" if agents else "node"] = f"kvm{number}"
        if random.random() < 0.5:
            self.target["dc"] = "eu"
        self.pods = random.random() < 0.3
        self.addresses = self.pods and "node" in self.target and random.random() < 0.5
        changes = [("dc", "us"), ("dc", ""), ("rack", "1"), ("rack", "2"), ("team", "x")]
        self.changes = sorted(
            (random.uniform(begin, NOW), *random.choice(changes)) for _ in range(random.choice([0, 0, 0, 1, 1, 2]))
        )
        replica = random.choice(["", "", "prometheus", "prometheus_replica", "replica", "__replica__"])
        self.copies: list[Labels] = [{replica: "a"}, {replica: "b"}] if replica else [{}]
        self.behind = [random.choice([0.0, 0.0, random.uniform(0, 40)]) for _ in self.copies]  # with a change of labels
        self.federation: Federation = random.choice(["no", "no", "no", "renamed", "labelled"])
        missed, late = random.choice([0.0, 0.0, 0.1, 0.3]), random.choice([0.0, 0.0, 2.0, 8.0])
        self.scrapes = [self._scrapes(random, missed, late) for _ in self.copies]
        every = random.choice([15.0, 30.0, 60.0])
        first = begin - 60 + random.uniform(0, every)
        self.copied = [first + every * turn for turn in range(int((NOW - first) / every) + 1)]

    def _processes(self, random: Random) -> list[Process]:
        started = [NOW - 50_000 - random.uniform(0, 1000)]
        if random.random() < 0.3:
            started = [self.begin + random.uniform(5, 0.6 * (NOW - self.begin))]
        while random.random() < 0.35 and len(started) < 4:
            started.append(random.uniform(max(started[-1], self.begin) + 2, NOW))
        rate, found = random.choice([0, 0.05, 0.5, 3]), []
        for start, end in zip(started, [*started[1:], NOW], strict=True):
            first = max(start, self.begin - 200)
            made = random.randint(0, int(rate * max(0.0, end - first)))
            before = random.choice([0, 5, 1000]) if start < self.begin else 0
            times = sorted(random.uniform(first, end) for _ in range(made))
            found.append(Process(round(start, 2), before, random.random() < 0.4, times))
        return found

    def _scrapes(self, random: Random, missed: float, late: float) -> list[float]:
        """When one server scrapes it: of several one may begin or end in the window."""
        within = random.choice([(self.begin - 100, NOW)] * 3 + [(random.uniform(self.begin, NOW), NOW)])
        if random.random() < 0.2:
            within = (self.begin - 100, random.uniform(self.begin, NOW))
        offset = random.uniform(0, self.interval)
        times = (self.begin - 60 + offset + self.interval * turn for turn in range(int(700 / self.interval)))
        moved = (round(time + (random.uniform(0, late) if random.random() < 0.3 else 0), 3) for time in times)
        return [
            time
            for time in moved
            if within[0] <= time <= min(within[1], NOW)
            and random.random() >= missed
            and self.processes[0].start + 0.5 < time
        ]

    def process(self, time: float) -> int:
        """The number of the process that runs then; one that starts is reached half a second later."""
        return max(0, *(place for place, one in enumerate(self.processes) if one.start + 0.5 < time))

    def labels(self, time: float, copy: int) -> Labels:
        """The labels of its target in a copy."""
        labels = {**self.target, **self.copies[copy], "group": self.group}
        for since, name, value in self.changes:
            if since + self.behind[copy] <= time:
                labels[name] = value
        if self.pods:
            labels["pod"] = f"msrtrace-{self.number}-{self.process(time)}"
        if self.addresses:
            labels["instance"] = f"10.0.{self.number}.{self.process(time)}:9753"
        return {name: value for name, value in labels.items() if value}

    def store(self, stored: Stored) -> None:
        """Add what was stored of it."""
        series: dict[tuple[str, tuple[tuple[str, str], ...]], dict[float, float]] = {}
        for copy, times in enumerate(self.scrapes):
            for time in times:
                for labels in (self.labels(time, copy), *self._above(time, copy)):
                    for name, own, value in self._exposed(time):
                        key = name, tuple(sorted({**labels, **own}.items()))
                        series.setdefault(key, {})[time] = value
        for (name, pairs), samples in series.items():
            stored.setdefault(name, []).append((dict(pairs), samples))

    def _above(self, time: float, copy: int) -> list[Labels]:
        """The labels of the copy of that scrape on a federating server: of those it has the newest, each time."""
        following = next((other for other in self.scrapes[copy] if other > time), NOW)
        if self.federation == "no" or not any(time <= at < min(following, time + 300) for at in self.copied):
            return []
        labels = self.labels(time, copy)
        if self.federation == "labelled":
            return [{**labels, "region": "west"}]
        renamed = {f"exported_{name}" if name in ("job", "instance") else name: it for name, it in labels.items()}
        return [{"job": "federate", "instance": "prometheus:9090", **renamed}]

    def _exposed(self, time: float) -> list[tuple[str, Labels, float]]:
        process = self.processes[self.process(time)]
        updates, calls = process.at(time, self.kinds)
        info = {"layout": "toggle", "redundancy": "exact", "kernel": "6.1", "version": "1", "backend": "kprobe"}
        exposed: list[tuple[str, Labels, float]] = [("msrtrace_build_info", info, 1)]
        if self.start_stored:
            exposed.append((START, {}, process.start))
        prefix = "msrtrace_host_" if process.by_vm else "msrtrace_"
        exposed.append((UPDATES.replace("msrtrace_", prefix), {}, updates))
        for msr, count in calls.items():
            own = {"msr": msr, "name": "?", "access": "read", "action": "disable", "cause": "filter_change"}
            for metric in (CALLS, REDUNDANT):
                exposed.append((metric.replace("msrtrace_", prefix), own, count))
                if process.by_vm:
                    exposed.append((metric, {**own, "vm": "x", "pid": "1"}, count // 2))
        return exposed

    def made(self) -> Totals | None:
        """The calls and updates that it made in the window, as far as scrapes show; None if there was none."""
        scraped: dict[int, list[float]] = {}
        for times in self.scrapes:
            for time in times:
                if self.begin < time <= NOW:
                    scraped.setdefault(self.process(time), []).append(time)
        calls = updates = 0
        for number, times in scraped.items():
            process = self.processes[number]
            last, of_last = process.at(max(times), self.kinds)
            first, of_first = process.at(min(times), self.kinds)
            if process.start > self.begin if self.start_stored else number > min(scraped):
                first, of_first = 0, {}
            updates += last - first
            calls += sum(of_last.values()) - sum(of_first.values())
        return (calls, updates) if scraped else None


@pytest.mark.timeout(60 + EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(st.randoms(use_true_random=True), st.booleans() | st.just(True))
def test_any_fleet_at_any_time_is_counted_exactly_or_refused(random: Random, start_stored: bool) -> None:
    window, agents = random.choice([180, 300, 600]), random.random() < 0.4
    fleet = [Host(random, number, NOW - window, agents, start_stored) for number in range(random.randint(1, 4))]
    stored: Stored = {}
    expected: dict[str, Totals] = {}
    for host in fleet:
        host.store(stored)
        if made := host.made():
            before = expected.get(host.group, (0, 0))
            expected[host.group] = (before[0] + made[0], before[1] + made[1])
    if not expected:
        return
    groups, refusal = sorted(expected), ""
    try:
        found = compared(InMemory(stored), [[f'group="{group}"'] for group in groups], window, NOW)
    except MsrtraceError as error:
        refusal = str(error)
    if refusal:
        event(f"refused; start times are stored: {start_stored}")
        assert re.search(r"\{[a-z_]+=|_total|process_start_time_seconds", refusal)
        assert not re.search(r"  |\n|\{\}", refusal)
        return
    counted = {
        group: (
            sum(report.totals.calls or 0 for report in side),
            sum(report.totals.filter_updates or 0 for report in side),
        )
        for group, side in zip(groups, found.sides, strict=True)
    }
    event(f"counted; start times are stored: {start_stored}")
    if not start_stored and any(len(host.processes) > 1 for host in fleet) and counted != expected:
        event("a hidden restart")
        assert any(START in warning for warning in found.warnings)
        return
    assert counted == expected
