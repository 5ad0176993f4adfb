# SPDX-License-Identifier: GPL-2.0-or-later
"""The creation of vCPUs as the BPF program follows it, on a stand-in for KVM."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
from kvm_standin import BOTH, READ, StandIn, Vcpu

from tracer.model.snapshot import Snapshot


def causes(counted: Snapshot) -> dict[tuple[str, str], int]:
    """Calls by cause and caller."""
    found = Counter[tuple[str, str]]()
    for call, outcome in counted.calls.items():
        found[call.cause, call.caller] += outcome.calls
    return dict(found)


def recalculations(counted: Snapshot) -> tuple[int, int, int]:
    """Filter updates, recalculations for another reason, and those of them that a creation asked for."""
    updates, recalcs = (sum(d.count for d in of.values()) for of in (counted.updates, counted.recalcs))
    assert not counted.lower_bound
    return updates, recalcs, counted.creation_recalcs


def writing(stand_in: StandIn, vcpu: Vcpu, msr: int = 0x48) -> Callable[[], None]:
    """A call by the function that a write of an MSR makes."""
    return lambda: stand_in.call(f"{stand_in.vendor.name}_set_msr", vcpu, msr, BOTH, 0)


def updating(stand_in: StandIn, vcpu: Vcpu) -> Callable[[], None]:
    """An update that makes one call."""

    def update() -> None:
        stand_in.inside(writing(stand_in, vcpu))
        stand_in.update(vcpu)

    return update


@pytest.mark.parametrize("name", ["toggle", "passing", "old_passing", "recalc"])
def test_calls_in_a_creation_are_its_own_whoever_makes_them(name: str, request: pytest.FixtureRequest) -> None:
    stand_in: StandIn = request.getfixturevalue(name)
    caller = f"{stand_in.vendor.name}_set_msr"
    vcpu = stand_in.vcpu()
    stand_in.counted()  # forgets what went before, also for other engines
    stand_in.inside(writing(stand_in, vcpu))
    stand_in.create(vcpu, writing(stand_in, vcpu))
    writing(stand_in, vcpu)()
    counted = stand_in.counted()
    assert causes(counted) == {("vcpu_create", caller): 2, ("msr_write", caller): 1}
    assert (counted.vcpus_created, counted.creations_observable) == (1, True)
    assert recalculations(counted) == (0, 0, 0)


@pytest.mark.parametrize("name", ["recalc", "svm_recalc"])
def test_recalculations_in_a_creation_are_its_own(name: str, request: pytest.FixtureRequest) -> None:
    """6.17."""
    stand_in: StandIn = request.getfixturevalue(name)
    vcpu = stand_in.vcpu(kvm=0x7000)
    stand_in.counted()
    update = updating(stand_in, vcpu)
    stand_in.inside(lambda: None)
    stand_in.create(vcpu, lambda: (update(), update()))
    counted = stand_in.counted()
    assert [(call.cause, outcome.calls) for call, outcome in counted.calls.items()] == [("vcpu_create", 2)]
    assert (recalculations(counted), counted.vcpus_created) == ((0, 2, 2), 1)
    update()
    stand_in.inside(lambda: None)
    stand_in.set_filter(0x7000)
    update()
    counted = stand_in.counted()
    assert {(call.cause, outcome.calls) for call, outcome in counted.calls.items()} == {
        ("recalc", 1),
        ("filter_change", 1),
    }
    assert (recalculations(counted), counted.vcpus_created) == ((1, 1, 0), 0)


def test_the_first_recalculation_is_the_creations_if_that_made_none(recalc: StandIn) -> None:
    """6.18 and newer."""
    vcpus = [recalc.vcpu(kvm=0x8000) for _ in range(3)]
    recalc.counted()
    recalc.inside(lambda: None)
    for vcpu in vcpus:
        recalc.create(vcpu)
    assert recalculations(recalc.counted()) == (0, 0, 0)
    for vcpu in vcpus[:2]:
        recalc.update(vcpu)
        recalc.update(vcpu)
    assert recalculations(recalc.counted()) == (0, 4, 2)
    recalc.set_filter(0x8000)  # before the last has run: one recalculation does both
    for _ in range(2):
        for vcpu in vcpus:
            recalc.update(vcpu)
    assert recalculations(recalc.counted()) == (3, 3, 0)


def test_a_recalculation_that_applies_a_new_filter_is_no_creations(recalc: StandIn) -> None:
    """Another thread may set one while the vCPU is created."""
    vcpu = recalc.vcpu(kvm=0xC000)
    recalc.counted()
    recalc.inside(lambda: None)

    def set_and_update() -> None:
        recalc.set_filter(0xC000)
        recalc.update(vcpu)
        recalc.update(vcpu)

    recalc.create(vcpu, set_and_update)
    counted = recalc.counted()
    assert (recalculations(counted), counted.vcpus_created) == ((1, 1, 1), 1)
    recalc.update(vcpu)
    assert recalculations(recalc.counted()) == (0, 1, 0)


def test_a_creation_that_fails_makes_no_vcpu(recalc: StandIn) -> None:
    """Another at the same address is a new one."""
    vcpu = recalc.vcpu(kvm=0x9000)
    recalc.counted()
    recalc.inside(lambda: None)
    for fails in (True, True, False):
        recalc.create(vcpu, fails=fails)
    counted = recalc.counted()
    assert (counted.vcpus_created, counted.vcpus_seen) == (1, 3)
    for _ in range(2):
        recalc.update(vcpu)
    assert recalculations(recalc.counted()) == (0, 2, 1)


def test_a_vcpu_whose_creation_had_begun_is_not_counted(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.counted()
    writing(toggle, vcpu)()
    toggle.library["kvm_arch_vcpu_postcreate"](vcpu)
    toggle.library["kvm_arch_vcpu_postcreate"](toggle.vcpu())
    counted = toggle.counted()
    assert (counted.vcpus_created, causes(counted)) == (0, {("msr_write", "vmx_set_msr"): 1})


def test_creations_are_followed_only_if_the_reader_says_so(recalc: StandIn) -> None:
    """It does once what begins and what ends them is probed; else the caller is all that tells."""
    counts = recalc.engine._reader._arrays["counts"]
    vcpu = recalc.vcpu(kvm=0xA000)
    recalc.counted()
    recalc.inside(lambda: None)
    counts.set(0, "follow_creations", 0)
    try:
        recalc.create(vcpu, writing(recalc, vcpu))
        recalc.update(vcpu)
    finally:
        counts.set(0, "follow_creations", 1)
    counted = recalc.counted()
    assert causes(counted) == {("msr_write", "vmx_set_msr"): 1}
    assert (recalculations(counted), counted.vcpus_created) == ((0, 1, 0), 0)


def test_the_recalculations_of_processes_that_have_ended_stay(recalc: StandIn) -> None:
    vcpu = recalc.vcpu(kvm=0xB000)
    recalc.counted()
    recalc.inside(lambda: None)
    recalc.create(vcpu)
    recalc.update(vcpu)
    recalc.update(vcpu)
    before = recalc.taken()
    assert recalculations(recalc.counted()) == (0, 2, 1)
    recalc.engine.forget({os.getpid()})
    after = recalc.taken()
    assert after.creation_recalcs == before.creation_recalcs
    assert sum(d.count for d in after.recalcs.values()) == sum(d.count for d in before.recalcs.values())
    assert os.getpid() not in after.recalcs
    recalc.last = after


def test_outcomes_of_calls_in_a_creation_are_the_real_ones(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = b"\xff" * toggle.size
    toggle.counted()
    toggle.inside(lambda: None)

    def twice() -> None:
        for _ in range(2):
            toggle.call("vmx_set_msr", vcpu, 0x10, READ, 0, bytes(toggle.size))

    toggle.create(vcpu, twice)
    [outcome] = toggle.counted().calls.values()
    assert (outcome.calls, outcome.redundant, outcome.changed_read) == (2, 1, 1)
