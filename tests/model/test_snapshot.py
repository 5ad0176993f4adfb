# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots: sums, differences, and merging."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.model.exits import RESULTS, Exit
from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot, VmInfo

TSC = Call(0x10, "read", "disable", "vcpu_create", "vmx_vcpu_create")
FS_BASE = Call(0xC0000100, "read_write", "enable", "filter_change", "vmx_msr_filter_changed")
FUNCTIONS, MAPS = ("vmx_msr_filter_changed", "vmx_enable_intercept_for_msr"), ("calls", "threads", "updates")

counts = st.integers(0, 10**6)
pids = st.sampled_from([0, 100, 200, 300])
kinds = st.builds(
    Call,
    msr=st.sampled_from([0x10, 0x48, 0xC0000100]),
    access=st.sampled_from(["read", "write", "read_write"]),
    action=st.sampled_from(["enable", "disable"]),
    cause=st.sampled_from(["filter_change", "vcpu_create"]),
    caller=st.sampled_from(["vmx_msr_filter_changed", "vmx_vcpu_create"]),
    pid=pids,
)
durations = st.builds(
    Durations,
    count=st.integers(1, 10**6),
    seconds=st.integers(0, 10**12).map(lambda n: n / 1e9),
    buckets=st.tuples(st.integers(0, 24), counts).map(lambda at: (*[0] * at[0], at[1], *[0] * (24 - at[0]))),
)
exits = st.builds(
    Exit,
    msr=st.sampled_from([0x10, 0x48, 0xC0000100]),
    access=st.sampled_from(["read", "write"]),
    path=st.sampled_from(["fast", "slow"]),
    result=st.sampled_from(list(RESULTS)),
    guest=st.sampled_from(["l1", "l2"]),
    pid=pids,
)
by_pid = st.dictionaries(pids, durations, max_size=3)
quick = settings(max_examples=40)


def outcomes(known: bool) -> st.SearchStrategy[Outcome]:
    rest = counts if known else st.none()
    return st.builds(Outcome, st.integers(1, 10**6), rest, rest, rest, rest)


def snapshots(known: bool) -> st.SearchStrategy[Snapshot]:
    return st.builds(
        Snapshot,
        layout=st.just("toggle"),
        redundancy=st.just("exact" if known else "unknown"),
        calls=st.dictionaries(kinds, outcomes(known), max_size=4),
        updates=by_pid,
        recalcs=by_pid,
        exits=st.dictionaries(exits, st.integers(1, 10**6), max_size=4),
        probes=st.tuples(
            *[st.builds(Probe, st.just(f), st.just(f), st.just(True), st.just(f), counts) for f in FUNCTIONS]
        ),
        maps=st.tuples(*[st.builds(Map, st.just(name), counts, st.just(10**6), counts) for name in MAPS]),
        unpaired_returns=counts,
        unpaired_refusals=counts,
        read_failures=counts,
        vcpus_seen=counts,
        vmms_seen=counts,
        vcpus_created=counts,
        creation_recalcs=counts,
    )


two = st.booleans().flatmap(lambda known: st.tuples(snapshots(known), snapshots(known)))
one = st.booleans().flatmap(snapshots)


def totals(snapshot: Snapshot) -> tuple[Outcome | None, Durations, Durations, int]:
    """All that was counted, over all VMs."""
    values = list(snapshot.calls.values())
    calls = sum(values[1:], values[0]) if values else None
    updates, recalcs = (sum(of.values(), Durations()) for of in (snapshot.updates, snapshot.recalcs))
    return calls, updates, recalcs, sum((snapshot.exits or {}).values())


def test_outcomes_add_and_subtract() -> None:
    assert Outcome(7, 5, 1, 2, 0) + Outcome(3, 1, 1, 0, 4) == Outcome(10, 6, 2, 2, 4)
    assert Outcome(7, 5, 1, 2, 4) - Outcome(3, 1, 1, 0, 4) == Outcome(4, 4, 0, 2, 0)


@pytest.mark.parametrize("other", [Outcome(3), Outcome(3, 1, 1, 1, None), Outcome(3, None, 1, 1, 1)])
def test_what_is_unknown_once_is_unknown_in_the_sum(other: Outcome) -> None:
    known = Outcome(7, 5, 4, 3, 2)
    for result in (known + other, other + known):
        assert result.calls == 10
        assert (result.redundant is None, result.refused is None) == (other.redundant is None, other.refused is None)
    difference = known - other
    assert difference.calls == 4
    assert (difference.redundant is None, difference.refused is None) == (
        other.redundant is None,
        other.refused is None,
    )


