# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits in a report: in its file, and in every view."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from made import changed, patched, report
from made_exits import BY_FILTER, EXITS, GUARDED, PLAIN, TOTAL, exiting, with_exits
from made_vms import XFD, denies, state, vcpu, vm
from report_pages import page

from tracer.model.errors import MsrtraceError
from tracer.model.exits import FILTERED, L1, SLOW, Exit
from tracer.report import exit_rows
from tracer.report.document import Document
from tracer.report.file import decode, encode
from tracer.report.formats import OF_REPORTS, write_report
from tracer.report.html import _exit_chart
from tracer.report.report import Report
from tracer.report.report_view import report_document

FINDING = "12,400 exits/s on FS_BASE (0xc0000100), write: the VM's filter alone denies it"


def content(made: Report) -> Any:
    return json.loads(encode(made))


def section(made: Report) -> list[str]:
    """The lines of the section in the text."""
    return report_document(made).text(80).partition("\nExits\n")[2].partition("\n\n")[0].splitlines()


def lines(document: Document) -> list[str]:
    return [line for line in document.lines if "exit" in line]


# --- the file ---


def test_rows_are_sums_over_vms_with_those_of_filters_first() -> None:
    found = content(with_exits())
    assert found["exits"][:3] == [
        {
            "msr": "0xc0000100",
            "name": "FS_BASE",
            "access": "write",
            "path": "slow",
            "result": "filtered",
            "guest": "l1",
            "exits": 31000,
            "exits_by_filter": 31000,
            "exits_perhaps_by_filter": 0,
            "intercepted_by": {"filter": 2},
        },
        {
            "msr": "0x6e0",
            "name": "IA32_TSC_DEADLINE",
            "access": "write",
            "path": "fast",
            "result": "ok",
            "guest": "l1",
            "exits": 60000,
            "exits_by_filter": 0,
            "exits_perhaps_by_filter": 0,
            "intercepted_by": {"kvm": 4},
        },
        {
            "msr": "0x1c4",
            "name": "IA32_XFD",
            "access": "write",
            "path": "slow",
            "result": "filtered",
            "guest": "l1",
            "exits": 500,
            "exits_by_filter": 0,
            "exits_perhaps_by_filter": 0,
            "intercepted_by": {"both": 2},
        },
    ]
    assert [row["intercepted_by"] for row in found["exits"] if row["guest"] == "l2"] == [None, None]
    assert (found["totals"]["exits"], found["totals"]["exits_by_filter"]) == (TOTAL, BY_FILTER)
    assert found["totals"]["exits"] == sum(row["exits"] for row in found["exits"])
    assert decode(encode(with_exits())) == with_exits()


def test_by_vm_each_vm_has_its_exits() -> None:
    found = content(with_exits(exiting(by_vm=True)))
    assert [(vm["pid"], vm["exits"], vm["exits_by_filter"]) for vm in found["vms"]] == [
        (0, 0, 0),
        (PLAIN, 20_087, 0),
        (GUARDED, 71_500, 31_000),
    ]
    assert [row["exits"] for row in found["exits"]] == [row["exits"] for row in content(with_exits())["exits"]]
    deadline = next(row for row in found["exits"] if row["path"] == "fast")
    assert deadline["intercepted_by"] == {"kvm": 4}
    mine = next(row for row in found["exits"] if row["msr"] == "0xce")
    assert mine["intercepted_by"] == {"kvm": 2}  # those of the VM that made them


def test_by_vm_a_filter_is_blamed_for_its_vms_exits_alone() -> None:
    """Both VMs' filters deny it, and KVM would pass it to one of them only."""
    kinds = {Exit(XFD, "write", SLOW, FILTERED, L1, pid): count for pid, count in ((1, 30), (2, 12))}
    passed = vcpu(0, denies(XFD), wanted=frozenset({(XFD, 2)}))
    at_end = state(vm("a", 1, passed), vm("b", 2, vcpu(0, denies(XFD))))
    made = with_exits(exiting(by_vm=True, counts=kinds), at_end)
    assert made.exits
    assert [(row.exits, row.exits_by_filter, row.interceptors) for row in made.exits] == [(42, 30, "filter 1, both 1")]
    assert lines(report_document(made))[1] == (
        "12.0 exits/s on IA32_XFD (0x1c4), write: the VM's filter alone denies it"
    )
    whole = with_exits(exiting(counts=kinds), at_end)
    assert (whole.totals.exits_by_filter, whole.totals.exits_perhaps_by_filter) == (0, 42)


