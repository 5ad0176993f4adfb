# SPDX-License-Identifier: GPL-2.0-or-later
"""Which runs are one process: relabelled over time, or scraped more than once at the same time.

Exact, or refused with the label named: where two runs may be one process or two, and the sums depend on it, nothing
is guessed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import combinations, pairwise
from math import inf
from statistics import median

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.increase import increases
from tracer.report.fleet.runs import Run
from tracer.report.fleet.targets import (
    MACHINE_LABELS,
    PER_VM,
    START,
    UPDATES,
    Key,
    Target,
    differing,
    distance,
    extends,
    federated,
    innermost,
    replicas,
    selector,
)

#: A scrape takes this long at most (the default of scrape_timeout): counters that two servers read within this time may
#: be stored in the wrong order. Usually it takes a fraction of a second.
_SCRAPE_SECONDS, _USUAL_SCRAPE_SECONDS = 10.0, 1.0
#: A federated copy without the original timestamps (`honor_timestamps: false`) is at most --query.lookback-delta old.
_FEDERATION_SECONDS = 300.0
#: A counter that grew this many times faster while its labels changed may be that of another process.
_LEAP = 10.0
#: Clocks of hosts and servers that differ by more than this are wrong.
_SKEW_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Process:
    """A process of msrtrace: its runs, oldest first, and whether it started within the window, counting from 0."""

    runs: tuple[Run, ...]
    from_zero: bool

    @property
    def first(self) -> float:
        """The time of the first scrape."""
        return self.runs[0].first

    @property
    def last(self) -> float:
        """The time of the last scrape."""
        return max(run.last for run in self.runs)

    @property
    def newest(self) -> Run:
        """The run that was scraped last."""
        return max(self.runs, key=lambda run: (run.last, run.target))

    @property
    def start(self) -> float | None:
        """When it started, in seconds since 1970; None if that is not stored."""
        return next((run.start for run in self.runs if run.start is not None), None)

    def increases(self) -> dict[Key, float]:
        """The increase of each counter in the window, as `increases` says. Raises MsrtraceError."""
        return increases(self.runs, self.from_zero)


class _Relation(Enum):
    """Whether two runs are of one process."""

    SAME = auto()
    DIFFERENT = auto()
    UNSURE = auto()


def processes(runs: Sequence[Run], begin: float) -> list[Process]:
    """The processes behind the runs, in a window that starts at `begin` (seconds since 1970).

    Raises MsrtraceError where that is ambiguous and the sums depend on it.
    """
    ordered = sorted(runs, key=lambda run: (run.first, run.target))
    interval: dict[Target, float] = {}
    for run in ordered:
        interval[run.target] = min(run.interval, interval.get(run.target, inf))
    pairs = {(a, b): _relation(ordered[a], ordered[b], interval) for a, b in _candidates(ordered)}
    _settle_survivals(ordered, pairs)
    _settle_successions(ordered, pairs)
    groups = _groups(len(ordered), (pair for pair, relation in pairs.items() if relation is _Relation.SAME))
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    found = [_process([ordered[index] for index in group], begin) for group in groups]
    for (a, b), relation in pairs.items():
        one, other = found[group_of[a]], found[group_of[b]]
        if one is other and relation is _Relation.DIFFERENT:
            raise _ambiguous(ordered[a], ordered[b], "although others of these series are copies of one")
        if one is not other and relation is _Relation.UNSURE and _matters(one, other, begin):
            raise _ambiguous(ordered[a], ordered[b], "and their counts do not decide it")
    _check_beginnings(found)
    return found


def _candidates(runs: Sequence[Run]) -> Iterable[tuple[int, int]]:
    """The pairs of runs that may be one process: their start times are equal or unknown."""
    by_start: dict[float | None, list[int]] = {}
    for index, run in enumerate(runs):
        by_start.setdefault(run.start, []).append(index)
    unknown = by_start.pop(None, [])
    for same in by_start.values():
        yield from combinations(same, 2)
    yield from combinations(unknown, 2)
    for index in unknown:
        yield from (tuple(sorted((index, other))) for same in by_start.values() for other in same)  # type: ignore[misc]


def _relation(one: Run, other: Run, interval: Mapping[Target, float]) -> _Relation:
    """How two runs are related, whose start times are equal or unknown.

    :param one: the one that was scraped first
    :param interval: the usual time between two scrapes of a target, in seconds
    """
    if one.target == other.target or _hosts_differ(one, other):
        return _Relation.DIFFERENT
    known = one.start is not None and other.start is not None
    if one.last < other.first or _take_turns(one, other, min(interval[one.target], interval[other.target])):
        return _succession(one, other) if known else _succession_without_start(one, other)
    if not known and one.machine != other.machine:
        return _Relation.DIFFERENT
    return _at_once(one, other, known)


def _at_once(one: Run, other: Run, known: bool) -> _Relation:
    """The relation of runs that were scraped over the same time; `known`: their start times are known, and equal."""
    disorder = _disorder(one, other)
    copies, above = replicas(one.target, other.target), federated(one.target, other.target)
    if disorder and disorder[-1] > (_FEDERATION_SECONDS if above and not copies else _SCRAPE_SECONDS):
        # Copies, one of which may hide a restart if starts are not stored; else two processes.
        return _Relation.UNSURE if (copies or above) and not known else _Relation.DIFFERENT
    if copies or above:
        usual = not disorder or (disorder[0] > 0 and disorder[-1] <= _USUAL_SCRAPE_SECONDS)
        return _Relation.SAME if usual else _Relation.UNSURE
    if (disorder and disorder[0] == 0) or _own_scrapes(one, other):
        return _Relation.DIFFERENT
    more = known and extends(one.target, other.target) and set(one.scrapes).isdisjoint(other.scrapes)
    return _Relation.SAME if more and not disorder else _Relation.UNSURE


def _take_turns(one: Run, other: Run, interval: float) -> bool:
    """Whether each was scraped only while scrapes of the other are missing, as when a label comes and goes."""
    missing = 1.5 * interval
    place = bisect_right(one.scrapes, other.first)
    if 0 < place < len(one.scrapes) and one.scrapes[place] - one.scrapes[place - 1] < missing:
        return False  # as nearly always
    last: dict[bool, float] = {}
    times = sorted([(time, True) for time in one.scrapes] + [(time, False) for time in other.scrapes])
    for (before, whose), (time, now) in pairwise(times):
        last[whose] = before
        if whose != now and (time - before < 0.5 * interval or time - last.get(now, -inf) < missing):
            return False
    return True


def _succession(one: Run, other: Run) -> _Relation:
    """The relation of a run to a later one with the same start time."""
    disorder = _disorder(one, other)
    if not disorder:
        return _Relation.UNSURE if _machines_differ(one, other) and _leaps(one, other) else _Relation.SAME
    close = disorder[-1] <= _SCRAPE_SECONDS or extends(one.target, other.target)
    return _Relation.UNSURE if close else _Relation.DIFFERENT


def _succession_without_start(one: Run, other: Run) -> _Relation:
    """The relation of a run to a later one, where a start time is not stored."""
    disorder = _disorder(one, other)
    if other.new:  # it follows another run with its labels
        elsewhere = disorder or one.machine != other.machine
        return _Relation.DIFFERENT if elsewhere else _Relation.UNSURE
    if extends(one.target, other.target) and not disorder:
        return _Relation.UNSURE if _leaps(one, other) else _Relation.SAME
    return _Relation.DIFFERENT if disorder and _machines_differ(one, other) else _Relation.UNSURE


def _leaps(one: Run, other: Run) -> bool:
    """Whether filters would have been updated at a much higher rate between the runs than during either."""
    before, after = (run.counters.get((UPDATES, ())) for run in (one, other))
    if not before or not after or after.times[0] <= before.times[-1]:
        return False
    rates = [
        (samples.values[-1] - samples.values[0]) / (samples.times[-1] - samples.times[0])
        for samples in (before, after)
        if len(samples.times) > 1
    ]
    between = (after.values[0] - before.values[-1]) / (after.times[0] - before.times[-1])
    return bool(rates) and between > _LEAP * max(rates)


def _hosts_differ(one: Run, other: Run) -> bool:
    """Whether they differ in what never changes during the life of a process."""
    if not (one.info and other.info):
        return False
    return any(
        name in one.info and name in other.info and one.info[name] != other.info[name] for name in ("kernel", "version")
    )


def _machines_differ(one: Run, other: Run) -> bool:
    """Whether they differ in a label that names a machine."""
    inner, outer = innermost(one.target), innermost(other.target)
    return any(inner.get(name) != outer.get(name) for name in MACHINE_LABELS)


def _own_scrapes(one: Run, other: Run) -> bool:
    """Whether two machines were scraped at the same moments.

    A copy of a scrape has the same times and instance; two scrapes of one process have different times, as Prometheus
    spreads targets over the interval by a hash of their labels (scrape/target.go, Target.offset).
    """
    if not _machines_differ(one, other):
        return False
    first, last = max(one.first, other.first), min(one.last, other.last)
    times, others = ({time for time in run.scrapes if first <= time <= last} for run in (one, other))
    return 2 * len(times & others) >= min(len(times), len(others)) > 0


def _disorder(one: Run, other: Run) -> list[float]:
    """Where the counts of two runs cannot come from one process that was scraped without delay.

    Sorted seconds from a count to a later (0: simultaneous) one that is lower; the longest for each scrape.
    """
    found: set[float] = set()
    keys = one.counters.keys() | other.counters.keys()
    for key in sorted(keys, key=lambda key: key[0] != UPDATES):
        if key[0] in PER_VM:
            found.update(_behind(key, one, other))
            found.update(_behind(key, other, one))
            if found and max(found) > _SCRAPE_SECONDS:
                break
    return sorted(found)


def _behind(key: Key, ahead: Run, behind: Run) -> Iterable[float]:
    """Seconds from a count of `ahead` to a later, lower one of `behind`, where a missing kind of call counts as 0."""
    counted = ahead.counters.get(key)
    family = behind.family_times.get(key[0])
    if not counted or not family:
        return  # that metric is not stored there
    samples = behind.counters.get(key)
    for time in family:
        value = samples.at(time) if samples else None
        more = bisect_right(counted.values, (value or 0.0) * (1 + 1e-9))
        if more < len(counted.times) and counted.times[more] <= time:
            yield time - counted.times[more]


def _settle_survivals(runs: Sequence[Run], pairs: dict[tuple[int, int], _Relation]) -> None:
    """Decide that a run does not continue under a changed label while another process has its labels."""
    for (a, b), found in pairs.items():
        one, other = runs[a], runs[b]
        if found is not _Relation.SAME or one.last >= other.first or extends(one.target, other.target):
            continue
        if any(run.target == one.target and one.last < run.first <= other.last for run in runs):
            pairs[a, b] = _Relation.DIFFERENT


def _settle_successions(runs: Sequence[Run], pairs: dict[tuple[int, int], _Relation]) -> None:
    """Of several runs that may precede or follow one, keep those whose labels differ least.

    This handles start times that are equal by chance: a process has only one run at a time, except for copies.
    """

    def relation(a: int, b: int) -> _Relation:
        return _Relation.SAME if a == b else pairs.get((min(a, b), max(a, b)), _Relation.DIFFERENT)

    following: dict[int, list[int]] = {}
    preceding: dict[int, list[int]] = {}
    for (a, b), found in pairs.items():
        if found is _Relation.SAME and runs[a].last < runs[b].first:
            following.setdefault(a, []).append(b)
            preceding.setdefault(b, []).append(a)
    for ends in (following, preceding):
        for index, rivals in ends.items():
            if all(relation(a, b) is not _Relation.DIFFERENT for a, b in combinations(rivals, 2)):
                continue
            far = {rival: distance(runs[index].target, runs[rival].target) for rival in rivals}
            nearest = [rival for rival in rivals if far[rival] == min(far.values())]
            if any(relation(a, b) is _Relation.DIFFERENT for a, b in combinations(nearest, 2)):
                raise _ambiguous(runs[nearest[0]], runs[nearest[1]], f"and each may continue {_shown(runs[index])}")
            for rival in rivals:
                if all(relation(rival, kept) is _Relation.DIFFERENT for kept in nearest):
                    pairs[min(index, rival), max(index, rival)] = _Relation.DIFFERENT


def _groups(count: int, same: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The numbers below `count`, in groups connected by the pairs (union-find)."""
    leader = list(range(count))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for a, b in same:
        one, other = sorted((find(a), find(b)))
        leader[other] = one
    groups: dict[int, list[int]] = {}
    for index in range(count):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def _process(runs: Sequence[Run], begin: float) -> Process:
    start = next((run.start for run in runs if run.start is not None), None)
    inside = start is not None and start > begin
    follows = any(run.new for run in runs)
    counted = any(samples.values[0] for samples in runs[0].counters.values())
    if start is not None and inside and not follows and start > runs[0].first + _SKEW_SECONDS and counted:
        raise MsrtraceError(
            f"{START}{selector(runs[0].target)} is {start - runs[0].first:.0f} s later than the first sample: the "
            "clock of the host or of Prometheus is wrong, so whether it started in the window is unknown"
        )
    return Process(tuple(runs), inside or follows)