def test_durations_add_and_subtract() -> None:
    one = Durations(3, 0.5, (1, 2, *[0] * 23))
    other = Durations(2, 0.25, (0, 1, *[0] * 22, 1))
    assert one + other == Durations(5, 0.75, (1, 3, *[0] * 22, 1))
    assert one - other == Durations(1, 0.25, (1, 1, *[0] * 22, -1))
    with pytest.raises(ValueError, match="zip"):
        one + Durations(1, 0.5, (1,))


def test_the_bounds_are_those_of_the_bpf_program() -> None:
    """Powers of two from 128 ns to 1.07 s, as bpf/msrtrace.c counts them."""
    assert DURATION_BOUNDS[:3] == (128e-9, 256e-9, 512e-9)
    assert (len(DURATION_BOUNDS), DURATION_BOUNDS[-1]) == (24, 2**30 * 1e-9)


def test_cumulative_buckets_end_with_all_updates() -> None:
    rows = Durations(9, 0.5, (2, 3, *[0] * 22, 4)).cumulative()
    assert rows[:3] == [(128e-9, 2), (256e-9, 5), (512e-9, 5)]
    assert rows[-2:] == [(2**30 * 1e-9, 5), (float("inf"), 9)]
    assert [bound for bound, _ in rows[:-1]] == list(DURATION_BOUNDS)


@quick
@given(two)
def test_what_happened_since_is_what_was_added(pair: tuple[Snapshot, Snapshot]) -> None:
    later, earlier = pair
    assert later.after(earlier).since(earlier) == later


@quick
@given(two)
def test_the_order_of_a_sum_does_not_matter(pair: tuple[Snapshot, Snapshot]) -> None:
    one, other = pair
    whole, turned = one.after(other), other.after(one)
    assert (whole.calls, whole.updates, whole.recalcs) == (turned.calls, turned.updates, turned.recalcs)
    assert whole.exits == turned.exits
    assert [p.missed for p in whole.probes] == [p.missed for p in turned.probes]
    assert [m.dropped for m in whole.maps] == [m.dropped for m in turned.maps]
    for name in (
        "unpaired_returns",
        "unpaired_refusals",
        "read_failures",
        "vcpus_seen",
        "vmms_seen",
        "vcpus_created",
        "creation_recalcs",
    ):
        assert getattr(whole, name) == getattr(one, name) + getattr(other, name)


@quick
@given(one)
def test_a_snapshot_since_itself_is_empty(snapshot: Snapshot) -> None:
    nothing = snapshot.since(snapshot)
    assert (nothing.calls, nothing.updates, nothing.recalcs, nothing.exits) == ({}, {}, {}, {})
    assert not nothing.lower_bound
    assert (nothing.vcpus_seen, nothing.layout, nothing.redundancy) == (0, snapshot.layout, snapshot.redundancy)
    assert [(m.entries, m.capacity) for m in nothing.maps] == [(m.entries, m.capacity) for m in snapshot.maps]


@quick
@given(one, st.sets(pids))
def test_vms_that_are_gone_stay_in_the_totals(snapshot: Snapshot, gone: set[int]) -> None:
    snapshot = replace(snapshot, by_vm=True, vms={100: VmInfo("web"), 200: VmInfo("db")})
    folded = snapshot.without_vms(gone)
    assert totals(folded) == totals(snapshot)
    assert folded.pids & gone <= {0}
    assert set(folded.vms) == {100, 200} - gone
    alive = {100, 200, 300} - gone
    for before, after in ((snapshot.updates, folded.updates), (snapshot.recalcs, folded.recalcs)):
        assert {pid: before[pid] for pid in alive & before.keys()} == {pid: after[pid] for pid in alive & after.keys()}
    assert folded.without_vms(gone) == folded


def test_exits_that_are_not_counted_are_none_and_not_0() -> None:
    kind = Exit(0x48, "write", "slow", "filtered", "l1", 100)
    without, counted = Snapshot("toggle"), Snapshot("toggle", exits={kind: 7})
    assert without.after(without).exits is None
    assert without.since(without).exits is None
    assert without.without_vms({100}).exits is None
    assert counted.after(without).exits == without.after(counted).exits == {kind: 7}
    assert counted.without_vms({100}).exits == {replace(kind, pid=0): 7}
    assert counted.pids == {100}


