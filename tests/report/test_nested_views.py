# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of nested guests: in text, in files old and new, between two states, and at the end of a report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from filters import denying
from made_states import USUAL, made, rows_shown, same, text
from vcpus import FS_BASE, GS_BASE, TSC, merged, rw, state, vcpu

from tracer.model.msr_filter import READ, X2APIC
from tracer.model.nested import NONE, OWN, UNREADABLE, UNUSED, Nested
from tracer.model.state import State, Vcpu, Vm
from tracer.model.svm import SVM
from tracer.model.vmx import VMX
from tracer.report.file import STATE, decode_as, encode
from tracer.report.state_changes import changes
from tracer.report.state_diff import Side, compare_states
from tracer.report.state_diff_view import sentence, state_diff_document
from tracer.report.state_file import StateFile
from tracer.report.state_making import make_states
from tracer.report.state_view import RowChoice, section_at_end

BASES = rw(FS_BASE, GS_BASE, 0xC0000102)
#: As KVM's own guests have it: L1 passes through what L0 does, of which L0 merges the bases alone.
IDLE, RUNNING = (vcpu(USUAL, nested=merged(VMX, BASES, running=running)) for running in (False, True))
DENIED = denying(FS_BASE)
#: A new filter was applied to L1 while L2 runs.
GUARDED = vcpu(USUAL - rw(FS_BASE), DENIED, nested=merged(VMX, BASES, running=True))


def one(own: Vcpu, **changes: Any) -> State:
    return state(Vm(812, 1, (replace(own, **changes),), name="web"))


def nested_lines(found: State) -> list[str]:
    start = "  nested guests (L2): "
    return [line.removeprefix(start) for line in text(found, columns=200).splitlines() if line.startswith(start)]


# --- text ---


def test_what_differs_for_nested_guests_is_beside_what_is_said_of_the_guest() -> None:
    found = state(
        Vm(812, 1, (*same(0, 1, one=IDLE), *same(2, 3, one=RUNNING)), name="hypervisor"),
        Vm(844, 2, (GUARDED,), name="guarded"),
    )
    assert text(found, columns=110) == GOLDEN


GOLDEN = """\
ada (Linux 6.1.0-53-amd64, Intel VMX): 2 VMs, 5 vCPUs

hypervisor (pid 812): vCPU 0-3
  filter: none
  nested guests (L2): in one just now: vCPU 2-3
  not shown: 20 ranges of other MSRs (--all)
  MSR                    name                         read    write    L2 read    L2 write
  ---------------------  ---------------------------  ------  -------  ---------  ----------
  0x10                   IA32_TSC                     passed  kvm      unmerged   kvm
  0x174-0x176            IA32_SYSENTER_CS and 2 more  passed  passed   unmerged   unmerged
  0xc0000100-0xc0000102  FS_BASE and 2 more           passed  passed   passed     passed

guarded (pid 844): vCPU 0
  filter: allows what no range decides
  0xc0000100 FS_BASE, read and write: denies it
  nested guests (L2): in one just now: vCPU 0
  not shown: 20 ranges of other MSRs (--all)
  MSR                    name                         read    write    L2 read       L2 write
  ---------------------  ---------------------------  ------  -------  ------------  ------------
  0x10                   IA32_TSC                     passed  kvm      unmerged      kvm
  0x174-0x176            IA32_SYSENTER_CS and 2 more  passed  passed   unmerged      unmerged
  0xc0000100             FS_BASE                      filter  filter   pending deny  pending deny
  0xc0000101-0xc0000102  GS_BASE and 1 more           passed  passed   passed        passed

Words
  passed: passed through: the guest has the MSR itself
  kvm: intercepted since KVM itself wants that
  filter: intercepted since the VM's filter denies it; KVM would pass it through
  pending deny: the filter denies it, but this is not yet applied to the vCPU: accesses still pass
  unmerged: L2's accesses are intercepted since KVM passes the MSR through to L1 alone, whatever L1 wants
"""


def test_vms_are_together_whoever_is_in_a_nested_guest() -> None:
    found = state(Vm(1, 1, (RUNNING,), name="a"), Vm(2, 2, (IDLE,), name="b"), Vm(3, 3, (RUNNING,), name="c"))
    assert "a (pid 1), b (pid 2), c (pid 3): vCPU 0\n" in text(found)
    assert nested_lines(found) == ["in one just now: a (pid 1), c (pid 3): vCPU 0"]


