# SPDX-License-Identifier: GPL-2.0-or-later
"""What changed between two readings, in lines."""

from __future__ import annotations

from any_states import any_states
from hypothesis import given
from made import names
from made_vms import FS_BASE, PASSED, TSC, XFD, denies, file, vcpu, vm

from tracer.model.msr_filter import NO_FILTER, WRITE, MsrFilter
from tracer.model.state import Vm
from tracer.report.state_changes import Vms, changes
from tracer.report.state_file import States
from tracer.report.state_view import RowChoice

NONE = MsrFilter()


def keyed(*vms: Vm) -> Vms:
    return {(vm.pid, vm.key): made for vm, made in zip(vms, file(*vms).vms, strict=True)}


def lines(before: list[Vm], now: list[Vm], shown: RowChoice | None = None) -> list[str]:
    return changes(keyed(*before), keyed(*now), shown or RowChoice())


def filtered(name: str, pid: int, one: MsrFilter, applied: MsrFilter | None = None) -> Vm:
    return vm(name, pid, vcpu(0, one, applied=applied), vcpu(1, one, applied=applied))


def test_no_change_is_no_line() -> None:
    assert lines([vm("web", 1)], [vm("web", 1)]) == []


def test_a_new_filter_and_what_it_denies() -> None:
    assert lines([vm("web", 1)], [filtered("web", 1, denies(FS_BASE, flags=WRITE))]) == [
        "web (pid 1): new filter: allows what no range decides; 0xc0000100 FS_BASE, write: denies it",
        "web (pid 1): vCPU 0-1: write of 0xc0000100 FS_BASE: passed -> filter",
    ]


def test_a_filter_that_is_replaced_or_removed() -> None:
    before, now = denies(FS_BASE, XFD), denies(FS_BASE, TSC, default_allow=False)
    assert lines([filtered("web", 1, before)], [filtered("web", 1, now)])[0] == (
        "web (pid 1): filter replaced: it now denies what no range decides; "
        "new range 0x10 IA32_TSC, read and write: denies it; "
        "range removed 0x1c4 IA32_XFD, read and write: denies it"
    )
    assert lines([filtered("web", 1, denies(FS_BASE))], [vm("web", 1)]) == [
        "web (pid 1): filter removed; it was: allows what no range decides; "
        "0xc0000100 FS_BASE, read and write: denies it",
        "web (pid 1): vCPU 0-1: read and write of 0xc0000100 FS_BASE: filter -> passed",
    ]
    reordered = lines([filtered("web", 1, denies(FS_BASE, TSC))], [filtered("web", 1, denies(TSC, FS_BASE))])
    assert reordered == ["web (pid 1): filter replaced: the same ranges in another order"]


def test_what_waits_to_be_applied() -> None:
    waiting, applied = filtered("web", 1, denies(FS_BASE), NONE), filtered("web", 1, denies(FS_BASE))
    assert lines([vm("web", 1)], [waiting])[1:] == [
        "web (pid 1): vCPU 0-1: read and write of 0xc0000100 FS_BASE: passed -> pending deny"
    ]
    assert lines([waiting], [applied]) == [
        "web (pid 1): vCPU 0-1: read and write of 0xc0000100 FS_BASE: pending deny -> filter"
    ]


def test_equal_changes_are_one_line() -> None:
    before = [vm("web-1", 1), vm("web-2", 2), vm("db", 3, vcpu(0), vcpu(1))]
    one = denies(FS_BASE)
    half = vm("db", 3, vcpu(0, one), vcpu(1, one, applied=NONE))
    assert lines(before, [filtered("web-1", 1, one), filtered("web-2", 2, one), half]) == [
        "web-1 (pid 1), web-2 (pid 2), db (pid 3): new filter: allows what no range decides; "
        "0xc0000100 FS_BASE, read and write: denies it",
        "web-1 (pid 1), web-2 (pid 2): vCPU 0-1; db (pid 3): vCPU 0: read and write of 0xc0000100 FS_BASE: "
        "passed -> filter",
        "db (pid 3): vCPU 1: read and write of 0xc0000100 FS_BASE: passed -> pending deny",
    ]


