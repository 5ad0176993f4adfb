# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits joined with a state: who is said to want each of them, on made-up hosts, and what holds on any."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from filters import any_filters, denying
from hypothesis import given
from hypothesis import strategies as st
from vcpus import FS_BASE, NEW, OLD, PLATFORM_INFO, bitmap, rw, state, vcpu

from tracer.model.exit_table import (
    GONE,
    NESTED,
    NO_BLAME,
    PARTS,
    SAID_OF_EXITS,
    Blame,
    ExitTable,
    OfVm,
    interceptors,
    interceptors_text,
    may_have_made,
)
from tracer.model.exits import FAST, FILTERED, INVALID, L1, L2, OK, REFLECTED, RESULTS, SLOW, UNKNOWN, Exit
from tracer.model.msr_filter import NO_FILTER, WRITE, MsrFilter
from tracer.model.nested import L1 as OF_L1
from tracer.model.nested import MERGED, NESTED_SAID, NONE, OWN, UNMERGED, UNUSED, Nested
from tracer.model.nested import UNREADABLE as UNREADABLE_BITMAP
from tracer.model.state import BOTH, FILTER, KVM, PASSED, PENDING_ALLOWED, PENDING_DENIED, SAID, UNRECORDED, Vcpu, Vm
from tracer.model.state import UNKNOWN as UNREADABLE
from tracer.model.vmx import VMX

TSC_DEADLINE, XFD = 0x6E0, 0x1C4
DENIED = Exit(XFD, "write", SLOW, FILTERED, L1)
DONE = replace(DENIED, result=OK)
BOTH_PASSED = rw(XFD, FS_BASE)

#: vCPUs of each of which something else is said of writing IA32_XFD, with the exit that it makes.
OF_EACH = {
    FILTER: (vcpu((), denying(XFD), wished=BOTH_PASSED), DENIED),
    KVM: (vcpu((), wished=()), DONE),
    BOTH: (vcpu((), denying(XFD), wished=()), DENIED),
    PENDING_ALLOWED: (vcpu((), wished=BOTH_PASSED), DONE),
    PENDING_DENIED: (vcpu(BOTH_PASSED, denying(XFD), wished=BOTH_PASSED), DENIED),
    PASSED: (vcpu(BOTH_PASSED, wished=BOTH_PASSED), DONE),
    UNREADABLE: (Vcpu(0, None, denying(XFD)), DENIED),
}


def vm(pid: int, *vcpus: Vcpu, **changes: object) -> Vm:
    return replace(Vm(pid, pid, tuple(replace(one, id=number) for number, one in enumerate(vcpus))), **changes)  # type: ignore[arg-type]


def joined(kind: Exit, *vms: Vm, recording: bool = True) -> ExitTable:
    return ExitTable({kind: 100}, state(*vms, recording=recording))


@pytest.mark.parametrize("said", OF_EACH)
def test_what_is_said_of_the_only_vcpu_is_said_of_its_exits(said: str) -> None:
    one, kind = OF_EACH[said]
    assert OLD.verdict(one, XFD).of(WRITE) == said
    [row] = joined(kind, vm(1, one, one)).rows()
    assert (row.exits, row.by, row.interceptors) == (100, {said: 2}, (said,))
    unsure = said in {PENDING_DENIED, UNREADABLE}
    assert row.blame == (Blame(100) if said == FILTER else Blame(0, 100) if unsure else NO_BLAME)
    assert row.filter_alone == (said == FILTER)


def test_what_the_kernel_does_not_record_is_not_blamed_on_the_filter() -> None:
    one = vcpu((), denying(XFD))
    assert NEW.verdict(one, XFD).of(WRITE) == UNRECORDED
    table = joined(DENIED, vm(1, one), recording=False)
    assert [(row.interceptors, row.blame) for row in table.rows()] == [((UNRECORDED,), Blame(0, 100))]
    always = replace(DENIED, msr=FS_BASE)
    assert joined(always, vm(1, vcpu((), denying(FS_BASE))), recording=False).blame == Blame(100)


def test_without_a_state_it_is_unknown_and_not_0() -> None:
    """But KVM, not a filter, has an access intercepted that no filter denied."""
    table = ExitTable({DENIED: 7, replace(DENIED, guest=L2, result=REFLECTED): 3, DONE: 2})
    assert (table.total, table.blame) == (12, Blame(0, 7))
    assert table.blame.share(12) == "0.0% to 58.3%"
    assert [(row.by, row.blame, row.interceptors) for row in table.rows()] == [
        (None, Blame(0, 7), (UNREADABLE,)),
        (None, NO_BLAME, (NESTED,)),
        (None, NO_BLAME, (UNREADABLE,)),
    ]


