# SPDX-License-Identifier: GPL-2.0-or-later
"""The runs of msrtrace under one set of target labels: consecutive, and distinguished by their start times.

A run is the part of a stream that one process made. process_start_time_seconds says when that started; where it is not
stored, a counter that falls or disappears begins a new run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from math import inf
from statistics import median_low

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.prometheus_api import Samples
from tracer.report.fleet.targets import (
    ATTACHED,
    CALLS,
    INFO,
    LOSSES,
    OF_HOST,
    PER_VM,
    START,
    UPDATES,
    Key,
    Stream,
    Target,
    host_family,
    machine,
    selector,
)

COUNTERS = (*PER_VM, *OF_HOST, *LOSSES)
#: A clock before this (in 2001) was never set: a start time from it only identifies the process.
_CLOCK_SET = 1e9


@dataclass(frozen=True, eq=False)
class Run:
    """The part of a stream that one process made.

    `start` is when the process started, in seconds since 1970 (None: not stored). `scrapes` are the times of its
    scrapes. `new`: it follows another process in the stream, so it started between two scrapes. `counters` are its
    counters summed over VMs; `split` the metrics that are stored only by VM.
    """

    target: Target
    start: float | None
    new: bool
    scrapes: tuple[float, ...]
    counters: Mapping[Key, Samples]
    gauges: Mapping[Key, Samples]
    split: tuple[str, ...]

    @property
    def first(self) -> float:
        """The time of the first scrape."""
        return self.scrapes[0]

    @property
    def last(self) -> float:
        """The time of the last scrape."""
        return self.scrapes[-1]

    @cached_property
    def machine(self) -> str:
        """The instance, as the server that scraped the target called it."""
        return machine(self.target)

    @cached_property
    def interval(self) -> float:
        """The usual time between two scrapes, in seconds; infinite if there was only one."""
        return median_low(gaps) if (gaps := [b - a for a, b in pairwise(self.scrapes)]) else inf

    @cached_property
    def info(self) -> Mapping[str, str] | None:
        """The labels of the newest msrtrace_build_info; None if it is not stored."""
        found = [(samples.times[-1], own) for (metric, own), samples in self.gauges.items() if metric == INFO]
        return dict(max(found)[1]) if found else None

    @cached_property
    def family_times(self) -> Mapping[str, list[float]]:
        """The times at which any series of a metric existed, by metric."""
        times: dict[str, set[float]] = {}
        for (metric, _), samples in self.counters.items():
            times.setdefault(metric, set()).update(samples.times)
        return {metric: sorted(found) for metric, found in times.items()}


def runs(stream: Stream, begin: float) -> list[Run]:
    """The runs in a stream, oldest first; the window starts at `begin`.

    Raises MsrtraceError where the stream has more than one process at a time.
    """
    scrapes = sorted({time for (name, _), samples in stream.series.items() if name != START for time in samples.times})
    result: list[Run] = []
    for start, times in _by_start(stream, scrapes):
        for part, new in _without_falls(stream, start, times):
            result.append(_run(stream, start if not new else None, bool(result), part))
    for before, after in pairwise(result):
        _check_restart(before, after, begin)
    return result


def _check_restart(before: Run, after: Run, begin: float) -> None:
    """Raise MsrtraceError if `after` started before the window: then it is not a restart of `before`."""
    if after.start is not None and _CLOCK_SET < after.start <= begin and _counted(after):
        raise MsrtraceError(
            f"{selector(after.target)} is another process after {before.last:.0f} s, but {START} says that it started "
            f"before the window, at {after.start:.0f}: two processes have these labels, or the host's clock is wrong; "
            "give each process its own target labels"
        )


def _counted(run: Run) -> bool:
    return any(samples.values[0] for samples in run.counters.values())


def _by_start(stream: Stream, scrapes: list[float]) -> list[tuple[float | None, list[float]]]:
    """The scrapes by the start time of their process, oldest first."""
    known = stream.series.get((START, ()))
    if not known:
        return [(None, scrapes)] if scrapes else []
    values = [round(value, 3) for value in known.values]
    if any(after < before for before, after in pairwise(values)):
        raise MsrtraceError(
            f"{START}{selector(stream.target)} goes back: two processes have the same labels; give each a target label "
            "of its own"
        )
    starts = [_start_at(time, stream.target, known, values) for time in scrapes]
    grouped = groupby(zip(starts, scrapes, strict=True), key=lambda pair: pair[0])
    return [(start, [time for _, time in pairs]) for start, pairs in grouped]


def _start_at(time: float, target: Target, known: Samples, values: list[float]) -> float | None:
    """The start time of the process that was scraped at `time`, from the known samples of start times."""
    low, high = bisect_left(known.times, time), bisect_right(known.times, time)
    if low < high:
        return values[low]
    before, after = values[low - 1] if low else None, values[low] if low < len(values) else None
    if before is None:
        return after if after is not None and after <= time else None
    if after is not None and after != before:
        raise MsrtraceError(
            f"{START}{selector(target)} is missing where the process changed, so whose the counts are is unknown"
        )
    return before


def _without_falls(stream: Stream, start: float | None, times: list[float]) -> Iterator[tuple[list[float], bool]]:
    """The scrapes, split where a counter falls or disappears; and whether the part is of another process.

    Raises MsrtraceError where the start time on both sides of the split is the same: then two processes have it.
    """
    inside = {key: samples.between(times[0], times[-1]) for key, samples in stream.series.items()}
    known = stream.series.get((START, ()))
    known_until = known.times[-1] if known and start is not None else -inf
    losses = sorted(_falls(inside), key=lambda loss: loss.until)
    for loss in losses:
        if loss.until <= known_until:
            raise MsrtraceError(
                f"{loss.metric}{selector(stream.target)} falls while {START} stays the same: two processes have the "
                "same labels; give each a target label of its own"
            )
    fallen = {loss.until for loss in losses}
    for loss in _gone(inside):
        if loss.until > known_until and loss.until not in fallen:
            raise MsrtraceError(
                f"{loss.metric}{selector(stream.target)} lost a kind of call, and without {START}, which is not "
                "stored, whether msrtrace was restarted is unknown"
            )
    for loss in _ended(inside):
        if loss.until <= known_until:
            raise MsrtraceError(
                f"{loss.metric}{selector(stream.target)} lost a kind of call while {START} stays the same: msrtrace "
                "keeps them all, so labels of stored series were changed, or two processes have the same labels"
            )
    losses += [loss for loss in _modes(inside) if loss.until > known_until]
    place, cut = 0, -inf
    for loss in sorted(losses, key=lambda loss: loss.until):
        if loss.after >= cut:  # else the previous split explains it
            cut = loss.until
            end = bisect_left(times, cut)
            yield times[place:end], place > 0
            place = end
    yield times[place:], place > 0


@dataclass(frozen=True)
class _Loss:
    """A counter of `metric` lost its count between the scrapes at `after` and `until`."""

    after: float
    until: float
    metric: str


def _falls(series: Mapping[Key, Samples]) -> Iterator[_Loss]:
    for (metric, own), samples in series.items():
        if metric in (START, INFO, ATTACHED) or "vm" in dict(own):
            continue
        for (after, before), (time, value) in pairwise(zip(samples.times, samples.values, strict=True)):
            if value < before * (1 - 1e-9):  # VictoriaMetrics keeps about 15 digits of a float
                yield _Loss(after, time, metric)


def _gone(series: Mapping[Key, Samples]) -> Iterator[_Loss]:
    """Where a kind of call disappears while others are still there."""
    for calls, updates in ((CALLS, UPDATES), (host_family(CALLS), host_family(UPDATES))):
        present = _times(series, updates, calls)
        for (metric, own), samples in series.items():
            if metric == calls and "vm" not in dict(own):
                for time in samples.times:
                    place = bisect_right(present, time)
                    if place < len(present) and samples.at(present[place]) is None:
                        yield _Loss(time, present[place], metric)


def _ended(series: Mapping[Key, Samples]) -> Iterator[_Loss]:
    """Where a kind of call disappears for good while others go on, at two scrapes: of the last some may be missing."""
    for loss in _gone(series):
        ends = [s.times[-1] for (metric, own), s in series.items() if metric == loss.metric and "vm" not in dict(own)]
        if loss.after in ends and sum(time > loss.after for time in _times(series, loss.metric)) > 1:
            yield loss


def _modes(series: Mapping[Key, Samples]) -> Iterator[_Loss]:
    """Where --by-vm was switched on or off, which takes a restart."""
    plain = _times(series, UPDATES, CALLS)
    by_host = _times(series, host_family(UPDATES), host_family(CALLS))
    modes = sorted([(time, CALLS) for time in plain] + [(time, host_family(CALLS)) for time in by_host])
    for (after, before), (time, now) in pairwise(modes):
        if before != now and after < time:
            yield _Loss(after, time, now)


def _times(series: Mapping[Key, Samples], *metrics: str) -> list[float]:
    """When any of the metrics existed, summed over VMs."""
    return sorted(
        {t for (metric, own), s in series.items() if metric in metrics and "vm" not in dict(own) for t in s.times}
    )


def _run(stream: Stream, start: float | None, new: bool, times: list[float]) -> Run:
    inside = {key: samples.between(times[0], times[-1]) for key, samples in stream.series.items()}
    inside = {key: samples for key, samples in inside.items() if samples.times and key[0] != START}
    gauges = {key: samples for key, samples in inside.items() if key[0] in (INFO, ATTACHED)}
    by_vm = {metric for metric, own in inside if "vm" in dict(own)}
    by_host = {metric for metric in PER_VM if any(name == host_family(metric) for name, _ in inside)}
    counters: dict[Key, Samples] = {}
    for (metric, own), samples in inside.items():
        if metric in COUNTERS and metric not in by_host and "vm" not in dict(own):
            counters[metric, own] = samples
        elif metric.startswith("msrtrace_host_"):
            counters[metric.replace("msrtrace_host_", "msrtrace_"), own] = samples
    return Run(stream.target, start, new, tuple(times), counters, gauges, tuple(sorted(by_vm - by_host)))