@pytest.mark.parametrize(
    ("nested", "line"),
    [
        (Nested(UNUSED), "none has run yet"),
        (Nested(NONE), "every access exits: the guest has no MSR bitmap for them"),
        (Nested(OWN), "as the guest itself: it intercepts no MSR of theirs"),
        (Nested(UNREADABLE), "what is intercepted of them cannot be read"),
        (merged(VMX, USUAL), "their accesses exit as the guest's own do"),
    ],
)
def test_a_line_where_there_is_no_more_to_tell(nested: Nested, line: str) -> None:
    found = one(vcpu(USUAL, nested=nested))
    assert nested_lines(found) == [line]
    assert "L2 read" not in text(found)
    plain = text(one(vcpu(USUAL)))
    assert text(found) == plain.replace("  not shown", f"  nested guests (L2): {line}\n  not shown")


def test_what_does_not_hold_for_ever() -> None:
    assert nested_lines(one(IDLE)) == ["in none just now; this is of the one that ran last"]
    unsettled = replace(IDLE, nested=merged(VMX, BASES, settled=False))
    assert nested_lines(one(unsettled)) == ["their bitmap changes, or is to be merged anew when one is next entered"]


def test_a_row_is_shown_for_what_is_said_of_nested_guests_alone() -> None:
    """Neither the filter nor KVM lets the guest have it; the bitmap for L2 is of the time before."""
    found = one(vcpu(USUAL - rw(FS_BASE), nested=merged(VMX, BASES)))
    assert rows_shown(found)["0xc0000100"] == ["FS\\_BASE", "kvm", "kvm", "pending kvm", "pending kvm"]


def test_asked_for_by_its_number() -> None:
    choice = RowChoice(only=frozenset({0x175}))
    assert rows_shown(one(IDLE), choice) == {
        "0x175": ["IA32\\_SYSENTER\\_ESP", "passed", "passed", "unmerged", "unmerged"]
    }


def test_nothing_is_said_of_nested_guests_where_there_are_none() -> None:
    assert "L2" not in text(one(vcpu(USUAL)))


# --- files ---


def test_the_file_has_it() -> None:
    found = state(Vm(812, 1, (*same(0, 3, one=IDLE), *same(1, 2, one=RUNNING)), name="hypervisor"))
    [vm] = json.loads(encode(made(found)))["vms"]
    [group] = vm["vcpus"]
    assert group["ids"] == [0, 1, 2, 3]
    assert group["nested"] == {
        "bitmap": "merged",
        "settled": True,
        "running": [1, 2],
        "passed": {"read": ["0xc0000100-0xc0000102"], "write": ["0xc0000100-0xc0000102"]},
    }
    said = {row["msrs"]: row["nested"] for row in group["msrs"]}
    assert said["0x174-0x176"] == {"read": "unmerged", "write": "unmerged"}
    assert said["0xc0000100-0xc0000102"] == {"read": "passed", "write": "passed"}


def test_vcpus_without_nested_guests_take_no_more_room() -> None:
    [vm] = json.loads(encode(made(one(vcpu(USUAL)))))["vms"]
    [group] = vm["vcpus"]
    assert group["nested"] is None
    assert not [row for row in group["msrs"] if "nested" in row]


@pytest.mark.parametrize("nested", [IDLE.nested, RUNNING.nested, Nested(UNUSED), Nested(NONE), Nested(OWN), None])
def test_what_is_written_is_read_again(nested: Nested | None) -> None:
    file = made(one(vcpu(USUAL, nested=nested)))
    assert decode_as(STATE, encode(file)) == file


def test_an_older_file_says_nothing_of_nested_guests() -> None:
    older = json.loads(encode(made(one(vcpu(USUAL)))))
    for group in older["vms"][0]["vcpus"]:
        del group["nested"]
    assert decode_as(STATE, json.dumps(older).encode()) == made(one(vcpu(USUAL)))


def test_where_nobody_knows_who_is_in_a_nested_guest() -> None:
    unknown = replace(RUNNING, nested=merged(VMX, BASES))
    found = state(Vm(1, 1, (RUNNING, replace(unknown, id=1))))
    [group] = make_states(found).vms[0].vcpus
    assert group.nested
    assert (group.ids, group.nested.running) == ([0, 1], None)