def test_a_vm_that_is_gone_is_counted_under_pid_0() -> None:
    web, db = replace(TSC, pid=100), replace(TSC, pid=200)
    snapshot = Snapshot(
        "toggle",
        calls={web: Outcome(7, 0, 7, 0, 0), db: Outcome(3, 1, 2, 0, 0), replace(TSC, pid=0): Outcome(2, 0, 2, 0, 0)},
        updates={100: Durations(5, 0.5), 200: Durations(1, 0.25)},
        recalcs={100: Durations(2, 0.125)},
        vms={100: VmInfo("web"), 200: VmInfo("db")},
    )
    folded = snapshot.without_vms({100})
    assert folded.calls == {replace(TSC, pid=0): Outcome(9, 0, 9, 0, 0), db: Outcome(3, 1, 2, 0, 0)}
    assert folded.updates == {0: Durations(5, 0.5), 200: Durations(1, 0.25)}
    assert (folded.recalcs, folded.vms) == ({0: Durations(2, 0.125)}, {200: VmInfo("db")})


def test_since_subtracts_every_count() -> None:
    first = Snapshot(
        "toggle",
        calls={TSC: Outcome(7, 0, 7, 0, 0)},
        probes=(Probe("f", "f", True, "", 2),),
        maps=(Map("calls", 1, 8192, 3),),
        vcpus_seen=1,
        vmms_seen=1,
        vcpus_created=5,
        creation_recalcs=7,
        module_unloads=1,
    )
    later = replace(
        first,
        calls={TSC: Outcome(7, 0, 7, 0, 0), FS_BASE: Outcome(4, 4, 0, 0, 0)},
        probes=(Probe("f", "f", True, "", 5),),
        maps=(Map("calls", 2, 8192, 7),),
        vcpus_seen=3,
        vmms_seen=2,
        vcpus_created=16,
        creation_recalcs=20,
        module_unloads=3,
    )
    between = later.since(first)
    assert between.calls == {FS_BASE: Outcome(4, 4, 0, 0, 0)}
    assert between.probes == (Probe("f", "f", True, "", 3),)
    assert between.maps == (Map("calls", 2, 8192, 4),)
    assert (between.vcpus_seen, between.vmms_seen, between.module_unloads) == (2, 1, 2)
    assert (between.vcpus_created, between.creation_recalcs) == (11, 13)


def test_creations_that_were_not_followed_once_are_unknown_in_the_sum() -> None:
    followed, blind = Snapshot("set", vcpus_created=3), Snapshot("set", creations_observable=False)
    assert followed.after(followed).creations_observable
    assert not followed.after(blind).creations_observable
    assert not blind.after(followed).creations_observable


def test_losses_outlive_the_probe_that_had_them() -> None:
    """After a reload the functions may differ: a kvm_intel of another build."""
    earlier = Snapshot("toggle", probes=(Probe("old", "old", True, "", 2),), maps=(Map("old", 9, 9, 3),))
    assert Snapshot("set", probes=(Probe("new", "new", True, ""),)).after(earlier).lower_bound


@pytest.mark.parametrize(
    ("loss", "lower_bound"),
    [
        ({}, False),
        ({"vcpus_seen": 5, "module_unloads": 2, "calls_observable": False, "redundancy": "unknown"}, False),
        ({"probes": (Probe("f", None, False, "no such function"),), "maps": (Map("calls", 8192, 8192),)}, False),
        ({"unpaired_returns": 1}, True),
        ({"read_failures": 1}, True),
        ({"blind_seconds": 0.2}, True),
        ({"probes": (Probe("f", "f", True, ""), Probe("g", "g", True, "", 1))}, True),
        ({"maps": (Map("calls", 8192, 8192), Map("threads", 1, 16384, 1))}, True),
    ],
)
def test_a_loss_makes_the_counts_a_lower_bound(loss: dict[str, Any], lower_bound: bool) -> None:
    assert replace(Snapshot("toggle"), **loss).lower_bound is lower_bound


@given(st.lists(st.integers(0, 10**14), max_size=20), st.randoms(use_true_random=False))
def test_sums_of_durations_do_not_depend_on_their_order(nanoseconds: list[int], random: Random) -> None:
    """The time of a VM that ends moves to another sum: one bit less there, and Prometheus sees a reset."""
    parts = [Durations(1, value / 1e9) for value in nanoseconds]
    total = sum(parts, Durations())
    random.shuffle(parts)
    assert sum(parts, Durations()) == total
    assert total.seconds == sum(nanoseconds) / 1e9
