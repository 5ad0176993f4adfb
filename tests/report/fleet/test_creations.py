# SPDX-License-Identifier: GPL-2.0-or-later
"""Recalculations, and what the creation of a vCPU takes, in reports of a fleet."""

from __future__ import annotations

from fractions import Fraction

import pytest
from fleets import CALLS, REDUNDANT, Samples, Stored, fleet_reports, labelled, merged
from fleets import host as made_up

from tracer.report.compare import compare
from tracer.report.creation import PerCreation
from tracer.report.report import PerCreation as Reported
from tracer.report.report import Report

NOW = 1_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]
RECALCULATIONS, CREATED = "msrtrace_recalculations_total", "msrtrace_vcpus_created_total"


def host(
    instance: str, vcpus: int, each: int, *, others: int = 5, scrapes: list[float] = SCRAPES, start: float = 5.0
) -> Stored:
    """A host of 6.17 or newer that creates vCPUs, EACH in so many recalculations of one call; a half is redundant."""
    target, last = {"job": "msrtrace", "instance": instance}, len(scrapes) - 1

    def grown(total: int) -> Samples:
        return {time: 70.0 + total * place // last for place, time in enumerate(scrapes)}

    stored = made_up(target, scrapes, info={"layout": "recalc"}, start=start)
    made = {**target, "msr": "0x10", "name": "?", "access": "read", "action": "disable", "cause": "vcpu_create"}
    stored[CALLS].append((made, grown(vcpus * each)))
    stored[REDUNDANT].append((made, grown(vcpus * each // 2)))
    stored[CREATED] = [(target, grown(vcpus))]
    by_cause = {"vcpu_create": vcpus * each, "recalc": others}
    stored[RECALCULATIONS] = [({**target, "cause": cause}, grown(count)) for cause, count in by_cause.items()]
    return stored


def reported(stored: Stored) -> list[Report]:
    return fleet_reports(stored, NOW, window=3600)


def test_recalculations_and_creations_are_those_in_the_window() -> None:
    [found] = reported(host("a", 4, 2))
    assert (found.totals.recalculations, found.totals.creation_recalculations) == (4 * 2 + 5, 4 * 2)
    assert found.totals.vcpus_created == 4
    assert found.per_vcpu_creation == Reported(calls=2, redundant=1, recalculations=2)
    assert found.recalculation_seconds is None  # not queried


def test_hosts_are_compared() -> None:
    sides = [reported(merged(host("a", 4, 2), host("b", 8, 2))), reported(host("c", 4, 4))]
    comparison = compare(*sides)
    figures = [comparison.per_creation(side) for side in (comparison.base, comparison.new)]
    assert figures == [PerCreation(*map(Fraction, of)) for of in ((2, 1, 2), (4, 2, 4))]


def test_a_restart_adds_up() -> None:
    old, new = host("a", 4, 2, scrapes=[time - 300 for time in SCRAPES]), host("a", 6, 2, start=NOW - 100)
    [found] = reported(merged(old, new))
    # The new process counts from 0: its counters had 70 at its first scrape.
    assert found.totals.vcpus_created == 4 + 70 + 6
    assert found.totals.creation_recalculations == 4 * 2 + 70 + 6 * 2


@pytest.mark.parametrize(
    ("missing", "recalculations", "vcpus"),
    [({RECALCULATIONS}, None, 4), ({CREATED}, 13, None), ({RECALCULATIONS, CREATED}, None, None)],
    ids=["recalculations", "vcpus", "both"],
)
def test_what_is_not_stored_is_unknown(missing: set[str], recalculations: int | None, vcpus: int | None) -> None:
    stored = {name: series for name, series in host("a", 4, 2).items() if name not in missing}
    [found] = reported(stored)
    assert (found.totals.recalculations, found.totals.vcpus_created) == (recalculations, vcpus)
    assert found.totals.creation_recalculations is None
    if vcpus:
        assert found.per_vcpu_creation == Reported(calls=2, redundant=1, recalculations=None)
    else:
        assert found.per_vcpu_creation is None


def test_what_an_older_process_of_the_host_did_not_count_is_unknown() -> None:
    """msrtrace was upgraded in the window: the older one gave recalculations no cause."""
    old = host("a", 4, 2, scrapes=[time - 300 for time in SCRAPES])
    del old[CREATED]
    [*_, (labels, samples)] = old[RECALCULATIONS]
    old[RECALCULATIONS] = [({name: value for name, value in labels.items() if name != "cause"}, samples)]
    [found] = reported(merged(old, host("a", 6, 2, start=NOW - 100)))
    assert (found.totals.recalculations, found.totals.vcpus_created) == (5 + 140 + 6 * 2 + 5, None)
    assert (found.totals.creation_recalculations, found.per_vcpu_creation) == (None, None)


@pytest.mark.parametrize("metric", [RECALCULATIONS, CREATED])
def test_what_is_stored_only_from_later_on_is_unknown(metric: str) -> None:
    """Filter updates and calls can be compared all the same."""
    stored = host("a", 4, 2)
    stored[metric] = [(labels, {t: v for t, v in at.items() if t > SCRAPES[1]}) for labels, at in stored[metric]]
    [found] = reported(stored)
    known = (found.totals.recalculations, found.totals.vcpus_created)
    assert known == ((None, 4) if metric == RECALCULATIONS else (13, None))
    assert found.totals.filter_updates == 100


def test_a_targets_own_label_named_cause_is_not_msrtraces() -> None:
    stored = labelled(
        {name: series for name, series in host("a", 4, 2).items() if name != RECALCULATIONS}, cause="mine"
    )
    renamed = [({**labels, "exported_cause": labels["cause"]}, at) for labels, at in host("a", 4, 2)[RECALCULATIONS]]
    stored[RECALCULATIONS] = [({**labels, "cause": "mine"}, at) for labels, at in renamed]
    for metric in (CALLS, REDUNDANT):
        first = host("a", 4, 2)[metric]
        stored[metric] = [({**labels, "exported_cause": labels["cause"], "cause": "mine"}, at) for labels, at in first]
    [found] = reported(stored)
    assert (found.totals.recalculations, found.totals.creation_recalculations, found.totals.vcpus_created) == (13, 8, 4)
