# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls as the BPF program counts them, on a stand-in for KVM."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvm_standin import (
    ACCESS,
    BOTH,
    CALLERS,
    CREATE,
    FREE,
    MSRPM,
    PAGE,
    PASS,
    READ,
    RECALC,
    SVM_CALLERS,
    SVM_RECALC,
    TOGGLE,
    WRITE,
    StandIn,
    StandInBtf,
    Vcpu,
    calls,
    passing_calls,
    places,
    running,
    svm_calls,
)

from tracer.model.options import Options
from tracer.model.snapshot import Call, Outcome, Snapshot
from tracer.program import syscalls

DIRECT = 2  # of `state`


# Intel SDM vol. 3, "MSR-Bitmap Address": where the bit of an MSR is, for reads and for writes
QUARTERS = {range(0x2000): (0x000, 0x800), range(0xC0000000, 0xC0002000): (0x400, 0xC00)}
# AMD APM vol. 2, "MSR Intercepts": where the two bits of each MSR begin
RANGES = {range(0x2000): 0x000, range(0xC0000000, 0xC0002000): 0x800, range(0xC0010000, 0xC0012000): 0x1000}


def bits(page: bytes, msr: int, type_: int) -> dict[int, bool]:
    """The bits that TYPE_ names, by the direction; none for an MSR that has none."""
    for msrs, bases in QUARTERS.items() if len(page) == PAGE else ():
        if msr in msrs:
            at, bit = divmod(msr - msrs.start, 8)
            return {
                d: bool(page[base + at] >> bit & 1) for d, base in zip((READ, WRITE), bases, strict=True) if type_ & d
            }
    for msrs, base in RANGES.items() if len(page) == MSRPM else ():
        if msr in msrs:
            both = page[base + (msr - msrs.start) // 4] >> 2 * (msr % 4)
            return {d: bool(both & d) for d in (READ, WRITE) if type_ & d}
    return {}


def expected(before: bytes, after: bytes, msr: int, type_: int, enables: int) -> Outcome:
    """ENABLES: the directions to intercept."""
    old, new = bits(before, msr, type_), bits(after, msr, type_)
    changed = {direction for direction in old if old[direction] != new[direction]}
    refused = any(set_ for direction, set_ in new.items() if not direction & enables)
    return Outcome(1, not changed, READ in changed, WRITE in changed, refused)


ACTIONS = {0: "disable", READ: "disable_write", WRITE: "disable_read", BOTH: "enable"}


#: The caller, the MSR, the type, what is enabled, whether in an update, and the bitmap after it.
Made = tuple[str, int, int, int, bool, bytes]

few = settings(max_examples=30, deadline=None)


def check_calls(stand_in: StandIn, made: list[Made], pid: int, within: str) -> None:
    """Make calls, some of them inside an update; the engine must have seen each as the model does."""
    vcpu = stand_in.vcpu()
    stand_in.page.raw = b"\xff" * stand_in.size  # as a new one is
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
        enables = enable if stand_in.layout.pass_ else BOTH * enable & type_
        action = ACTIONS[enables if stand_in.layout.pass_ else BOTH * enable]
        cause = within if in_update else (CALLERS | SVM_CALLERS)[caller]
        if in_update:  # an update makes each call in one place: who made the first makes all of them
            caller = stand_in.callers.setdefault((msr, type_, enable), caller)
        key = Call(msr, ACCESS[type_], action, cause, caller, pid)
        outcome = expected(before, after, msr, type_, enables)
        wanted[key] = wanted[key] + outcome if key in wanted else outcome
    counted = stand_in.counted()
    assert counted.calls == wanted
    updates = counted.updates if within == "filter_change" else counted.recalcs
    assert sum(d.count for d in updates.values()) == sum(in_update for *_, in_update, _ in made)
    assert not counted.lower_bound


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_enable_and_disable(toggle: StandIn, made: list[Made]) -> None:
    check_calls(toggle, made, 0, "filter_change")


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_set(recalc: StandIn, made: list[Made]) -> None:
    check_calls(recalc, made, os.getpid(), "recalc")


@few
@given(made=st.lists(svm_calls, max_size=8))
def test_calls_of_svms_set(svm_recalc: StandIn, made: list[Made]) -> None:
    check_calls(svm_recalc, made, 0, "recalc")


@few
@given(made=st.lists(passing_calls, max_size=8))
def test_calls_of_pass(passing: StandIn, made: list[Made]) -> None:
    check_calls(passing, made, 0, "filter_change")


@few
@given(made=st.lists(passing_calls, max_size=8))
def test_calls_of_pass_on_an_old_kernel(old_passing: StandIn, made: list[Made]) -> None:
    check_calls(old_passing, made, 0, "filter_change")
    assert old_passing.taken().redundancy == "exact"


def test_calls_for_the_bitmap_of_nested_guests(passing: StandIn) -> None:
    """Their outcomes are those in that bitmap, which is merged anew and freed without calls."""
    vcpu, nested, full = passing.vcpu(), ctypes.create_string_buffer(MSRPM), b"\xff" * MSRPM
    for writer in PASS.writers:
        passing.page.raw = nested.raw = full
        passing.counted()
        passing.call("svm_set_msr", vcpu, 0x10, BOTH, 0, bytes(MSRPM))
        with passing.for_another(nested):
            passing.call("svm_set_msr", vcpu, 0x10, BOTH, 0, bytes(MSRPM))
            passing.write(writer, vcpu, full)
            passing.call("svm_set_msr", vcpu, 0x10, BOTH, BOTH, full)
        passing.call("svm_set_msr", vcpu, 0x10, BOTH, 0, bytes(MSRPM))
        counted = passing.counted()
        assert {(call.action, *vars(outcome).values()) for call, outcome in counted.calls.items()} == {
            ("disable", 3, 1, 2, 2, 0),
            ("enable", 1, 1, 0, 0, 0),
        }
        assert not counted.lower_bound


#: What KVM's update functions call for, 5.13 to 7.3: arch/x86/kvm/vmx/vmx.c; PT with eight address registers.
UPDATED = [0x10, 0x48, 0x49, 0x10B, 0x1C4, 0x1C5, 0x174, 0x175, 0x176, 0x660, 0x3FC, 0x3FD, 0x3FE, 0x3F8, 0x3F9, 0x3FA]
UPDATED += [0x606, 0xC0000100, 0xC0000101, 0xC0000102, 0x560, 0x561, 0x570, 0x571, 0x572, *range(0x580, 0x588)]
#: The same of arch/x86/kvm/svm/svm.c: until 6.16 direct_access_msrs[]; since 6.17, with a PMU of twelve counters.
SVM_UPDATED = [0x48, 0x49, 0x10B, 0x174, 0x175, 0x176, 0x1D9, 0x1DB, 0x1DC, 0x1DD, 0x1DE, 0x277, 0xDA0, 0xC0010130]
SVM_UPDATED += [*range(0xC0000080, 0xC0000085), *range(0xC0000100, 0xC0000104)]
PASSED = [*SVM_UPDATED, 0x802, 0x803, *range(0x808, 0x811), 0x818, 0x820, 0x828, *range(0x830, 0x83A), 0x83E]
RECALCULATED = [*SVM_UPDATED, 0xE7, 0xE8, 0x6A0, 0x6A2, *range(0x6A4, 0x6A8), *range(0xC0000300, 0xC0000304)]
RECALCULATED += [*range(0xC0010000, 0xC0010008), *range(0xC0010200, 0xC001020C)]
KINDS = {
    "vmx, a direction each": (RECALC, [(msr, type_, e) for msr in UPDATED for type_ in (READ, WRITE) for e in (0, 1)]),
    "vmx": (RECALC, [(msr, BOTH, e) for msr in UPDATED for e in (0, 1)]),
    "svm, pass": (PASS, [(msr, BOTH, e) for msr in PASSED for e in (0, BOTH)] + [(0x49, BOTH, 1), (0x10B, BOTH, 1)]),
    "svm": (SVM_RECALC, [(msr, BOTH, e) for msr in RECALCULATED for e in (0, 1)] + [(0x49, 2, 0), (0xE7, 1, 0)]),
}


@pytest.mark.parametrize("direct", [0, DIRECT], ids=["", "direct"])
@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.usefixtures("headers")
def test_counters_of_updates(kernel: str, direct: int, library: Path) -> None:
    """None takes longer to find than others: two with the same first place would swap when the order is reversed.

    With as few counters as there may be; also as where bitmaps are read without asking: other kinds of calls.
    """
    layout, kinds = KINDS[kernel]
    edit = ("VALUE(cast_type) && !read_kernel(", "!read_kernel(") if direct else ("", "")
    with running(library, layout, StandInBtf(), Options(backend="kprobe"), edit=edit) as narrow:
        for within in ("filter_change", "recalc", "vcpu_create") if layout.filter_set else ("filter_change",):
            found = places(narrow, kinds, within)
            assert len(found) == len(kinds)
            counters = narrow.engine._reader._arrays["counters"]
            assert {counters.get(index, "call.state") & DIRECT for index in found.values()} == {direct}
            if within != "vcpu_create":  # which is rare
                assert places(narrow, kinds[::-1], within) == found


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
    toggle.library[TOGGLE.writers[0]](ctypes.byref(vcpu))
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


@pytest.mark.parametrize("name", ["toggle", "passing", "old_passing"])
def test_vcpus_at_once_do_not_mix(name: str, request: pytest.FixtureRequest) -> None:
    """Each in a thread of its own, under the eyes of a reader that settles what it can."""
    toggle: StandIn = request.getfixturevalue(name)
    rounds, threads = 150, 6
    library, done, pass_ = toggle.library, threading.Event(), toggle.layout.pass_
    ctypes.c_void_p.in_dll(library, "next").value = None
    toggle.inside(lambda: None)
    toggle.counted()

    def call(vcpu: Vcpu, msr: int) -> None:
        if pass_:
            library[pass_](ctypes.byref(vcpu), ctypes.c_void_p(vcpu.bitmap), ctypes.c_uint32(msr), 1, 1)
        else:
            library["vmx_disable_intercept_for_msr"](ctypes.byref(vcpu), ctypes.c_uint32(msr), READ)

    def vcpu_thread(number: int) -> None:
        page = ctypes.create_string_buffer(b"\xff" * toggle.size, toggle.size)
        for _ in range(rounds):
            vcpu = Vcpu(0x1000, ctypes.addressof(page))
            toggle.create(vcpu)
            for msr in range(number, number + 3):
                call(vcpu, msr)
                vcpu.exits += 1
            toggle.update(vcpu)
            call(vcpu, 0x40)
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


def test_eight_thousand_vcpus_have_a_place_each(toggle: StandIn) -> None:
    """Where the kernel might have them: three in 32 KB, in runs of such pages anywhere."""
    random, at = Random(1), list[int]()
    while len(at) < 8000:
        start = 0xFFFF888000000000 + random.randrange(1 << 18) * 32768
        at += [start + run * 32768 + n * 10304 for run in range(random.choice((1, 1, 2, 4, 8, 32))) for n in range(3)]
    vcpus = [*dict.fromkeys(at)]
    toggle.inside(lambda: None)
    before = toggle.taken().maps[1]
    for vcpu in vcpus:
        toggle.library[CREATE](ctypes.c_void_p(vcpu))
    there = toggle.taken().maps[1]
    for vcpu in vcpus:
        toggle.library[FREE](ctypes.c_void_p(vcpu))
    assert (there.name, there.entries - before.entries, there.dropped) == ("vcpus", len(vcpus), 0)
    assert toggle.taken().maps[1] == before


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
