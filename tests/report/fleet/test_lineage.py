# SPDX-License-Identifier: GPL-2.0-or-later
"""One process under several sets of labels, and several under nearly the same."""

from __future__ import annotations

import pytest
from fleets import (
    CALLS,
    LOCAL,
    REDUNDANT,
    START,
    Stored,
    counted,
    fleet_reports,
    host,
    labelled,
    merged,
    only,
    relabelled,
)

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.targets import REPLICA_LABELS

NOW = 1_700_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]
MIDDLE = SCRAPES[2]
OLD = NOW - 90_000.0
TITLE = LOCAL["instance"]
ONCE = {TITLE: (100, 1300)}


def one(start: float | None = OLD, updates: int = 100, labels: dict[str, str] | None = None, **more: str) -> Stored:
    return host({**LOCAL, **(labels or {}), **more}, SCRAPES, updates=updates, start=start)


def later(stored: Stored, seconds: float) -> Stored:
    """The same series, scraped that many seconds later, with nothing counted in between."""
    return {
        name: [(labels, {t + seconds: value for t, value in samples.items()}) for labels, samples in series]
        for name, series in stored.items()
    }


# One process whose labels change


@pytest.mark.parametrize("start", [OLD, None])
def test_a_process_continues_when_a_label_is_added(start: float | None) -> None:
    """They were once counted as 1,150 updates."""
    assert counted(relabelled(one(start), MIDDLE, {"dc": "eu"}), NOW) == ONCE


@pytest.mark.parametrize("start", [OLD, None])
def test_a_process_continues_when_a_label_is_removed(start: float | None) -> None:
    assert counted(relabelled(one(start, dc="eu"), MIDDLE, {"dc": None}), NOW) == ONCE


@pytest.mark.parametrize("label", ["dc", "job", "instance", "host"])
def test_a_process_continues_when_a_label_changes(label: str) -> None:
    found = counted(relabelled(one(labels={label: "kvm1"}), MIDDLE, {label: "kvm2"}), NOW)
    assert list(found.values()) == [(100, 1300)]


def test_a_process_continues_when_labels_change_twice() -> None:
    stored = relabelled(relabelled(one(), MIDDLE, {"dc": "eu"}), SCRAPES[4], {"dc": "us", "rack": "7"})
    assert counted(stored, NOW) == ONCE


def test_a_changed_label_without_start_times_is_refused() -> None:
    """It may be another host."""
    stored = relabelled(one(None, host="kvm1"), MIDDLE, {"host": "kvm2"})
    with pytest.raises(
        MsrtraceError, match=rf"they differ in the label host .*{START}, which would decide it, .*host=\"kvm1\""
    ):
        counted(stored, NOW)


def test_a_new_kind_of_call_after_a_change_of_labels_counts_from_0() -> None:
    stored = one()
    labels = {**stored[CALLS][0][0], "msr": "0x48"}
    for name in (CALLS, REDUNDANT):
        stored[name].append((labels, {SCRAPES[3]: 7.0, SCRAPES[4]: 9.0}))
    assert counted(relabelled(stored, MIDDLE, {"dc": "eu"}), NOW) == {TITLE: (100, 1309)}


def test_hosts_that_started_together_are_not_mixed_up_when_relabelled() -> None:
    """The labels that stay say which series belong together."""
    first, second = one(host="kvm1"), one(host="kvm2", updates=40)
    stored = relabelled(merged(first, second), MIDDLE, {"dc": "eu"})
    assert sorted(counted(stored, NOW).values()) == [(40, 520), (100, 1300)]


def test_a_host_with_an_ambiguous_successor_is_refused() -> None:
    before = only(one(), SCRAPES[0], SCRAPES[1])
    after = [only(one(dc=dc, updates=updates), MIDDLE, NOW) for dc, updates in (("eu", 100), ("us", 70))]
    with pytest.raises(MsrtraceError, match="they differ in the label dc and each may continue"):
        counted(merged(before, *after), NOW)


def test_a_label_that_is_added_where_counts_fall_is_refused() -> None:
    """A restart, or another host: the equal start times do not decide it."""
    after = only(labelled(host(LOCAL, SCRAPES, before=10, start=OLD), dc="eu"), MIDDLE, NOW)
    with pytest.raises(MsrtraceError, match="they differ in the label dc"):
        counted(merged(only(one(), SCRAPES[0], SCRAPES[1]), after), NOW)


def test_a_host_that_leaves_and_one_that_joins_are_two() -> None:
    gone = only(one(host="kvm1"), SCRAPES[0], SCRAPES[1])
    come = only(one(OLD + 7, updates=40, host="kvm2"), MIDDLE, NOW)
    assert sorted(counted(merged(gone, come), NOW).values()) == [(20, 20 * 13), (25, 25 * 13)]


def test_a_host_that_joins_with_far_higher_counts_is_refused() -> None:
    """Their start times are equal: by chance, or one was renamed and was very busy in between."""
    come = only(host({**LOCAL, "host": "kvm2"}, SCRAPES, before=5000, start=OLD), MIDDLE, NOW)
    with pytest.raises(MsrtraceError, match="they differ in the label host"):
        counted(merged(only(one(host="kvm1"), SCRAPES[0], SCRAPES[1]), come), NOW)


# One process that is scraped several times


@pytest.mark.parametrize("label", sorted(REPLICA_LABELS))
@pytest.mark.parametrize("start", [OLD, None])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 7.0])
def test_replicas_count_once(label: str, start: float | None, seconds: float) -> None:
    copies = one(start, labels={label: "a"}), later(one(start, labels={label: "b"}), -seconds)
    assert counted(merged(*copies), NOW) == ONCE