def test_the_filter_is_not_alone_where_vcpus_differ() -> None:
    filtered, both = OF_EACH[FILTER][0], OF_EACH[BOTH][0]
    [row] = joined(DENIED, vm(1, filtered), vm(2, both, both)).rows()
    assert (row.by, row.interceptors, row.blame) == ({FILTER: 1, BOTH: 2}, (FILTER, BOTH), Blame(0, 100))
    assert interceptors_text(row.guest, row.by) == "filter 1, both 2"
    unreadable = Vcpu(0, None, None)
    [row] = joined(DENIED, vm(1, filtered), vm(2, unreadable)).rows()
    assert (row.interceptors, row.filter_alone) == ((FILTER, UNREADABLE), False)
    [row] = joined(DENIED, vm(1, filtered), vm(2, Vcpu(0, None), kind="TDX")).rows()  # its filter allows it
    assert row.filter_alone


def test_vcpus_that_let_it_pass_have_not_exited() -> None:
    [row] = joined(DONE, vm(1, OF_EACH[KVM][0]), vm(2, OF_EACH[PASSED][0])).rows()
    assert (row.by, row.interceptors) == ({KVM: 1, PASSED: 1}, (KVM,))
    assert interceptors_text(row.guest, row.by) == "kvm"


def test_a_refused_access_is_of_a_vcpu_whose_filter_denies_it() -> None:
    """KVM asks the filter first: so of one whose filter allows it is an access that was refused for another reason."""
    vms = (vm(1, OF_EACH[FILTER][0]), vm(2, OF_EACH[KVM][0]))
    counts = {DENIED: 100, DONE: 20, replace(DONE, result=INVALID): 3, replace(DONE, result=UNKNOWN): 2}
    table = ExitTable(counts, state(*vms, recording=True))
    assert [(row.result, row.interceptors, row.exits) for row in table.rows()] == [
        (FILTERED, (FILTER,), 100),
        (OK, (KVM,), 20),
        (INVALID, (KVM,), 3),
        (UNKNOWN, (KVM,), 2),
    ]
    assert table.blame == Blame(100)
    assert table.blame.share(table.total) == "80.0%"
    [row] = table.rows(())
    assert (row.by, row.exits, row.blame, row.filter_alone) == ({FILTER: 1, KVM: 1}, 125, Blame(100), False)


@pytest.mark.parametrize("msr", [TSC_DEADLINE, PLATFORM_INFO])
def test_the_fast_path_does_not_ask_the_filter(msr: int) -> None:
    kind = Exit(msr, "write", FAST, OK, L1)
    filtered = vm(1, vcpu((), denying(msr), wished=()))
    assert joined(kind, filtered).rows()[0].interceptors == (BOTH,)
    assert joined(replace(kind, path=SLOW), filtered).rows()[0].interceptors == (GONE,)


def test_exits_of_before_the_filter_was_replaced_are_nobodys() -> None:
    """The filter denied it while they were counted, and nobody intercepts it for that reason now; or the reverse."""
    for kind, one, blame in ((DENIED, OF_EACH[PASSED][0], Blame(0, 100)), (DONE, OF_EACH[FILTER][0], NO_BLAME)):
        [row] = joined(kind, vm(1, one)).rows()
        assert (row.by, row.interceptors, row.blame) == ({}, (GONE,), blame)


def test_only_vcpus_that_can_have_run_are_counted() -> None:
    one = OF_EACH[FILTER][0]
    assert joined(DENIED).rows()[0].interceptors == (GONE,)
    assert joined(DENIED, vm(1, one, replace(one, ran=False))).rows()[0].by == {FILTER: 1}
    assert joined(DENIED, vm(1, one), vm(2, one, owned=False)).rows()[0].by == {FILTER: 1}
    assert joined(DENIED, vm(1, replace(one, ran=None))).rows()[0].by == {FILTER: 1}


def test_l2s_exits_are_not_explained_by_the_bitmap_of_l1() -> None:
    counts = {replace(DENIED, guest=L2): 100, replace(DENIED, guest=L2, result=REFLECTED): 9, DENIED: 1}
    table = ExitTable(counts, state(vm(1, OF_EACH[FILTER][0]), recording=True))
    assert [(row.guest, row.exits, row.by, row.interceptors) for row in table.rows(("pid",))] == [
        (L1, 1, {FILTER: 1}, (FILTER,)),
        (L2, 109, None, (NESTED,)),
    ]
    assert table.blame == Blame(1)