def test_without_a_state_it_is_unknown_whose_they_are() -> None:
    made = with_exits(exiting(by_vm=True), None)
    totals = (made.totals.exits, made.totals.exits_by_filter, made.totals.exits_perhaps_by_filter)
    assert totals == (TOTAL, 0, 31_500)
    assert made.exits
    assert [row.intercepted_by for row in made.exits] == [None] * len(made.exits)
    assert [(vm.pid, vm.exits_by_filter, vm.exits_perhaps_by_filter) for vm in made.vms or ()] == [
        (0, 0, 0),
        (PLAIN, 0, 0),
        (GUARDED, 0, 31_500),
    ]
    assert lines(report_document(made)) == [
        "91,587 exits of RDMSR and WRMSR (36,635/s), 0.0% to 34.4% of them since a VM's filter alone denies the access"
    ]


def test_exits_that_were_not_counted_are_null_and_not_0() -> None:
    found = content(patched())
    assert (found["exits"], found["totals"]["exits"]) == (None, None)
    assert content(report(replace(exiting(by_vm=True), exits=None)))["vms"][0]["exits"] is None
    none = with_exits(exiting(counts={}))
    assert (none.exits, none.totals.exits, none.totals.exits_by_filter) == ([], 0, 0)
    assert section(none) == ["  none were seen"]
    assert lines(report_document(none)) == ["0 exits of RDMSR and WRMSR"]


def test_older_reports_are_read() -> None:
    older = content(patched())
    del (
        older["exits"],
        older["totals"]["exits"],
        older["totals"]["exits_by_filter"],
        older["totals"]["exits_perhaps_by_filter"],
    )
    assert decode(json.dumps(older).encode()) == patched()


