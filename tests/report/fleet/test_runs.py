# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes one after the other behind the same labels: what each counted in the window."""

from __future__ import annotations

import pytest
from fleets import CALLS, LOCAL, REDUNDANT, START, UPDATES, Stored, counted, fleet_reports, host, merged, only
from hypothesis import given
from hypothesis import strategies as st

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.prometheus_api import Samples
from tracer.report.fleet.runs import runs
from tracer.report.fleet.targets import Stream

NOW = 1_700_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]
OLD = NOW - 90_000.0
TITLE = LOCAL["instance"]


def updates_of(values: list[float | None], starts: list[float | None]) -> Stored:
    """A host with these scraped filter updates and start times."""
    stored = host(LOCAL, SCRAPES, updates=0, before=0, start=None, info={"layout": "filter-only"})
    stored |= {CALLS: [], REDUNDANT: []}
    for name, column in ((UPDATES, values), (START, starts)):
        samples = {t: value for t, value in zip(SCRAPES, column, strict=True) if value is not None}
        stored[name] = [(LOCAL, samples)] if samples else []
    return stored


def updates(values: list[float | None], starts: list[float | None] | float | None, window: int = 3600) -> int:
    """The updates in the report on that host."""
    column = starts if isinstance(starts, list) else [starts] * len(SCRAPES)
    [report] = fleet_reports(updates_of(values, column), NOW, window=window)
    return report.totals.filter_updates or 0


@pytest.mark.parametrize("start", [OLD, None])
def test_a_process_counts_from_the_first_scrape_in_the_window(start: float | None) -> None:
    assert updates([1000, 1010, 1010, 1090, 1100], start) == 100


def test_a_process_that_started_in_the_window_counts_from_0() -> None:
    assert updates([30, 40, 40, 40, 50], NOW - 65) == 50
    assert updates([30, 40, 40, 40, 50], NOW - 65, window=62) == 20


@pytest.mark.parametrize("start", [OLD, None])
def test_missing_and_late_scrapes_do_not_matter(start: float | None) -> None:
    scrapes = [NOW - 600, NOW - 585, NOW - 400.5, NOW - 391, NOW - 10]
    assert counted(host(LOCAL, scrapes, start=start), NOW) == {TITLE: (100, 1300)}


def test_counts_after_a_restart_are_added() -> None:
    new = NOW - 20
    assert updates([100, 130, 130, 5, 25], [OLD, OLD, OLD, new, new]) == 30 + 25


def test_a_restart_is_seen_where_the_new_counts_are_higher() -> None:
    """Only its start time shows it."""
    new = NOW - 20
    assert updates([100, 130, 130, 140, 150], [OLD, OLD, OLD, new, new]) == 30 + 150


def test_a_host_whose_clock_was_never_set_may_restart() -> None:
    """Of start times in 1970 only the change means something."""
    assert updates([100, 130, 130, 140, 150], [5, 5, 5, 9, 9]) == 30 + 150


def test_a_missing_start_time_is_that_of_the_neighbouring_scrapes() -> None:
    assert updates([100, 130, 130, 140, 150], [None, OLD, None, OLD, None]) == 50


def test_without_start_times_a_fall_restarts_all_counters() -> None:
    """Also those that are already above their old counts."""
    target = {**LOCAL, "msr": "0x10", "name": "?", "access": "read", "action": "disable", "cause": "filter_change"}
    stored = updates_of([100, 130, 130, 5, 25], [None] * 5)
    stored["msrtrace_build_info"] = host(LOCAL, SCRAPES)["msrtrace_build_info"]
    for name in (CALLS, REDUNDANT):
        stored[name] = [(target, dict(zip(SCRAPES, [1.0, 2.0, 3.0, 4.0, 24.0], strict=True)))]
    assert counted(stored, NOW) == {TITLE: (30 + 25, 2 + 24)}


def test_a_fall_after_the_last_stored_start_time_is_a_restart() -> None:
    assert updates([100, 130, 130, 5, 25], [OLD, OLD, OLD, None, None]) == 30 + 25


@pytest.mark.parametrize(
    ("values", "starts", "named"),
    [
        ([100, 7, 110, 8, 120], [OLD, OLD + 9, OLD, OLD + 9, OLD], START),
        ([100, 110, 7, 8, 9], [OLD, OLD, OLD - 9, OLD - 9, OLD - 9], START),
        ([100, 7, 110, 8, 120], [OLD] * 5, UPDATES),
        ([100, 110, 120, 7, 8], [OLD] * 5, UPDATES),
        ([100, 110, 500, 510, 520], [OLD, OLD, OLD + 9, OLD + 9, OLD + 9], START),
        ([100, 110, 500, 510, 520], [OLD, OLD, None, NOW - 10, NOW - 10], START),
    ],
)
def test_two_processes_with_the_same_labels_are_refused(
    values: list[float | None], starts: list[float | None], named: str
) -> None:
    with pytest.raises(MsrtraceError, match=rf"{named}.*(label|is unknown)"):
        updates(values, starts)


def test_without_start_times_a_kind_of_call_that_vanishes_is_refused() -> None:
    stored = host(LOCAL, SCRAPES, start=None)
    for name in (CALLS, REDUNDANT):
        labels, samples = stored[name][0]
        stored[name][0] = (labels, {t: v for t, v in samples.items() if t < NOW - 20})
    with pytest.raises(MsrtraceError, match=f"{CALLS}.* lost a kind of call, and without {START}"):
        counted(stored, NOW)