def nested(use: str, passed: set[tuple[int, int]] | None = None, **changes: object) -> Vcpu:
    """A vCPU that passes XFD to its own guest, and whose guest may have guests."""
    bits = None if passed is None else bitmap(VMX, passed)
    return vcpu(BOTH_PASSED, wished=BOTH_PASSED, nested=Nested(use, bits), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("use", "passed", "word"),
    [
        (MERGED, set(), UNMERGED),
        (MERGED, BOTH_PASSED, PASSED),
        (OWN, None, PASSED),
        (NONE, None, OF_L1),
        (UNREADABLE_BITMAP, None, UNREADABLE),
    ],
)
def test_l2s_exits_have_what_is_said_of_l2(use: str, passed: set[tuple[int, int]] | None, word: str) -> None:
    for result in (OK, REFLECTED):
        kind = replace(DONE, guest=L2, result=result)
        [row] = joined(kind, vm(1, nested(use, passed))).rows()
        assert (row.by, row.interceptors, row.blame) == ({word: 1}, (word,), NO_BLAME)
    assert interceptors_text(L2, {OF_L1: 2, UNMERGED: 1}) == "l1 2, unmerged 1"


def test_only_vcpus_that_can_have_run_l2_made_its_exits() -> None:
    kind = replace(DONE, guest=L2)
    others = vm(2, OF_EACH[KVM][0], nested(UNUSED))
    assert joined(kind, others).rows()[0].interceptors == (NESTED,)
    assert joined(kind, others, vm(1, nested(NONE))).rows()[0].by == {OF_L1: 1}


def test_a_filter_is_asked_for_l2_too_but_never_to_blame() -> None:
    """L2 exits for a reason of its own; and an exit that L1 gets is not KVM's to refuse."""
    filtered = vcpu((), denying(XFD), wished=BOTH_PASSED, nested=Nested(MERGED, bitmap(VMX)))
    counts = {replace(DENIED, guest=L2): 5, replace(DONE, guest=L2): 3, replace(DONE, guest=L2, result=REFLECTED): 2}
    table = ExitTable(counts, state(vm(1, filtered), recording=True))
    assert [(row.result, row.interceptors) for row in table.rows()] == [
        (FILTERED, (FILTER,)),
        (OK, (NESTED,)),
        (REFLECTED, (FILTER,)),
    ]
    assert table.blame == NO_BLAME


def test_by_vm_only_the_vm_itself_counts() -> None:
    mine, other, ended = (replace(DENIED, pid=pid) for pid in (1, 2, 0))
    counts = {mine: 50, other: 70, ended: 90}
    vms = (vm(1, OF_EACH[FILTER][0]), vm(2, OF_EACH[BOTH][0]), vm(3, OF_EACH[FILTER][0]))
    table = ExitTable(counts, state(*vms, recording=True), by_vm=True)
    assert [(row.pid, row.interceptors) for row in table.rows()] == [(1, (FILTER,)), (0, (GONE,)), (2, (BOTH,))]
    assert table.blame == Blame(50, 90)
    assert table.of_vms() == {
        1: OfVm(1, 50, Blame(50)),
        2: OfVm(2, 70, NO_BLAME),
        0: OfVm(0, 90, Blame(0, 90)),
    }
    [whole] = table.rows(("result",))
    assert (whole.exits, whole.by, whole.blame) == (210, {FILTER: 1, BOTH: 1}, Blame(50, 90))
    assert replace(table, by_vm=False).blame == Blame(0, 210)  # the same vCPUs, but not known whose exits they are


def test_what_filters_alone_cause_is_first_then_the_most_exits() -> None:
    counts = {
        Exit(0x10, "read", SLOW, OK, L1): 5000,
        Exit(0x11, "read", SLOW, OK, L1): 5000,
        DENIED: 3,
        replace(DENIED, access="read"): 7,
        replace(DENIED, access="read", path=FAST): 7,
        Exit(0x12, "write", SLOW, OK, L1): 6000,
    }
    table = ExitTable(counts, state(vm(1, OF_EACH[FILTER][0]), recording=True))
    assert [(row.msr, row.access, row.path, row.exits) for row in table.rows()] == [
        (XFD, "read", FAST, 7),
        (XFD, "read", SLOW, 7),
        (XFD, "write", SLOW, 3),
        (0x12, "write", SLOW, 6000),
        (0x10, "read", SLOW, 5000),
        (0x11, "read", SLOW, 5000),
    ]


