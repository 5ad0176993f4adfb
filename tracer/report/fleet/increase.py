# SPDX-License-Identifier: GPL-2.0-or-later
"""Increases of the counters of a process; from 0 only where it is certain that a counter started there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from tracer.model.cause import FILTER_CHANGE, VCPU_CREATE
from tracer.model.errors import MsrtraceError
from tracer.report.fleet.runs import Run
from tracer.report.fleet.targets import CALLS, LOSSES, OF_HOST, REDUNDANT, UPDATES, VCPUS_CREATED, Key, selector

#: What makes calls of these causes, and how many of a kind each makes at most: vmx_msr_filter_changed(),
#: svm_msr_filter_changed() and what replaced them ask once for each MSR and direction; so does a vCPU's creation, which
#: may recalculate what it has set up (6.17).
_MADE_BY = {FILTER_CHANGE: (UPDATES, 1), VCPU_CREATE: (VCPUS_CREATED, 2)}
#: Calls of a kind that were counted, while what makes them was in progress and therefore not: one for each vCPU in it.
_IN_PROGRESS = 16


def increases(runs: Sequence[Run], from_zero: bool) -> dict[Key, float]:
    """The increase of each counter of a process in the window; of OF_HOST, those that are not ambiguous.

    :param runs: the runs of the process
    :param from_zero: whether the process started within the window
    :raises MsrtraceError: where another increase is ambiguous
    """
    found, ambiguous = {}, set()
    for key in {key for run in runs for key in run.counters}:
        try:
            found[key] = _increase(runs, key, from_zero)
        except MsrtraceError:
            if key[0] not in OF_HOST:
                raise
            ambiguous.add(key[0])
    return {key: increase for key, increase in found.items() if key[0] not in ambiguous}


def _increase(runs: Sequence[Run], key: Key, from_zero: bool) -> float:
    """The increase of one counter of a process, from its first scrape to the last."""
    parts = [run.counters[key] for run in runs if key in run.counters]
    first, value = min((samples.times[0], samples.values[0]) for samples in parts)
    last = max(samples.values[-1] for samples in parts)
    if from_zero or not value or _appeared(runs, key, first, value):
        return last
    return last - value


def _appeared(runs: Sequence[Run], key: Key, first: float, value: float) -> bool:
    """Whether the counter, seen at `first`, did not exist at an earlier scrape: a series exists from its first call on.

    Raises MsrtraceError where it existed but was not stored.

    :param value: what it counted at `first`
    """
    metric = key[0]
    earlier = [run for run in runs if run.first < first]
    if not earlier:
        return False
    if metric in LOSSES:
        return True  # of a map or a function that a reload has added
    if metric in (CALLS, REDUNDANT):
        _check_kind(runs, key, first, value)
        if any(time < first for run in earlier for time in run.family_times.get(metric, ())[:1]):
            return True
        if not any(_called(run, first) for run in earlier):
            return True
    raise MsrtraceError(
        f"{metric}{selector(earlier[0].target)} is not stored from the first scrape on, so its increase in the "
        "window is unknown"
    )


def _check_kind(runs: Sequence[Run], key: Key, first: float, value: float) -> None:
    """Raise MsrtraceError if calls of a kind had been made before the series begins, at `first` with `value`."""
    metric, own = key
    made = [run.counters[CALLS, own].times[0] for run in runs if (CALLS, own) in run.counters]
    grown = _made_since(runs, key, first)
    if (metric == REDUNDANT and made and min(made) < first) or (grown is not None and value > grown + _IN_PROGRESS):
        raise MsrtraceError(
            f"{metric}{selector((*runs[0].target, *own))} begins within the window, at {value:g}, more than can have "
            "been counted since the scrape before: it is not stored from the first scrape on, so its increase in the "
            "window is unknown"
        )


def _made_since(runs: Sequence[Run], key: Key, first: float) -> float | None:
    """The most calls of a kind from the last scrape before `first` until then; None if nothing stored limits them.

    That is how often what makes them has happened, or the calls of another kind that it makes, if more. All counts of a
    scrape are read at once, so the earlier scrape with the highest counts is the last one, whoever scraped.
    """
    metric, own = key
    cause = dict(own).get("cause", "")
    if cause not in _MADE_BY:
        return None
    maker, most = _MADE_BY[cause]
    scraped = next(run for run in runs if key in run.counters and run.counters[key].times[0] == first)
    found = []
    for other, samples in scraped.counters.items():
        is_maker = other == (maker, ())
        if is_maker or (other[0] == metric and dict(other[1]).get("cause") == cause):
            now = samples.at(first)
            before = [v for run in runs for v in _until(run, other, first)]
            if now is not None and before:
                found.append(max(0.0, now - max(before)) * (most if is_maker else 1))
    return max(found, default=None)


def _until(run: Run, key: Key, end: float) -> Sequence[float]:
    """The values of a counter before `end`."""
    samples = run.counters.get(key)
    return samples.values[: bisect_left(samples.times, end)] if samples else ()


def _called(run: Run, before: float) -> bool:
    """Whether calls had been made at an earlier scrape: it has calls, or filter updates, which make calls."""
    updates = run.counters.get((UPDATES, ()))
    updated = updates and any(t < before and v > 0 for t, v in zip(updates.times, updates.values, strict=True))
    return bool(updated or any(time < before for time in run.family_times.get(CALLS, ())[:1]))
