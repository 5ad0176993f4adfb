# SPDX-License-Identifier: GPL-2.0-or-later
"""Filter updates as the BPF program counts them, on a stand-in for KVM."""

from __future__ import annotations

import os
import struct
import threading
import time

import pytest
from kvm_standin import HOOK, StandIn, kinds

from tracer.model.snapshot import DURATION_BOUNDS


@pytest.mark.parametrize("nanoseconds", [0, 3_000_000])
def test_duration(toggle: StandIn, nanoseconds: int) -> None:
    toggle.inside(lambda: time.sleep(nanoseconds / 1e9))
    before = time.perf_counter()
    toggle.update(toggle.vcpu())
    longest = time.perf_counter() - before
    [duration] = toggle.counted().updates.values()
    assert nanoseconds / 1e9 <= duration.seconds <= longest
    at = duration.buckets.index(1)
    bounds = (0, *DURATION_BOUNDS, float("inf"))
    assert bounds[at] < duration.seconds <= bounds[at + 1]
    assert (duration.count, sum(duration.buckets)) == (1, 1)


def test_an_update_whose_return_is_not_seen_is_counted_without_its_time(toggle: StandIn) -> None:
    """The kernel has no place for more of them, say."""
    vcpu, engine = toggle.vcpu(), toggle.engine
    toggle.inside(lambda: None)
    toggle.counted()
    os.close(engine._probes._links[HOOK][0])  # that of the return
    toggle.update(vcpu)
    toggle.update(vcpu)
    program = engine._built.loaded.functions["update_returned"]
    engine._probes._links[HOOK][0] = toggle.link(HOOK, program, at_return=True)
    toggle.update(vcpu)
    counted = toggle.counted()
    [durations] = counted.updates.values()
    missed = {probe.function: probe.missed for probe in counted.probes}
    assert (durations.count, durations.timed, missed[HOOK], counted.lower_bound) == (3, 1, 2, True)
    toggle.update(vcpu)
    assert kinds(toggle) == (1, 0)


def test_the_last_update_of_a_vcpu_is_missed_too_once_that_has_ended(toggle: StandIn) -> None:
    """Nothing says before that it is not under way."""
    vcpu, engine = toggle.vcpu(), toggle.engine
    toggle.inside(lambda: None)
    toggle.counted()
    os.close(engine._probes._links[HOOK][0])  # that of the return
    toggle.update(vcpu)
    program = engine._built.loaded.functions["update_returned"]
    engine._probes._links[HOOK][0] = toggle.link(HOOK, program, at_return=True)
    assert not toggle.counted().lower_bound
    toggle.free(vcpu)
    counted = toggle.counted()
    assert {probe.function: probe.missed for probe in counted.probes if probe.missed} == {HOOK: 1}


def test_a_thread_whose_place_another_has(toggle: StandIn) -> None:
    """It finds its vCPU in the hash table, and leaves the other's place alone."""
    toggle.inside(lambda: None)
    toggle.counted()
    tid, maps = threading.get_native_id(), toggle.engine._built.loaded.maps
    place, members = struct.pack("I", tid % 4096), struct.Struct("QQ")
    assert struct.pack("I", tid) not in maps["threads"].keys()  # noqa: SIM118 (a map of the kernel's)
    for claims, elsewhere in ((0, False), (1, True), (2, True), (0, True)):
        maps["threads_here"].update(place, members.pack(claims, (tid + 4096 << 32) * bool(claims)))
        toggle.update(toggle.vcpu())
        counted = toggle.counted()
        [durations] = counted.updates.values()
        assert (durations.count, durations.timed, counted.lower_bound) == (1, 1, False)
        assert (struct.pack("I", tid) in maps["threads"].keys()) == elsewhere  # noqa: SIM118


def test_updates_for_which_two_cpus_took_a_place_each_are_added(toggle: StandIn) -> None:
    """As if another CPU had looked for the place of the first while it was being taken."""
    toggle.inside(lambda: None)
    toggle.update(toggle.vcpu())
    toggle.counted()
    arrays = toggle.engine._reader._arrays
    updates, counts = arrays["updates"], arrays["counts"]
    [first] = updates.used("kind")
    for member, value in (("count", 3), ("vmm", 0), ("kind", updates.get(first, "kind"))):
        updates.set(first ^ 1, member, value)
    counts.set(0, "places_taken", counts.get(0, "places_taken") + 1)
    toggle.update(toggle.vcpu())
    [durations] = toggle.counted().updates.values()
    assert (durations.count, durations.timed) == (3 + 1, 1)


def test_every_update_is_a_filter_change_where_nothing_else_is(toggle: StandIn) -> None:
    toggle.inside(lambda: None)
    for vcpu in (toggle.vcpu(), toggle.vcpu()):
        toggle.update(vcpu)
        toggle.update(vcpu)
    assert kinds(toggle) == (4, 0)
    assert toggle.last.vcpus_seen >= 2


def test_filter_changes_told_from_other_recomputations(recalc: StandIn) -> None:
    recalc.inside(lambda: None)
    one, two, other = recalc.vcpu(kvm=0x2000), recalc.vcpu(kvm=0x2000), recalc.vcpu(kvm=0x3000)
    for vcpu in (one, two, other):
        recalc.create(vcpu)
        recalc.update(vcpu)
    assert kinds(recalc) == (0, 3)
    recalc.set_filter(0x2000)
    recalc.set_filter(0x2000)  # several before one run are one change
    for vcpu in (one, one, two, other):
        recalc.update(vcpu)
    assert kinds(recalc) == (2, 2)
    late = recalc.vcpu(kvm=0x2000)
    recalc.create(late)  # starts out with the filter
    recalc.update(late)
    assert kinds(recalc) == (0, 1)
    assert recalc.last.vcpus_seen >= 4


def test_a_filter_that_is_refused_changes_nothing(recalc: StandIn) -> None:
    recalc.inside(lambda: None)
    vcpu = recalc.vcpu(kvm=0x4000)
    recalc.create(vcpu)
    recalc.set_filter(0x4000, result=-22)
    recalc.update(vcpu)
    assert kinds(recalc) == (0, 1)
    recalc.set_filter(0x4000)
    recalc.set_filter(0x4000, result=-22)
    recalc.update(vcpu)
    recalc.update(vcpu)
    assert kinds(recalc) == (1, 1)


def test_a_vcpu_that_is_quicker_than_the_ioctl(recalc: StandIn) -> None:
    vcpu = recalc.vcpu(kvm=0x5000)
    recalc.inside(lambda: None)
    recalc.create(vcpu)

    def update_in_another_thread() -> None:
        recalc.inside(lambda: None)
        thread = threading.Thread(target=recalc.update, args=(vcpu,))
        thread.start()
        thread.join()

    recalc.inside(update_in_another_thread)
    recalc.set_filter(0x5000)
    recalc.update(vcpu)
    assert kinds(recalc) == (1, 1)