def test_every_word_has_a_text() -> None:
    assert interceptors_text(L2, None) == "nested"
    assert interceptors_text(L1, None) == "unknown"
    assert interceptors_text(L1, {}) == "gone"
    assert interceptors_text(L1, {PENDING_DENIED: 1, PASSED: 2}) == "passed 2, pending deny 1"
    for said in SAID:
        assert interceptors(L1, {said: 1}) == (said,)
        assert interceptors_text(L1, {said: 1234}).isprintable()


def test_who_can_have_made_an_exit() -> None:
    assert [may_have_made(DENIED, allowed) for allowed in (True, False, None)] == [False, True, True]
    assert [may_have_made(DONE, allowed) for allowed in (True, False, None)] == [True, False, True]


kinds = st.builds(
    Exit,
    st.sampled_from([XFD, FS_BASE, PLATFORM_INFO, 0xFFFFFFFF]),
    st.sampled_from(["read", "write"]),
    st.sampled_from([FAST, SLOW]),
    st.sampled_from(list(RESULTS)),
    st.sampled_from([L1, L2]),
    st.integers(0, 3),
)
vcpus = st.builds(
    vcpu,
    st.sets(st.sampled_from(sorted(BOTH_PASSED))),
    st.one_of(st.none(), st.just(NO_FILTER), st.just(denying(XFD, FS_BASE)), any_filters),
    wished=st.one_of(st.none(), st.sets(st.sampled_from(sorted(BOTH_PASSED)))),
    settled=st.booleans(),
    nested=st.sampled_from([None, *map(Nested, (OWN, NONE, UNUSED, UNREADABLE_BITMAP)), Nested(MERGED, bitmap(VMX))]),
    ran=st.sampled_from([True, False, None]),
)
vms = st.builds(
    lambda pid, them, owned: vm(pid, *them, owned=owned), st.integers(1, 3), st.lists(vcpus, max_size=3), st.booleans()
)
tables = st.builds(
    ExitTable,
    st.dictionaries(kinds, st.integers(1, 10**9), max_size=8),
    st.one_of(st.none(), st.lists(vms, max_size=3).map(lambda found: state(*found, recording=True))),
    st.booleans(),
)


@given(table=tables, parts=st.sets(st.sampled_from(PARTS)))
def test_rows_are_all_exits_once_and_blame_only_who_is_known(table: ExitTable, parts: set[str]) -> None:
    rows = table.rows(parts)
    assert sum(row.exits for row in rows) == table.total == sum(table.counts.values())
    assert len({(row.msr, row.access, row.guest, row.pid, row.path, row.result) for row in rows}) == len(rows)
    for blames in ([row.blame for row in rows], [vm.blame for vm in table.of_vms().values()]):
        assert Blame(sum(one.sure for one in blames), sum(one.perhaps for one in blames)) == table.blame
    refused = sum(count for kind, count in table.counts.items() if (kind.result, kind.guest) == (FILTERED, L1))
    assert table.blame.sure + table.blame.perhaps <= refused
    alone = [row.filter_alone for row in rows]
    assert alone == sorted(alone, reverse=True)
    for some in (True, False):
        exits = [row.exits for row in rows if row.filter_alone == some]
        assert exits == sorted(exits, reverse=True)
    for row in rows:
        assert row.interceptors
        assert {*row.interceptors} <= SAID.keys() | NESTED_SAID.keys() | SAID_OF_EXITS.keys()
        if row.filter_alone and table.state:
            _check_blame(table, row.pid if table.by_vm else None, row.msr, row.access)


def _check_blame(table: ExitTable, pid: int | None, msr: int, access: str) -> None:
    """Some vCPU that can run has a filter that denies the access, and what KVM wants of it is known."""
    assert table.state
    found = Counter(
        table.state.verdict(one, msr).of(1 if access == "read" else 2)
        for its in table.state.vms
        for one in its.vcpus
        if its.owned and one.ran is not False and pid in (None, its.pid) and one.filter is not None
    )
    assert found[FILTER]


@given(filters=any_filters)
def test_a_filter_that_denies_nothing_is_never_blamed(filters: MsrFilter) -> None:
    one = vcpu((), filters, wished=BOTH_PASSED)
    table = joined(DENIED, vm(1, one))
    assert table.blame == (Blame(0, 100) if filters.allows(XFD, WRITE) else Blame(100))