def _matters(one: Process, other: Process, begin: float) -> bool:
    """Whether the sums would change if the two processes were one."""
    both = sorted((*one.runs, *other.runs), key=lambda run: (run.first, run.target))
    apart, more = one.increases(), other.increases()
    try:
        merged = _process(both, begin).increases()
    except MsrtraceError:  # as one they cannot have made these counts
        return True
    names = merged.keys() | apart.keys() | more.keys()
    return any(abs(merged.get(key, 0) - apart.get(key, 0) - more.get(key, 0)) > 1e-6 for key in names)


def _check_beginnings(found: Sequence[Process]) -> None:
    """Raise MsrtraceError for counts that appear within the window if their start time is unknown."""
    if not found:
        return
    begun = min(process.first for process in found)
    usual = median(run.interval for process in found for run in process.runs)
    ends: dict[str, float] = {}
    for run in (run for process in found for run in process.runs):
        ends[run.machine] = min(run.last, ends.get(run.machine, inf))
    for process in found:
        run = process.runs[0]
        late = process.first - begun > usual or ends[run.machine] < run.first
        counted = next((metric for (metric, _), samples in run.counters.items() if samples.values[0]), None)
        if late and counted and process.start is None and not process.from_zero:
            raise MsrtraceError(
                f"{counted}{selector(run.target)} begins within the window, and {START}, which would say since when "
                "it counts, is not stored"
            )


def _shown(run: Run) -> str:
    return selector(run.target)


def _ambiguous(one: Run, other: Run, why: str) -> MsrtraceError:
    names = differing(one.target, other.target)
    missing = f"; {START}, which would decide it, is not stored" if one.start is None or other.start is None else ""
    if not names:
        return MsrtraceError(
            f"cannot tell whether {_shown(one)} was one msrtrace or two, with a restart before {other.first:.0f} s, "
            f"{why}{missing}; store that, or compare a window that ends before it or begins after it"
        )
    what = f"label {names[0]}" if len(names) == 1 else f"labels {', '.join(names)}"
    return MsrtraceError(
        f"cannot tell whether {_shown(one)} and {_shown(other)} are one msrtrace or two: they differ in the {what} "
        f"{why}{missing}; select one of them, as with {selector(one.target, names[:1])}"
    )
