# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls as the BPF program counts them, on a stand-in for KVM."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvm_standin import (
    ACCESS,
    BOTH,
    CALLERS,
    PAGE,
    READ,
    RECALC,
    TOGGLE,
    WRITE,
    StandIn,
    StandInBtf,
    Vcpu,
    calls,
    places,
    running,
)

from tracer.model.options import Options
from tracer.model.snapshot import Call, Outcome, Snapshot
from tracer.model.vmx import VMX
from tracer.program import syscalls

DIRECT = 2  # of `state`


@pytest.fixture(scope="module")
def narrow(request: pytest.FixtureRequest, headers: None, library: Path) -> Iterator[StandIn]:
    """With as few counters as there may be; also as where bitmaps are read without asking: other kinds of calls."""
    known = ("VALUE(cast_type) && !read_kernel(", "!read_kernel(")
    edit = known if request.param else ("", "")
    with running(library, RECALC, StandInBtf(), Options(backend="kprobe"), edit) as stand_in:
        yield stand_in


# Intel SDM vol. 3, "MSR-Bitmap Address": where the bit of an MSR is, for reads and for writes
QUARTERS = {range(0x2000): (0x000, 0x800), range(0xC0000000, 0xC0002000): (0x400, 0xC00)}


def bits(page: bytes, msr: int, type_: int) -> dict[int, bool]:
    """The bits that TYPE_ names, by the direction; none for an MSR that has none."""
    for msrs, bases in QUARTERS.items():
        if msr in msrs:
            at, bit = divmod(msr - msrs.start, 8)
            return {
                d: bool(page[base + at] >> bit & 1) for d, base in zip((READ, WRITE), bases, strict=True) if type_ & d
            }
    return {}


def expected(before: bytes, after: bytes, msr: int, type_: int, enable: bool) -> Outcome:
    old, new = bits(before, msr, type_), bits(after, msr, type_)
    changed = {direction for direction in old if old[direction] != new[direction]}
    refused = not enable and any(new.values())
    return Outcome(1, not changed, READ in changed, WRITE in changed, refused)


few = settings(max_examples=30, deadline=None)


def check_calls(stand_in: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]], pid: int, within: str) -> None:
    """Make calls, some of them inside an update; the engine must have seen each as the model does."""
    vcpu = stand_in.vcpu()
    stand_in.page.raw = b"\xff" * PAGE  # as a new one is
    stand_in.counted()
    wanted: dict[Call, Outcome] = {}
    for caller, msr, type_, enable, in_update, after in made:
        before = stand_in.page.raw

        def call() -> None:
            stand_in.call(caller, vcpu, msr, type_, enable, after)  # noqa: B023 (called in this round)

        if in_update:
            stand_in.inside(call)
            stand_in.update(vcpu)
        else:
            call()
        action, cause = "enable" if enable else "disable", within if in_update else CALLERS[caller]
        if in_update:  # an update makes each call in one place: who made the first makes all of them
            caller = stand_in.callers.setdefault((msr, type_, enable), caller)
        key = Call(msr, ACCESS[type_], action, cause, caller, pid)
        outcome = expected(before, after, msr, type_, enable)
        wanted[key] = wanted[key] + outcome if key in wanted else outcome
    counted = stand_in.counted()
    assert counted.calls == wanted
    updates = counted.updates if within == "filter_change" else counted.recalcs
    assert sum(d.count for d in updates.values()) == sum(in_update for *_, in_update, _ in made)
    assert not counted.lower_bound


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_enable_and_disable(toggle: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]]) -> None:
    check_calls(toggle, made, 0, "filter_change")


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_set(recalc: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]]) -> None:
    check_calls(recalc, made, os.getpid(), "recalc")


#: What KVM's update functions call for, 5.13 to 7.3: arch/x86/kvm/vmx/vmx.c; PT with eight address registers.
UPDATED = [0x10, 0x48, 0x49, 0x10B, 0x1C4, 0x1C5, 0x174, 0x175, 0x176, 0x660, 0x3FC, 0x3FD, 0x3FE, 0x3F8, 0x3F9, 0x3FA]


UPDATED += [0x606, 0xC0000100, 0xC0000101, 0xC0000102, 0x560, 0x561, 0x570, 0x571, 0x572, *range(0x580, 0x588)]


