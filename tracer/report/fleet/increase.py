# SPDX-License-Identifier: GPL-2.0-or-later
"""Increases of the counters of a process; from 0 only where it is certain that a counter started there."""

from __future__ import annotations

from collections.abc import Sequence

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.runs import Run
from tracer.report.fleet.targets import CALLS, LOSSES, OF_HOST, REDUNDANT, UPDATES, Key, selector


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
    if from_zero or not value or _appeared(runs, key, first):
        return last
    return last - value


def _appeared(runs: Sequence[Run], key: Key, first: float) -> bool:
    """Whether the counter, seen at `first`, did not exist at an earlier scrape: a series exists from its first call on.

    Raises MsrtraceError where it existed but was not stored.
    """
    metric = key[0]
    earlier = [run for run in runs if run.first < first]
    if not earlier:
        return False
    if metric in LOSSES:
        return True  # of a map or a function that a reload has added
    if metric in (CALLS, REDUNDANT):
        if any(time < first for run in earlier for time in run.family_times.get(metric, ())[:1]):
            return True
        if not any(_called(run, first) for run in earlier):
            return True
    raise MsrtraceError(
        f"{metric}{selector(earlier[0].target)} is not stored from the first scrape on, so its increase in the "
        "window is unknown"
    )


def _called(run: Run, before: float) -> bool:
    """Whether calls had been made at an earlier scrape: it has calls, or filter updates, which make calls."""
    updates = run.counters.get((UPDATES, ()))
    updated = updates and any(t < before and v > 0 for t, v in zip(updates.times, updates.values, strict=True))
    return bool(updated or any(time < before for time in run.family_times.get(CALLS, ())[:1]))