@pytest.mark.parametrize("start", [OLD, None])
def test_a_restart_with_by_vm_keeps_both_parts(start: float | None) -> None:
    plain = host(LOCAL, SCRAPES[:3], updates=20, start=start)
    after = host(LOCAL, SCRAPES[3:], updates=8, before=2000, start=start and NOW - 25)
    by_vm = {
        name.replace("msrtrace_", "msrtrace_host_") if name.startswith(("msrtrace_int", "msrtrace_fil")) else name: it
        for name, it in after.items()
    }
    assert counted(merged(plain, by_vm), NOW) == {TITLE: (20 + 2008, 13 * (20 + 2008))}


@pytest.mark.parametrize("start", [OLD, None])
def test_a_kind_of_call_that_had_not_happened_counts_from_0(start: float | None) -> None:
    stored = host(LOCAL, SCRAPES, start=start)
    labels = {**stored[CALLS][0][0], "msr": "0x48"}
    for name in (CALLS, REDUNDANT):
        stored[name].append((labels, {SCRAPES[3]: 7.0, SCRAPES[4]: 9.0}))
    assert counted(stored, NOW) == {TITLE: (100, 1300 + 9)}


@pytest.mark.parametrize("kinds", [1, 6, 12])
@pytest.mark.parametrize("start", [OLD, None])
def test_a_kind_of_call_with_more_than_can_have_been_made_since_the_scrape_before_is_refused(
    kinds: int, start: float | None
) -> None:
    """It had been called before, and its series was dropped: by metric_relabel_configs, say."""
    stored = host(LOCAL, SCRAPES, start=start)
    for metric in (CALLS, REDUNDANT):
        late = only({metric: stored[metric][:kinds]}, SCRAPES[2], NOW)[metric]
        stored[metric] = [*late, *stored[metric][kinds:]]
    with pytest.raises(MsrtraceError, match=r'\{.*msr="0x1.*\} begins within the window, at 1050, more than can have'):
        counted(stored, NOW)


def test_redundant_calls_that_begin_later_than_their_calls_are_refused() -> None:
    stored = host(LOCAL, SCRAPES, before=0, start=OLD)
    stored[REDUNDANT] = [*only({REDUNDANT: stored[REDUNDANT][:1]}, SCRAPES[1], NOW)[REDUNDANT], *stored[REDUNDANT][1:]]
    with pytest.raises(MsrtraceError, match=rf'{REDUNDANT}.*msr="0x10".* begins within the window, at 25'):
        counted(stored, NOW)


@pytest.mark.parametrize(("first", "last"), [(8.0, 10.0), (1008.0, 1010.0)])
def test_calls_of_creations_begin_with_the_vcpus_that_were_created(first: float, last: float) -> None:
    stored = host(LOCAL, SCRAPES, start=OLD)
    labels = {**stored[CALLS][0][0], "cause": "vcpu_create"}
    for metric in (CALLS, REDUNDANT):
        stored[metric].append((labels, {SCRAPES[3]: first, SCRAPES[4]: last}))
    stored["msrtrace_vcpus_created_total"] = [(LOCAL, dict(zip(SCRAPES, [70.0, 70, 70, 78, 80], strict=True)))]
    if first < 1000:
        assert counted(stored, NOW) == {TITLE: (100, 1300 + last)}
        return
    with pytest.raises(MsrtraceError, match=r'cause="vcpu_create".* begins within the window, at 1008'):
        counted(stored, NOW)


def test_the_first_calls_of_a_process_count_from_0() -> None:
    stored = host(LOCAL, SCRAPES, updates=0, before=0, start=OLD)
    for name in (CALLS, REDUNDANT, UPDATES):
        stored[name] = [(labels, dict(zip(SCRAPES, [0.0, 0, 0, 7, 9], strict=True))) for labels, _ in stored[name]]
        if name != UPDATES:
            stored[name] = only({name: stored[name]}, SCRAPES[3], NOW)[name]
    assert counted(stored, NOW) == {TITLE: (9, 117)}


@pytest.mark.parametrize("metric", [CALLS, REDUNDANT, UPDATES])
def test_a_metric_first_stored_within_the_window_is_refused(metric: str) -> None:
    """It counted before that, so it does not count from 0."""
    stored = host(LOCAL, SCRAPES, start=OLD)
    stored[metric] = only({metric: stored[metric]}, SCRAPES[2], NOW)[metric]
    with pytest.raises(MsrtraceError, match=f"{metric}.* is not stored from the first scrape on"):
        counted(stored, NOW)


def test_a_start_later_than_the_first_sample_is_refused() -> None:
    with pytest.raises(MsrtraceError, match=f"{START}.* later than the first sample: the clock"):
        updates([100, 110, 120, 130, 140], NOW + 60)


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(0, 10**9), st.sampled_from([OLD, None]))
def test_what_was_added_between_scrapes_is_the_increase(added: list[int], first: int, start: float | None) -> None:
    value, samples = float(first), {SCRAPES[0]: float(first)}
    for time, more in zip(SCRAPES[1:], added, strict=True):
        value += more
        samples[time] = value
    stream = Stream((), {(UPDATES, ()): Samples.of(samples)})
    if start:
        stream.series[START, ()] = Samples.of(dict.fromkeys(SCRAPES, start))
    [run] = runs(stream, NOW - 60)
    counter = run.counters[UPDATES, ()]
    assert counter.values[-1] - counter.values[0] == sum(added)
    assert (run.start, run.new, run.scrapes) == (start, False, tuple(SCRAPES))