@pytest.mark.parametrize("filter_change", [True, False])
@pytest.mark.parametrize("types", [(READ, WRITE), (BOTH,)])
@pytest.mark.parametrize("narrow", [0, DIRECT], ids=["", "direct"], indirect=True)
def test_counters_of_updates(
    request: pytest.FixtureRequest, narrow: StandIn, types: tuple[int, ...], filter_change: bool
) -> None:
    """None takes longer to find than others: two with the same first place would swap when the order is reversed."""
    kinds = [(msr, type_, enable) for msr in UPDATED for type_ in types for enable in (False, True)]
    found = places(narrow, kinds, filter_change)
    assert len(found) == len(kinds)
    counters = narrow.engine._reader._arrays["counters"]
    states = {counters.get(index, "call.state") & DIRECT for index in found.values()}
    assert states == {request.node.callspec.params["narrow"]}
    assert places(narrow, kinds[::-1], filter_change) == found


CLEAR, FULL = bytes(PAGE), b"\xff" * PAGE


CHANGED, REDUNDANT = Outcome(1, 0, 1, 0, 0), Outcome(1, 1, 0, 0, 0)


def outcomes(snapshot: Snapshot) -> list[Outcome]:
    return list(snapshot.calls.values())


def test_a_call_is_counted_when_the_vcpu_has_left_it(toggle: StandIn) -> None:
    """This thread runs, as far as the reader knows, so it may still be in the call; until the guest ran."""
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    for _ in range(3):
        now = toggle.engine.snapshot()
        assert (outcomes(now.since(toggle.last)), now.open_calls) == ([], 1)
    vcpu.exits += 1
    now = toggle.engine.snapshot()
    assert (outcomes(now.since(toggle.last)), now.open_calls) == ([CHANGED], 0)
    assert toggle.engine.snapshot().calls == now.calls


