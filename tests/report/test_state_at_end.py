# SPDX-License-Identifier: GPL-2.0-or-later
"""What vCPUs intercepted when a trace ended: in a report, in its views, and in comparisons."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from made import patched, report, toggle, unpatched
from made_vms import FS_BASE, PASSED, XFD, denies, state, vcpu, vm
from report_pages import page

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, MsrFilter
from tracer.model.state import Vm
from tracer.report import state_making
from tracer.report.changelog import changelog
from tracer.report.compare import Comparison, compare
from tracer.report.comparison_json import comparison_json
from tracer.report.comparison_view import comparison_document
from tracer.report.file import decode, encode
from tracer.report.formats import OF_COMPARISONS, OF_REPORTS, write_comparison, write_report
from tracer.report.html import report_html
from tracer.report.report import Report
from tracer.report.report_view import report_document
from tracer.report.state_making import state_of, states_of_report


def filtered(name: str, pid: int, one: MsrFilter, **changes: Any) -> Vm:
    return vm(name, pid, vcpu(0, one, **changes), vcpu(1, one, **changes))


def ended(*vms: Vm, made: Report | None = None, **changes: Any) -> Report:
    """A report at whose end there were these VMs."""
    return msgspec.structs.replace(made or patched(), state=states_of_report(state(*vms, **changes)))


def section(made: Report) -> str:
    """The section of the text."""
    text = report_document(made).text(80)
    return text.partition("Intercepted at the end\n")[2].partition("\n\n")[0]


def test_it_is_in_the_file() -> None:
    made = ended(filtered("web", 1, denies(FS_BASE)))
    assert decode(encode(made)) == made
    assert made.state
    assert [row.msrs for row in made.state.vms[0].vcpus[0].msrs if row.read == "filter"] == ["0xc0000100"]


def test_what_filters_deny_and_what_is_pending_is_shown() -> None:
    one, waiting = denies(FS_BASE, XFD), filtered("db", 3, denies(0x174), applied=NO_FILTER)
    assert section(ended(filtered("web-1", 1, one), filtered("web-2", 2, one), waiting)).splitlines() == [
        "  3 VMs, 6 vCPUs",
        "  vCPUs                 MSR         name              read          write",
        "  --------------------  ----------  ----------------  ------------  ------------",
        "  web-1 (pid 1), web-2  0x1c4       IA32_XFD          both          both",
        "  (pid 2): vCPU 0-1",
        "  web-1 (pid 1), web-2  0xc0000100  FS_BASE           filter        filter",
        "  (pid 2): vCPU 0-1",
        "  db (pid 3): vCPU 0-1  0x174       IA32_SYSENTER_CS  pending deny  pending deny",
    ]


def test_nothing_to_show_is_said() -> None:
    assert section(ended(vm("web", 1))).splitlines() == [
        "  1 VM, 2 vCPUs",
        "  no filter intercepts what KVM would pass through, and nothing is pending",
    ]
    assert section(ended()) == "  there was no vCPU any more"
    assert section(ended(notes=("bitmaps cannot be read",))) == "  bitmaps cannot be read"
    unread = ended(vm("web", 1, vcpu(0, bitmap=None)))
    assert "  web (pid 1): vCPU 0: what is intercepted cannot be read\n" in f"{section(unread)}\n"
    assert "nothing is pending" not in section(unread)


def test_reports_without_it_have_no_section() -> None:
    assert patched().state is None
    assert "Intercepted at the end" not in report_document(patched()).text(80)


def test_of_many_rows_some_are_shown_and_how_to_see_all() -> None:
    made = ended(*(filtered(f"vm{n}", n, denies(0x10 + n)) for n in range(1, 31)))
    assert "  12 of 30 rows are shown here: msrtrace show --state shows all\n" in section(made)
    assert section(made).count("(pid ") == 12


@pytest.mark.parametrize("fmt", OF_REPORTS)
def test_every_format_has_it(fmt: str) -> None:
    assert "web" in write_report(ended(filtered("web", 1, denies(FS_BASE))), fmt).decode()


def test_the_page_has_it() -> None:
    root = page(ended(filtered("web", 1, denies(FS_BASE))))
    (found,) = (one for one in root.all("section") if one.all("h2")[0].text == "Intercepted at the end")
    assert ["web (pid 1): vCPU 0-1", "0xc0000100", "FS_BASE", "filter", "filter"] in found.all("table")[0].rows()
    assert "Intercepted at the end" not in report_html(patched())


def test_with_too_much_a_report_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_making, "_REPORT_BYTES", 1000)
    made = ended(vm("web", 1), notes=("a note",))
    assert made.state
    assert made.state.vms == []
    first, last = made.state.notes
    assert first == "a note"
    assert last == "the 1 VMs are left out, as they would take 0 MB: msrtrace state shows them"
    assert "msrtrace state shows them" in " ".join(section(made).split())


def test_it_is_a_state_of_the_host_at_that_time() -> None:
    made = report(toggle(), state=states_of_report(state(vm("web", 1))))
    found = state_of(made)
    assert found
    assert made.state
    assert (found.vms, found.host.kernel, found.host.module_parameters["ept"]) == (
        made.state.vms,
        "6.1.0-53-amd64",
        "Y",
    )
    assert made.started < found.taken.replace("+00:00", "Z")
    odd = state_of(msgspec.structs.replace(made, started="yesterday"))
    assert odd
    assert odd.taken == "yesterday"
    assert state_of(patched()) is None


# --- comparisons ---


def compared(base: list[Vm], new: list[Vm]) -> Comparison:
    return compare([ended(*base, made=unpatched())], [ended(*new)])


def table(comparison: Comparison) -> list[tuple[str, ...]]:
    title = "Intercepted at the end by one only, and by whom"
    found = [one for one in comparison_document(comparison).sections if one.title == title]
    return [row for one in found if one.table for row in one.table.rows]


def test_what_one_host_intercepts_is_named_in_every_format() -> None:
    other = PASSED - {(0x174, READ), (0x174, WRITE)}
    comparison = compared(
        [filtered("a", 1, denies(FS_BASE, flags=WRITE))],
        [vm("b", 2, vcpu(0, wanted=other)), vm("c", 3, vcpu(0, wanted=other))],
    )
    assert table(comparison) == [
        ("0x174", "IA32_SYSENTER_CS", "read and write", "passed", "kvm"),
        ("0xc0000100", "FS_BASE", "write", "filter", "passed"),
    ]
    assert json.loads(comparison_json(comparison))["intercepted"] == [
        {"msrs": "0x174", "name": "IA32_SYSENTER_CS", "access": "read_write", "base": ["passed"], "new": ["kvm"]},
        {"msrs": "0xc0000100", "name": "FS_BASE", "access": "write", "base": ["filter"], "new": ["passed"]},
    ]
    text = changelog(comparison)
    assert "Intercepted at the end by unpatched, passed by patched: FS_BASE W (filter).\n" in text
    assert "Intercepted at the end by patched, passed by unpatched: IA32_SYSENTER_CS RW" in text
    assert max(map(len, text.splitlines())) <= 75
    for fmt in OF_COMPARISONS:
        shown = write_comparison(comparison, fmt).decode().replace("\\", "")
        assert "IA32_SYSENTER_CS" in shown, fmt
        assert '"intercepted"' in shown or "ntercepted at the end" in shown, fmt


def test_hosts_that_do_not_differ_in_it_have_no_section() -> None:
    for base, new in (([vm("a", 1)], [vm("b", 2)]), ([filtered("a", 1, denies(FS_BASE))], []), ([], [])):
        comparison = compared(base, new)
        assert (comparison.intercepted, table(comparison)) == ((), [])
        assert "at the end" not in changelog(comparison)
        assert json.loads(comparison_json(comparison))["intercepted"] == []


def test_a_report_without_it_cannot_differ_in_it() -> None:
    assert compare([unpatched()], [ended(filtered("a", 1, denies(FS_BASE)))]).intercepted == ()