def test_msrs_with_the_same_change_are_one_line() -> None:
    found = lines([vm("web", 1)], [filtered("web", 1, denies(0x174, 0x175, 0x176, FS_BASE))])
    assert found[1:] == [
        "web (pid 1): vCPU 0-1: read and write of 0x174-0x176 IA32_SYSENTER_CS and 2 more, 0xc0000100 FS_BASE: "
        "passed -> filter"
    ]
    many = [*range(0x200, 0x220, 2), FS_BASE]
    denied = next(line for line in lines([vm("web", 1)], [filtered("web", 1, denies(*many))]) if "kvm -> both" in line)
    assert denied.endswith(" and 8 more MSRs: kvm -> both")


def test_what_changes_whether_accesses_exit_comes_first() -> None:
    found = lines([vm("web", 1)], [filtered("web", 1, denies(XFD, FS_BASE))])
    assert [line.rpartition(": ")[2] for line in found[1:]] == ["passed -> filter", "kvm -> both"]


def test_vms_and_vcpus_that_come_and_go() -> None:
    before = [vm("web", 1, vcpu(0), vcpu(7)), vm("old", 2)]
    now = [vm("web", 1, vcpu(0), vcpu(1)), vm("new", 3), filtered("other", 4, denies(TSC))]
    assert lines(before, now) == [
        "old (pid 2): vCPU 0-1: VM gone",
        "new (pid 3): vCPU 0-1: new VM, filter: none",
        "other (pid 4): vCPU 0-1: new VM, filter: allows what no range decides; "
        "0x10 IA32_TSC, read and write: denies it",
        "web (pid 1): vCPU 7: gone",
        "web (pid 1): vCPU 1: new",
    ]


def test_another_vm_of_the_same_process_is_another() -> None:
    assert lines([vm("web", 1)], [vm("web", 1, key=77)]) == [
        "web (pid 1): vCPU 0-1: VM gone",
        "web (pid 1): vCPU 0-1: new VM, filter: none",
    ]


def test_what_kvm_itself_wants_may_change() -> None:
    other = vm("web", 1, *(vcpu(number, wanted=PASSED | {(XFD, WRITE)}) for number in (0, 1)))
    assert lines([vm("web", 1)], [other]) == ["web (pid 1): vCPU 0-1: write of 0x1c4 IA32_XFD: kvm -> passed"]


def test_which_msrs_are_shown() -> None:
    before, now = [vm("web", 1)], [filtered("web", 1, MsrFilter(default_allow=False))]
    usual = lines(before, now)
    assert not any("kvm -> both" in line or "kvm -> unrecorded" in line for line in usual)
    assert any("kvm -> both" in line for line in lines(before, now, RowChoice(everything=True)))
    assert lines(before, now, RowChoice(only=frozenset([FS_BASE])))[1:] == [
        "web (pid 1): vCPU 0-1: read and write of 0xc0000100 FS_BASE: passed -> filter"
    ]


def test_bitmaps_that_can_be_read_no_more() -> None:
    readable, unreadable = [vm("web", 1, vcpu(0))], [vm("web", 1, vcpu(0, bitmap=None))]
    assert lines(readable, unreadable) == ["web (pid 1): vCPU 0: what is intercepted can no longer be read"]
    assert lines(unreadable, readable) == ["web (pid 1): vCPU 0: what is intercepted can be read again"]


def test_filters_that_can_be_read_no_more() -> None:
    readable, unreadable = [vm("web", 1, vcpu(0))], [vm("web", 1, vcpu(0, filter=None))]
    assert lines(readable, unreadable)[0] == "web (pid 1): filter: could not be read"
    assert lines(unreadable, readable)[0] == "web (pid 1): filter: none"
    assert lines([vm("web", 1, vcpu(0, NO_FILTER))], readable) == []


@given(one=any_states(names), other=any_states(names))
def test_every_change_is_a_printable_line(one: States, other: States) -> None:
    before, now = ({(at, 0): vm for at, vm in enumerate(states.vms)} for states in (one, other))
    assert all(line.isprintable() for line in changes(before, now, RowChoice()))
    assert changes(before, before, RowChoice(everything=True)) == []