def test_a_call_that_comes_before_a_second_look_is_not_taken_for_the_first(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    assert toggle.engine.snapshot().open_calls == 1
    vcpu.exits += 1
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    now = toggle.engine.snapshot()
    assert (outcomes(now.since(toggle.last)), now.open_calls) == ([CHANGED], 1)
    assert outcomes(toggle.counted()) == [CHANGED + REDUNDANT]


def test_a_vcpu_that_ends_takes_no_outcome_along(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    toggle.free(vcpu)
    toggle.page.raw = FULL  # the page has another owner
    now = toggle.engine.snapshot()
    assert (outcomes(now.since(toggle.last)), now.open_calls) == ([CHANGED], 0)


def test_bits_that_are_written_without_a_call_are_not_taken_for_its_outcome(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x808, READ, False, CLEAR)
    toggle.next.raw = FULL
    toggle.library[VMX.direct_write](ctypes.byref(vcpu))
    assert toggle.page.raw == FULL
    assert outcomes(toggle.counted()) == [CHANGED]


def test_a_vcpu_whose_end_was_not_seen(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    toggle.inside(lambda: None)
    toggle.create(vcpu)  # another one, at the same address
    counted = toggle.counted()
    assert (outcomes(counted), counted.read_failures, counted.vcpus_seen) == ([Outcome(1, 0, 0, 0, 0)], 1, 2)


def test_vcpus_at_once_do_not_mix(toggle: StandIn) -> None:
    """Each in a thread of its own, under the eyes of a reader that settles what it can."""
    rounds, threads = 150, 6
    library, done = toggle.library, threading.Event()
    call = library["vmx_disable_intercept_for_msr"]
    ctypes.c_void_p.in_dll(library, "next").value = None
    toggle.inside(lambda: None)
    toggle.counted()

    def vcpu_thread(number: int) -> None:
        page = ctypes.create_string_buffer(FULL, PAGE)
        for _ in range(rounds):
            vcpu = Vcpu(0x1000, ctypes.addressof(page))
            toggle.create(vcpu)
            for msr in range(number, number + 3):
                call(ctypes.byref(vcpu), ctypes.c_uint32(msr), READ)
                vcpu.exits += 1
            toggle.update(vcpu)
            call(ctypes.byref(vcpu), ctypes.c_uint32(0x40), BOTH)
            toggle.free(vcpu)

    def read() -> None:
        while not done.is_set():
            toggle.engine.snapshot()

    with ThreadPoolExecutor(threads + 1) as pool:
        reader = pool.submit(read)
        for made in [pool.submit(vcpu_thread, number) for number in range(threads)]:
            made.result()
        done.set()
        reader.result()
    counted = toggle.counted()
    wanted = Counter({0x40: rounds * threads})
    for number in range(threads):
        wanted.update(dict.fromkeys(range(number, number + 3), rounds))
    seen = Counter[int]()
    for called, result in counted.calls.items():
        seen[called.msr] += result.calls
        assert result.redundant == result.calls
    assert seen == wanted
    assert sum(d.count for d in counted.updates.values()) == rounds * threads
    assert (counted.vcpus_seen, counted.lower_bound) == (rounds * threads, False)
    assert counted.maps[1].entries == toggle.last.maps[1].entries


def test_a_cpu_without_msr_bitmaps(toggle: StandIn) -> None:
    toggle.call("vmx_set_msr", toggle.vcpu(bitmap=0), 0x10, READ, True)
    assert list(toggle.counted().calls.values()) == [Outcome(1, 1, 0, 0, 0)]


@pytest.mark.parametrize("array", ["counters", "updates"])
def test_what_finds_its_map_full_is_counted_as_dropped(recalc: StandIn, array: str) -> None:
    vcpu = recalc.vcpu()
    mapped, member = recalc.engine._reader._arrays[array], {"counters": "key", "updates": "kind"}[array]
    before = [mapped.get(index, member) for index in range(mapped.entries)]
    recalc.inside(lambda: recalc.call("vmx_set_msr", vcpu, 0x1234, READ, True))
    recalc.counted()
    for index in range(mapped.entries):
        mapped.set(index, member, 1 << 31)
    try:
        for _ in range(3):
            recalc.update(vcpu)
    finally:
        for index, value in enumerate(before):
            mapped.set(index, member, value)
    counted = recalc.counted()
    dropped = {one.name: one.dropped for one in counted.maps}
    calls, updates = (sum(one.calls for one in counted.calls.values()), sum(d.count for d in counted.recalcs.values()))
    full = array == "counters"
    assert (calls, updates, counted.lower_bound) == ((0, 3, True) if full else (3, 0, True))
    assert dropped == {"calls": 3 * full, "vcpus": 0, "updates": 3 * (not full)}


def test_a_reading_makes_no_system_call_on_a_map(toggle: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a call keeps kprobe programs from running. What runs a program does not."""
    vcpu = toggle.vcpu()
    toggle.inside(lambda: None)
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, True)
    toggle.update(vcpu)
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, True)
    commands: list[int] = []
    call = syscalls._bpf

    def recorded(command: int, attributes: ctypes.Structure) -> int:
        commands.append(command)
        return call(command, attributes)

    monkeypatch.setattr(syscalls, "_bpf", recorded)
    assert toggle.engine.snapshot().open_calls == 1
    assert set(commands) == {syscalls._PROG_TEST_RUN}
    toggle.counted()


def test_a_bitmap_that_cannot_be_read(toggle: StandIn) -> None:
    toggle.call("vmx_set_msr", toggle.vcpu(bitmap=0x10), 0x10, READ, True)
    counted = toggle.counted()
    assert list(counted.calls.values()) == [Outcome(1, 0, 0, 0, 0)]
    assert (counted.read_failures, counted.lower_bound) == (1, True)


def test_without_offsets_calls_are_counted(blind: StandIn) -> None:
    blind.inside(lambda: None)
    blind.call("vmx_set_msr", blind.vcpu(), 0x10, READ, True)
    blind.call("vmx_vcpu_after_set_cpuid", blind.vcpu(), 0x48, WRITE, False)
    assert blind.counted().calls == {
        Call(0x10, "read", "enable", "msr_write", "vmx_set_msr"): Outcome(1),
        Call(0x48, "write", "disable", "cpuid_update", "vmx_vcpu_after_set_cpuid"): Outcome(1),
    }


@pytest.mark.parametrize(("pid", "seen"), [(os.getpid(), True), (os.getppid(), False)], ids=["its own", "another"])
def test_one_process_alone(pid: int, seen: bool, headers: None, library: Path, tmp_path: Path) -> None:
    """Of others nothing is counted, and so nothing is missed."""
    own = Path(shutil.copy(library, tmp_path))  # which no other engine probes
    with running(own, TOGGLE, StandInBtf(), Options(backend="kprobe", pid=pid)) as stand_in:
        vcpu = stand_in.vcpu()
        stand_in.inside(lambda: stand_in.call("vmx_set_msr", vcpu, 0x10, READ, False))
        stand_in.create(vcpu)
        stand_in.update(vcpu)
        stand_in.free(vcpu)
        counted = stand_in.counted()
        calls, updates = (
            sum(one.calls for one in counted.calls.values()),
            sum(d.count for d in counted.updates.values()),
        )
        assert (calls, updates, counted.vcpus_seen) == ((2, 1, 1) if seen else (0, 0, 0))
        assert (counted.unpaired_returns, counted.lower_bound) == (0, False)