def test_a_guest_cannot_make_a_report_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accesses any MSRs that it likes: those with the most exits have rows, and all are in the totals."""
    monkeypatch.setattr(exit_rows, "MOST_ROWS", 5)
    kinds = {Exit(0x10000 + n, "read", SLOW, "invalid", L1): n + 1 for n in range(20)}
    made = with_exits(exiting(counts={**EXITS, **kinds}), notes=("a note",))
    assert made.exits
    assert len(made.exits) == 5
    assert made.exits[0].interceptors == "filter"
    assert made.totals.exits == TOTAL + sum(range(1, 21))
    left = made.totals.exits - sum(row.exits for row in made.exits)
    assert made.notes == [
        f"23 kinds of exits, of which there were {left:,} together, have no rows in this report: guests accessed very "
        "many MSRs",
        "a note",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("msr", "48"),
        ("access", "read_write"),
        ("path", "sideways"),
        ("guest", "l3"),
        ("exits", -1),
        ("exits", 1.5),
        ("exits_by_filter", 31_001),
        ("exits_by_filter", None),
        ("exits_perhaps_by_filter", 1),
        ("intercepted_by", {"nobody": 1}),
        ("intercepted_by", {"filter": -1}),
        ("intercepted_by", {"filter": "2"}),
        ("name", "x" * 5000),
    ],
)
def test_hostile_rows_are_refused(field: str, value: object) -> None:
    found = content(with_exits())
    found["exits"][0][field] = value
    with pytest.raises(MsrtraceError, match="is a damaged report"):
        decode(json.dumps(found).encode())


def test_too_many_rows_are_refused() -> None:
    found = content(with_exits())
    found["exits"] = found["exits"][:1] * 20_001
    with pytest.raises(MsrtraceError, match="is a damaged report"):
        decode(json.dumps(found).encode())


# --- views ---


def test_what_a_filter_causes_is_a_finding() -> None:
    assert lines(report_document(with_exits())) == [
        "91,587 exits of RDMSR and WRMSR (36,635/s), 33.8% of them since a VM's filter alone denies the access",
        FINDING,
    ]


def test_of_many_findings_the_largest_are_sentences() -> None:
    msrs = range(0x174, 0x177)
    kinds = {Exit(msr, "write", SLOW, FILTERED, L1): msr for msr in msrs}
    kinds |= {Exit(msr, "read", SLOW, FILTERED, L1): 2 for msr in msrs}
    made = with_exits(exiting(counts=kinds), state(vm("web", 1, vcpu(0, denies(*msrs)))))
    assert [line.partition(":")[0] for line in lines(report_document(made))] == [
        "1,125 exits of RDMSR and WRMSR (450.0/s), 100.0% of them since a VM's filter alone denies the access",
        "149.6 exits/s on IA32_SYSENTER_EIP (0x176), write",
        "149.2 exits/s on IA32_SYSENTER_ESP (0x175), write",
        "148.8 exits/s on IA32_SYSENTER_CS (0x174), write",
        "2.4 exits/s on 3 more accesses that a VM's filter alone denies",
    ]


def test_the_table_of_exits() -> None:
    assert section(with_exits()) == [
        "  passed: passed through by now; it exited before that",
        "  nested: of a guest's own guest (L2); what is intercepted of L2 is not known",
        "  MSR         name               access  result     intercepted   exits      per",
        "                                                    by                    second",
        "  ----------  -----------------  ------  ---------  -----------  ------  -------",
        "  0xc0000100  FS_BASE            write   filtered   filter       31,000   12,400",
        "  0x6e0       IA32_TSC_DEADLINE  write   ok, fast   kvm          60,000   24,000",
        "  0x1c4       IA32_XFD           write   filtered   both            500    200.0",
        "  0x6e0       IA32_TSC_DEADLINE  write   ok         nested           70     28.0",
        "  0xce        PLATFORM_INFO      read    ok         kvm               7      2.8",
        "  0xdeadbeef                     read    invalid    kvm               5      2.0",
        "  0xc0000102  KERNEL_GS_BASE     read    ok         passed            3      1.2",
        "  0xc0000100  FS_BASE            write   reflected  nested            2      0.8",
    ]


def test_an_msr_without_a_name_is_one_in_a_sentence() -> None:
    kind = Exit(0xC0000F00, "read", SLOW, FILTERED, L1)
    one = vcpu(0, denies(0xC0000F00), applied=denies(0xC0000F00))
    at_end = state(vm("a", 1, replace(one, shadow=(0, 0))), recorded=(0xC0000F00,))
    made = with_exits(exiting(counts={kind: 25}), at_end)
    assert lines(report_document(made))[1] == "10.0 exits/s on MSR 0xc0000f00, read: the VM's filter alone denies it"


def test_of_many_rows_some_are_shown() -> None:
    kinds = {Exit(0x10000 + n, "read", SLOW, "invalid", L1): n + 1 for n in range(100)}
    found = section(with_exits(exiting(counts=kinds)))
    assert found[0] == "  40 of 100 rows are shown here: the JSON report has all"
    assert sum("0x100" in line for line in found) == 40


def test_no_time_has_no_rate() -> None:
    assert "? exits/s on FS_BASE" in lines(report_document(with_exits(duration=0.0)))[1]


@pytest.mark.parametrize("fmt", OF_REPORTS)
def test_every_format_has_them(fmt: str) -> None:
    text = write_report(with_exits(), fmt).decode().replace("\\", "")
    assert "IA32_TSC_DEADLINE" in text
    if fmt != "json":
        assert FINDING in " ".join(text.replace("&#39;", "'").split())
    assert "IA32_TSC_DEADLINE" not in write_report(patched(), fmt).decode()


def test_the_page_has_a_chart() -> None:
    drawn = _exit_chart(with_exits())
    assert drawn
    bars = {(row.name, row.detail): dict(row.bars[0].amounts) for row in drawn.rows}
    assert list(bars.items())[:3] == [
        (("IA32_TSC_DEADLINE", "write"), {"calls": 60_070, "redundant": 0}),
        (("FS_BASE", "write"), {"calls": 2, "redundant": 31_000}),
        (("IA32_XFD", "write"), {"calls": 500, "redundant": 0}),
    ]
    assert drawn.rows[1].bars[0].spoken == (
        "FS_BASE write: 31,002 exits, 31,000 of them since a filter alone denies it"
    )
    root = page(with_exits())
    (found,) = (one for one in root.all("section") if one.all("h2")[0].text == "Exits")
    assert "exits since the VM's filter alone denies the access" in found.text
    assert _exit_chart(patched()) is _exit_chart(with_exits(exiting(counts={}))) is None


def test_a_chart_of_many_accesses_has_the_largest() -> None:
    kinds = {Exit(0x10000 + n, "read", SLOW, "invalid", L1): n + 1 for n in range(100)}
    drawn = _exit_chart(with_exits(exiting(counts=kinds)))
    assert drawn
    assert [row.name for row in drawn.rows] == [f"{0x10000 + n:#x}" for n in range(99, 59, -1)]


def test_the_page_has_a_table() -> None:
    root = page(with_exits())
    (found,) = (one for one in root.all("section") if one.all("h2")[0].text == "Exits")
    assert ["0xc0000100", "FS_BASE", "write", "filtered", "filter", "31,000", "12,400"] in found.all("table")[0].rows()


def test_exits_per_vm() -> None:
    def table(made: Report) -> list[tuple[str, ...]]:
        return [
            row
            for one in report_document(made).sections
            if one.title == "Exits per VM" and one.table
            for row in one.table.rows
        ]

    assert table(with_exits(exiting(by_vm=True))) == [
        ("guarded", "901", "71,500", "28,600", "31,000"),
        ("plain", "812", "20,087", "8,035", "0"),
    ]
    assert table(with_exits(exiting(by_vm=True), None))[0] == ("guarded", "901", "71,500", "28,600", "0 to 31,500")
    for made in (
        with_exits(),
        report(replace(exiting(by_vm=True), exits=None)),
        with_exits(exiting(by_vm=True, counts={})),
    ):
        assert table(made) == []


def test_a_result_of_a_later_version_is_shown_as_it_is() -> None:
    made = with_exits()
    assert made.exits
    odd = msgspec.structs.replace(made, exits=[changed(made.exits[0], result="bounced\x1b")])
    again = decode(encode(odd))
    assert any("bounced\\x1b" in line for line in section(again))
