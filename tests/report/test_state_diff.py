# SPDX-License-Identifier: GPL-2.0-or-later
"""Two states compared: which accesses differ, for whom, and how it is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from any_states import any_states
from hypothesis import given
from made import names
from made_vms import FS_BASE, GS_BASE, PASSED, RECORDED, TSC, XFD, denies, file, vcpu, vm

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, FilterRange, MsrFilter
from tracer.model.state import Vm
from tracer.model.svm import SVM
from tracer.report.computer import Computer
from tracer.report.formats import OF_STATES, write_state_diff
from tracer.report.state_diff import Differing, OneSided, Side, StateDiff, compare_states, one_sided
from tracer.report.state_diff_view import sentence, state_diff_document
from tracer.report.state_file import StateFile, States
from tracer.report.state_view import RowChoice

RW = "read_write"


def side(title: str, *vms: Vm, host: str = "", **changes: Any) -> Side:
    made = file(*vms, **changes)
    return side_of(title, made, host)


def side_of(title: str, made: StateFile | States, host: str = "") -> Side:
    machine = made.host if isinstance(made, StateFile) and not host else Computer(name=host, kernel="6.1")
    return Side(title, machine, "2026-11-27", tuple(made.vms), tuple(made.notes))


def compared(one: Vm, other: Vm, shown: RowChoice | None = None) -> StateDiff:
    return compare_states(side("A", one), side("B", other), shown or RowChoice())


def rows(diff: StateDiff) -> list[Differing]:
    return [row for group in diff.differing for vcpus in group[0].vcpus for row in vcpus.rows]


def filtered(name: str, pid: int, one: MsrFilter, uuid: str = "", **changes: Any) -> Vm:
    return vm(name, pid, vcpu(0, one, **changes), vcpu(1, one, **changes), uuid=uuid)


# --- accesses ---


def test_equal_vms_do_not_differ() -> None:
    diff = compared(vm("a", 1), vm("b", 2))
    assert (diff.differing, diff.matched, diff.only_one, diff.only_other) == ((), 1, (), ())
    assert sentence(diff) == "the same accesses exit in A and in B, for the same reasons"


def test_what_a_filter_denies_is_named_on_the_side_that_has_it() -> None:
    diff = compared(filtered("a", 1, denies(FS_BASE, XFD)), vm("b", 2))
    assert rows(diff) == [
        Differing(range(XFD, XFD + 1), RW, "both", "kvm"),
        Differing(range(FS_BASE, FS_BASE + 1), RW, "filter", "passed"),
    ]
    assert diff.differing[0][0].vcpus[0].ids == (0, 1)
    assert sentence(diff) == "A exits on 2 accesses where B does not (FS_BASE): the filter alone denies 2"


def test_the_answer_is_the_same_the_other_way_round() -> None:
    diff = compared(vm("b", 2), filtered("a", 1, denies(FS_BASE)))
    assert rows(diff) == [Differing(range(FS_BASE, FS_BASE + 1), RW, "passed", "filter")]
    assert sentence(diff) == "B exits on 2 accesses where A does not (FS_BASE): the filter alone denies 2"


def test_one_direction_of_an_msr_is_one_access() -> None:
    diff = compared(filtered("a", 1, denies(FS_BASE, flags=WRITE)), vm("b", 2))
    assert rows(diff) == [Differing(range(FS_BASE, FS_BASE + 1), "write", "filter", "passed")]
    assert "on 1 access where" in sentence(diff)


def test_both_may_exit_where_the_other_does_not() -> None:
    one = filtered("a", 1, denies(FS_BASE))
    other = vm("b", 2, *(vcpu(number, wanted=PASSED - {(TSC, READ)}) for number in (0, 1)))
    assert sentence(compared(one, other)) == (
        "A exits on 2 accesses where B does not (FS_BASE): the filter alone denies 2; "
        "B exits on 1 access where A does not (IA32_TSC): KVM itself intercepts 1"
    )


def test_msrs_that_follow_each_other_are_one_range() -> None:
    diff = compared(filtered("a", 1, denies(0x174, 0x175, FS_BASE, GS_BASE)), vm("b", 2))
    assert [row.msrs for row in rows(diff)] == [range(0x174, 0x176), range(FS_BASE, GS_BASE + 1)]
    assert "on 8 accesses where" in sentence(diff)


def test_what_waits_to_be_applied_passes_until_then() -> None:
    one = filtered("a", 1, denies(FS_BASE), applied=NO_FILTER)
    diff = compared(one, vm("b", 2))
    assert [(row.one, row.other) for row in rows(diff)] == [("pending_denied", "passed")]
    assert sentence(diff) == "the same accesses exit in A and in B, 2 of them for another reason"
    diff = compared(filtered("a", 1, NO_FILTER, applied=denies(FS_BASE)), vm("b", 2))
    assert sentence(diff).endswith("(FS_BASE): the filter allows 2, which is not applied yet")


def test_what_a_kernel_does_not_record_is_said() -> None:
    one = filtered("a", 1, denies(XFD), recorded=False)
    diff = compare_states(side("A", one), side("B", vm("b", 2, *(vcpu(n, recorded=False) for n in (0, 1)))))
    assert [(row.one, row.other) for row in rows(diff)] == [("unrecorded", "kvm")]


def test_a_default_that_denies_is_not_a_row_for_every_msr() -> None:
    diff = compared(filtered("a", 1, MsrFilter(default_allow=False)), vm("b", 2))
    found = {(row.one, row.other) for row in rows(diff)}
    assert ("filter", "passed") in found <= {("filter", "passed"), ("unrecorded", "kvm")}
    everything = rows(
        compared(filtered("a", 1, MsrFilter(default_allow=False)), vm("b", 2), RowChoice(everything=True))
    )
    assert ("both", "kvm") in {(row.one, row.other) for row in everything}
    assert not any(row.msrs.start in range(0x800, 0x900) for row in everything), "no filter can deny these"


def test_an_msr_in_no_row_of_one_side_is_what_the_default_makes_it() -> None:
    """A range of the one filter denies an MSR that KVM of no kernel passes: the other side has no row of it."""
    diff = compared(filtered("a", 1, denies(0x1234)), vm("b", 2))
    assert rows(diff) == [Differing(range(0x1234, 0x1235), RW, "both", "kvm")]
    other = filtered("b", 2, MsrFilter(default_allow=False))
    named = rows(compared(filtered("a", 1, denies(0x1234)), other, RowChoice(only=frozenset([0x1234]))))
    assert named == [], "both deny it"


def test_only_msrs_that_are_asked_for() -> None:
    shown = RowChoice(only=frozenset([0x175]))
    diff = compared(filtered("a", 1, denies(0x174, 0x175, 0x176)), vm("b", 2), shown)
    assert rows(diff) == [Differing(range(0x175, 0x176), RW, "filter", "passed")]


# --- vCPUs ---


def test_vcpus_are_compared_by_their_ids() -> None:
    one = vm("a", 1, vcpu(0, denies(FS_BASE)), vcpu(1, denies(FS_BASE), applied=NO_FILTER), vcpu(5, denies(FS_BASE)))
    other = vm("b", 2, *(vcpu(number) for number in (0, 1, 2)))
    found = compared(one, other).differing[0][0]
    assert [(vcpus.ids, vcpus.rows[0].one) for vcpus in found.vcpus] == [((0,), "filter"), ((1,), "pending_denied")]
    assert (found.only_one, found.only_other) == ((5,), (2,))


def test_bitmaps_that_cannot_be_read_are_not_compared() -> None:
    one = vm("a", 1, vcpu(0, denies(FS_BASE), bitmap=None))
    diff = compared(one, vm("b", 2, vcpu(0)))
    assert (rows(diff), diff.differing[0][0].vcpus[0].unread) == ([], (True, False))
    assert sentence(diff) == "what exits cannot be read in A; their filters differ"
    assert "  what is intercepted cannot be read in A\n" in state_diff_document(diff).text(80)


def test_what_cannot_be_read_on_either_side_is_not_said_to_be_the_same() -> None:
    unread = vcpu(0, bitmap=None)
    diff = compared(vm("a", 1, unread), vm("b", 2, unread))
    assert (diff.differing, diff.alike, len(diff.unread)) == ((), (), 1)
    assert sentence(diff) == "what exits cannot be read in A and B; no difference is known"
    some = compared(vm("a", 1, unread, vcpu(1)), vm("b", 2, unread, vcpu(1)))
    assert sentence(some) == "the same accesses exit in A and in B, as far as it can be read, for the same reasons"
    files = compare_states(side("A", vm("a", 1, unread), vm("c", 3)), side("B", vm("a", 1, unread), vm("c", 3)))
    assert "Cannot be compared\n  a (pid 1): vCPU 0\n" in state_diff_document(files).text(80)
    assert [vm["name"] for vm in json.loads(write_state_diff(files, "json"))["not_compared"]] == ["a"]


def test_what_is_so_on_some_vcpus_alone_is_said() -> None:
    diff = compared(vm("a", 1, vcpu(0, denies(FS_BASE)), vcpu(1, denies(FS_BASE), applied=NO_FILTER)), vm("b", 2))
    assert sentence(diff).startswith("A exits on 2 accesses where B does not, on some vCPUs (FS_BASE): ")


def test_a_filter_that_cannot_be_read_is_said() -> None:
    diff = compared(vm("a", 1, vcpu(0, filter=None)), vm("b", 2, vcpu(0)))
    assert "the filter of A could not be read" in state_diff_document(diff).text(80)


# --- filters ---


def lines(one: MsrFilter, other: MsrFilter) -> list[str]:
    """How two filters differ, in words."""
    diff = compared(filtered("a", 1, one), filtered("b", 2, other))
    section = state_diff_document(diff).sections[0]
    return [*section.lines] if section.title == "Filters and vCPUs" else []


def test_how_filters_differ() -> None:
    assert lines(denies(FS_BASE), denies(FS_BASE)) == []
    assert lines(denies(FS_BASE, TSC), denies(FS_BASE, XFD, default_allow=False)) == [
        "what no range decides: A allows it, B denies it",
        "only in the filter of A: 0x10 IA32_TSC, read and write: denies it",
        "only in the filter of B: 0x1c4 IA32_XFD, read and write: denies it",
    ]
    assert lines(NO_FILTER, denies(FS_BASE)) == [
        "A has no filter",
        "the filter of B: allows what no range decides",
        "the filter of B: 0xc0000100 FS_BASE, read and write: denies it",
    ]
    reordered = lines(denies(FS_BASE, TSC), denies(TSC, FS_BASE))
    assert reordered == ["the filters have the same ranges in another order; the first that an access is in decides"]
    twice = lines(denies(TSC, TSC), denies(TSC))
    assert twice == ["only in the filter of A: 0x10 IA32_TSC, read and write: denies it"]


def test_filters_may_differ_and_nothing_else() -> None:
    diff = compared(filtered("a", 1, MsrFilter(True, (FilterRange(READ, TSC, 1, b"\xff" * 8),))), vm("b", 2))
    assert sentence(diff) == "the same accesses exit in A and in B, though their filters differ"


# --- VMs of two files ---


def test_vms_are_matched_by_name() -> None:
    one = side("a.json", vm("web", 1), filtered("db", 2, denies(FS_BASE)), vm("old", 3), host="h1")
    other = side("b.json", vm("db", 9), vm("new", 8), vm("web", 7), host="h2")
    diff = compare_states(one, other)
    assert [vm.name for vm in diff.alike] == ["web"]
    assert [[found.one.name for found in group] for group in diff.differing] == [["db"]]
    assert ([vm.name for vm in diff.only_one], [vm.name for vm in diff.only_other]) == (["old"], ["new"])
    assert sentence(diff) == (
        "1 of 2 VMs that are in both differs: a.json exits on 2 accesses where b.json does not (FS_BASE): "
        "the filter alone denies 2"
    )
    text = state_diff_document(diff).text(80)
    for part in (
        "db: vCPU 0-1\n",
        "Only in a.json\n  old (pid 3)",
        "Only in b.json\n  new (pid 8)",
        "No difference\n  web",
    ):
        assert part in text


def test_the_same_differences_are_shown_once() -> None:
    one = side("a.json", *(filtered(f"web-{n}", n, denies(FS_BASE)) for n in range(1, 10)))
    diff = compare_states(one, side("b.json", *(vm(f"web-{n}", n) for n in range(1, 10))))
    assert [len(group) for group in diff.differing] == [9]
    assert sentence(diff).startswith("9 of 9 VMs that are in both differ: a.json exits on 2 accesses where")
    assert state_diff_document(diff).text(80).count("FS_BASE         read and write") <= 1
    assert "web-1, web-2, web-3, web-4, web-5, web-6 and 3 more: vCPU 0-1" in state_diff_document(diff).text(80)


def test_of_vms_with_one_name_those_of_a_process_are_matched_then_those_alike() -> None:
    def vms(*pids: int) -> list[Vm]:
        return [filtered("vm", pid, denies(FS_BASE)) if pid % 2 else vm("vm", pid) for pid in pids]

    same_host = compare_states(side("a", *vms(1, 2), host="h"), side("b", vm("vm", 1), vm("vm", 2), host="h"))
    assert [(found.one.pid, found.other.pid) for group in same_host.differing for found in group] == [(1, 1)]
    others = compare_states(side("a", *vms(1, 2), host="h"), side("b", *vms(4, 5), host="i"))
    assert (len(others.alike), others.differing) == (2, ())


Given = tuple[str, int, str]
A, B, C = (f"6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f000{number}" for number in range(3))


def matched(one: list[Given], other: list[Given], *hosts: str) -> set[tuple[int, int]]:
    """The pids of VMs that are compared, of VMs with these names, pids and UUIDs; all differ."""
    vms = [filtered(name, pid, denies(FS_BASE), uuid=uuid) for name, pid, uuid in one]
    others = [vm(name, pid, uuid=uuid) for name, pid, uuid in other]
    diff = compare_states(side("a", *vms, host=hosts[0]), side("b", *others, host=hosts[-1]))
    return {(found.one.pid, found.other.pid) for group in diff.differing for found in group}


@pytest.mark.parametrize("hosts", [("h",), ("h", "i")])
def test_vms_of_one_uuid_are_matched_whatever_their_names_and_pids(hosts: tuple[str, ...]) -> None:
    one = [("web", 1, A), ("web", 2, B), ("db", 3, C)]
    assert matched(one, [("web", 2, A), ("web", 1, B), ("old", 4, C)], *hosts) == {(1, 2), (2, 1), (3, 4)}


def test_of_vms_with_one_uuid_those_of_a_process_are_matched() -> None:
    """One that moves within a host."""
    assert matched([("web", 1, A), ("web", 2, A)], [("web", 2, A), ("web", 1, A)], "h") == {(1, 1), (2, 2)}


def test_vms_without_a_uuid_are_matched_by_name_and_pid() -> None:
    """As in files of an older msrtrace."""
    one = [("web", 1, ""), ("web", 2, ""), ("db", 3, "")]
    assert matched(one, [("web", 2, B), ("web", 1, A), ("x", 4, "")], "h") == {(1, 1), (2, 2)}
    assert matched(one, [("web", 2, B), ("web", 1, A), ("x", 4, "")], "h", "i") == {(1, 2), (2, 1)}


def test_a_single_vm_of_each_side_is_compared_whatever_its_name() -> None:
    assert compared(vm("a", 1), vm("b", 2)).matched == 1
    several = compare_states(side("a.json", vm("a", 1)), side("b.json", vm("b", 2), vm("c", 3)))
    assert sentence(several) == "no VM is both in a.json and in b.json"


def test_other_hardware_and_other_kernels_are_said() -> None:
    amd = side("amd", vm("b", 2, vcpu(0, vendor=SVM), vcpu(1, vendor=SVM)), vendor=SVM)
    document = state_diff_document(compare_states(side("intel", vm("a", 1)), amd))
    assert document.lines == (
        "warning: not the same kind of hardware (Intel VMX and AMD SVM): KVM passes other MSRs through",
    )
    assert "hardware  Intel VMX " in document.text(80)
    older = compare_states(side("A", vm("a", 1)), side("B", vm("b", 2), host="ada"))
    kernels = "6.1.0-53-amd64 and 6.1"
    assert (
        f"warning: the kernels differ ({kernels}): KVM may pass other MSRs through" in state_diff_document(older).lines
    )


# --- formats ---


def test_text_fits_80_columns() -> None:
    one = side("a-file-with-a-long-name.json", *(filtered(f"web-{n}", n, denies(FS_BASE, *RECORDED)) for n in range(3)))
    text = write_state_diff(
        compare_states(one, side("another-long-name.json", *(vm(f"web-{n}", n) for n in range(3)))), "text"
    )
    assert max(map(len, text.decode().splitlines())) <= 80


def test_json_has_it_all() -> None:
    one = side("a.json", filtered("db", 2, denies(FS_BASE)), vm("web", 1), vm("old", 3))
    diff = compare_states(one, side("b.json", vm("db", 9, vcpu(0)), vm("web", 7)))
    made = json.loads(write_state_diff(diff, "json"))
    assert (made["schema"], made["sentence"]) == ("msrtrace-state-comparison/1", sentence(diff))
    assert (made["a"]["title"], made["a"]["vms"], made["a"]["host"]["kernel"]) == ("a.json", 3, "6.1.0-53-amd64")
    (found,) = made["vms"]
    assert found["a"] == {"name": "db", "uuid": "", "pid": 2, "vcpus": [0, 1], "only_here": [1]}
    assert [row["msrs"] for row in found["filter"]["only_a"]] == ["0xc0000100"]
    access = {"msrs": "0xc0000100", "name": "FS_BASE", "access": "read_write", "a": "filter", "b": "passed"}
    assert found["differences"] == [
        {"vcpus": [0], "unreadable": {"a": False, "b": False}, "msrs": [access], "nested_msrs": []}
    ]
    assert [vm["name"] for vm in (*made["no_difference"], *made["only_a"])] == ["web", "old"]


@given(one=any_states(names), other=any_states(names))
def test_any_two_files_can_be_compared(one: States, other: States) -> None:
    diff = compare_states(side_of("a.json", one, "h"), side_of("b.json", other, "h"))
    back = compare_states(side_of("b.json", other, "h"), side_of("a.json", one, "h"))
    assert diff.matched == back.matched
    assert sum(map(len, diff.differing)) == sum(map(len, back.differing))
    for fmt in OF_STATES:
        assert all(line.isprintable() for line in write_state_diff(diff, fmt).decode().splitlines())
    same = compare_states(side_of("a.json", one, "h"), side_of("b.json", one, "h"))
    assert (same.differing, same.only_one, same.only_other) == ((), (), ())


# --- reports ---


@pytest.mark.parametrize("swapped", [False, True])
def test_what_one_host_intercepts_and_the_other_passes(swapped: bool) -> None:
    base = file(filtered("a", 1, denies(FS_BASE, flags=WRITE)), filtered("b", 2, denies(FS_BASE, XFD)))
    new = file(vm("c", 3), vm("d", 4))
    sides = ([new], [base]) if swapped else ([base], [new])
    (found,) = one_sided(*sides)
    said = (("filter",), ("passed",))
    assert found == OneSided(range(FS_BASE, FS_BASE + 1), "write", *(reversed(said) if swapped else said))


def test_it_must_be_so_for_every_vcpu_that_can_be_read() -> None:
    denied, passed, unread = filtered("a", 1, denies(FS_BASE)), vm("b", 2), vm("c", 3, vcpu(0, bitmap=None))
    assert one_sided([file(denied, passed)], [file(passed)]) == ()
    assert len(one_sided([file(denied, unread)], [file(passed)])) == 1
    leaked = vm("d", 4, owned=False)
    assert len(one_sided([file(denied, leaked)], [file(passed)])) == 1
    assert one_sided([file(denied)], [file()]) == ()
    assert one_sided([file(denied)], []) == ()


def test_several_reports_of_a_side_are_one_host() -> None:
    other = vm("b", 2, *(vcpu(n, wanted=PASSED - {(FS_BASE, READ), (FS_BASE, WRITE)}) for n in (0, 1)))
    (found,) = one_sided([file(filtered("a", 1, denies(FS_BASE))), file(other)], [file(vm("c", 3))])
    assert (found.base, found.new) == (("filter", "kvm"), ("passed",))