def test_of_every_msr_the_file_says_what_the_state_does() -> None:
    own = vcpu(USUAL, denying(0x174, 0x300), nested=merged(VMX, BASES | {(0x301, READ), (0x802, READ)}))
    host = one(own)
    [group] = make_states(host).vms[0].vcpus
    for row in group.msrs:
        first, _, last = row.msrs.partition("-")
        for number in range(int(first, 16), int(last or first, 16) + 1):
            said = host.verdict(own, number).nested
            assert said
            assert row.nested
            assert (row.nested.read, row.nested.write) == (said.read, said.write), hex(number)
    assert any(0x802 in X2APIC and row.msrs == "0x802" for row in group.msrs)


# --- two states ---


def side(title: str, host: State) -> Side:
    file: StateFile = made(host)
    return Side(title, file.host, file.taken, tuple(file.vms), tuple(file.notes))


def test_what_differs_for_nested_guests_is_apart_from_what_does_for_the_guest() -> None:
    both = one(IDLE), one(replace(IDLE, nested=merged(VMX, rw(FS_BASE))))
    diff = compare_states(side("A", both[0]), side("B", both[1]))
    [[found]] = diff.differing
    [vcpus] = found.vcpus
    assert vcpus.rows == ()
    assert [(row.msrs, row.access, row.one, row.other) for row in vcpus.nested] == [
        (range(GS_BASE, GS_BASE + 2), "read_write", "passed", "l1")
    ]
    assert sentence(diff) == "the same accesses exit in A and in B, for the same reasons"
    [table] = [section.table for section in state_diff_document(diff).sections if section.table]
    assert table.rows == (("0xc0000101-0xc0000102", "GS_BASE and 1 more", "read and write in L2", "passed", "l1"),)


@pytest.mark.parametrize("other", [None, Nested(UNUSED), Nested(UNREADABLE)])
def test_nested_guests_of_one_side_alone_are_no_difference(other: Nested | None) -> None:
    diff = compare_states(side("A", one(IDLE)), side("B", one(vcpu(USUAL, nested=other))))
    assert diff.differing == ()


def test_changes_of_nested_guests() -> None:
    """What a filter denies is applied to L1 at once, and to L2 when that is next entered."""

    def read(own: Vcpu) -> dict[tuple[int, int], Any]:
        return {(812, 1): make_states(one(own)).vms[0]}

    before = replace(GUARDED, bitmap=RUNNING.bitmap, filter=RUNNING.filter)
    after = replace(GUARDED, nested=merged(VMX, BASES - rw(FS_BASE)))
    first = changes(read(before), read(GUARDED), RowChoice())
    assert first[-2:] == [
        "web (pid 812): vCPU 0: read and write of 0xc0000100 FS_BASE: passed -> filter",
        "web (pid 812): vCPU 0: in L2, read and write of 0xc0000100 FS_BASE: passed -> pending deny",
    ]
    assert changes(read(GUARDED), read(after), RowChoice()) == [
        "web (pid 812): vCPU 0: in L2, read and write of 0xc0000100 FS_BASE: pending deny -> filter"
    ]
    assert changes(read(IDLE), read(RUNNING), RowChoice()) == []


def test_whether_l1_is_to_blame_may_be_known_at_one_moment_and_not_at_the_next() -> None:
    """No line of --watch for that: the accesses exit as they did."""
    known = vcpu(USUAL, nested=merged(VMX))
    unknown = replace(known, nested=merged(VMX, settled=False))
    diff = compare_states(side("A", one(known)), side("B", one(unknown)))
    assert diff.differing == ()


def test_at_the_end_of_a_report_what_is_pending_for_nested_guests() -> None:
    table = section_at_end(make_states(one(GUARDED))).table
    assert table
    assert table.rows[-1][0].endswith("in L2")
    assert table.rows[-1][1:] == ("0xc0000100", "FS_BASE", "pending deny", "pending deny")
    plain = section_at_end(make_states(one(IDLE)))
    assert plain.lines[-1] == "no filter intercepts what KVM would pass through, and nothing is pending"


def test_amd() -> None:
    passed = rw(FS_BASE, 0x174)
    own = vcpu(passed, vendor=SVM, nested=merged(SVM, rw(FS_BASE)))
    found = state(Vm(1, 1, (own,)), vendor=SVM)
    assert rows_shown(found)["0x174"] == ["IA32\\_SYSENTER\\_CS", "passed", "passed", "l1", "l1"]
    assert TSC not in {msr for msr, _ in passed}