def test_a_replica_that_missed_scrapes_and_one_that_came_later_count_once() -> None:
    one_copy = only(one(replica="a"), SCRAPES[0], SCRAPES[2])
    other = only(one(replica="b"), SCRAPES[1], SCRAPES[4])
    assert counted(merged(one_copy, other), NOW) == ONCE


def test_replicas_that_change_a_label_one_after_the_other_count_once() -> None:
    stored = merged(
        relabelled(one(replica="a"), MIDDLE, {"dc": "eu"}), relabelled(one(replica="b"), SCRAPES[3], {"dc": "eu"})
    )
    assert counted(stored, NOW) == ONCE


def test_a_copy_on_a_federating_server_counts_once() -> None:
    above = {"job": "federate", "instance": "prometheus:9090", "cluster": "eu"}
    copy = host({**above, "exported_job": "msrtrace", "exported_instance": TITLE}, SCRAPES, start=OLD)
    assert list(counted(merged(one(), copy), NOW).values()) == [(100, 1300)]


def test_different_processes_with_replica_labels_are_two() -> None:
    """Agents with a label `prometheus`: their start times or their counts differ."""
    for start in (OLD + 7, OLD):
        stored = merged(one(prometheus="kvm1"), one(start, updates=40, prometheus="kvm2"))
        assert sorted(counted(stored, NOW).values()) == [(40, 520), (100, 1300)]


@pytest.mark.parametrize("label", ["dc", "shard", "job", "instance", "host"])
@pytest.mark.parametrize("start", [OLD, None])
def test_equal_counts_under_other_labels_are_refused(label: str, start: float | None) -> None:
    stored = merged(one(start, labels={label: "a"}), later(one(start, labels={label: "b"}), -3))
    if label == "instance" and not start:
        assert sorted(counted(stored, NOW).values()) == [(100, 1300), (100, 1300)]
        return
    with pytest.raises(
        MsrtraceError, match=rf'they differ in the label {label} .*select one of them, .*{{{label}="[ab]"}}'
    ):
        counted(stored, NOW)


@pytest.mark.parametrize("label", ["dc", "shard"])
def test_idle_hosts_with_equal_counts_are_not_refused(label: str) -> None:
    idle = (one(updates=0, labels={label: value}) for value in ("a", "b"))
    busy = one(OLD + 7, instance="busy")
    assert counted(merged(*idle, busy), NOW) == {"busy": (100, 1300)}


@pytest.mark.parametrize("label", ["instance", "host", "node"])
def test_machines_scraped_at_the_same_moments_are_several(label: str) -> None:
    """Two scrapes of one process have different times, and a copy of a scrape has the same instance."""
    stored = merged(one(labels={label: "kvm1"}), one(labels={label: "kvm2"}))
    assert list(counted(stored, NOW).values()) == [(100, 1300)] * 2


def test_different_kernels_mean_different_hosts() -> None:
    other = host({**LOCAL, "dc": "b"}, SCRAPES, start=OLD, info={"kernel": "6.12"})
    assert list(counted(merged(one(dc="a"), other), NOW).values()) == [(100, 1300)] * 2


# Processes that restart with their labels


def test_a_pod_that_is_restarted_is_one_host() -> None:
    old = only(one(pod="msrtrace-x"), SCRAPES[0], SCRAPES[2])
    new = host({**LOCAL, "pod": "msrtrace-y"}, SCRAPES[3:], before=5, updates=20, start=SCRAPES[2] + 5)
    [report] = fleet_reports(merged(old, new), NOW)
    assert (report.title, report.totals.filter_updates) == (TITLE, 50 + 25)
    assert report.notes == [f"{TITLE}: msrtrace was restarted once"]


def test_a_pod_that_passed_the_counts_of_the_old_one_counts_from_0() -> None:
    old = only(one(pod="msrtrace-x"), SCRAPES[0], SCRAPES[2])
    new = host({**LOCAL, "pod": "msrtrace-y"}, SCRAPES[3:], before=2000, updates=20, start=SCRAPES[2] + 5)
    assert counted(merged(old, new), NOW) == {TITLE: (50 + 2020, 13 * (50 + 2020))}


def test_a_new_process_on_another_host_is_another_host() -> None:
    old = only(one(host="kvm1"), SCRAPES[0], SCRAPES[2])
    new = host({**LOCAL, "host": "kvm2"}, SCRAPES[3:], before=5, updates=20, start=SCRAPES[2] + 5)
    assert sorted(counted(merged(old, new), NOW).values()) == [(25, 325), (50, 650)]


def test_hosts_first_scraped_within_the_window() -> None:
    """One that already ran counts from its first scrape, one that started in the window from 0."""
    always = one(instance="kvm1")
    ran = only(one(OLD + 7, instance="kvm2"), MIDDLE, NOW)
    started = host({**LOCAL, "instance": "kvm3"}, SCRAPES[2:], before=5, updates=20, start=MIDDLE - 9)
    assert counted(merged(always, ran, started), NOW) == {
        "kvm1": (100, 1300),
        "kvm2": (50, 650),
        "kvm3": (25, 325),
    }


def test_without_start_times_a_host_first_scraped_within_the_window_is_refused() -> None:
    always, new = one(None, instance="kvm1"), only(one(None, 40, instance="kvm2"), SCRAPES[3], NOW)
    with pytest.raises(MsrtraceError, match=f'instance="kvm2".* begins within the window, and {START}'):
        counted(merged(always, new), NOW)
