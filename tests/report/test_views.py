# SPDX-License-Identifier: GPL-2.0-or-later
"""Views: what they say, that tables stay tables, and that nothing from elsewhere gets out of its place."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import (
    HOST,
    HOSTILE,
    amd,
    any_reports,
    changed,
    created,
    patched,
    recalc,
    recalculated,
    report,
    svm_pass,
    svm_recalc,
    times,
    toggle,
    unpatched,
    views,
)
from tabulate import tabulate

from tracer.model.quantity import duration, listed, number, per_second, percent, rate, share
from tracer.model.snapshot import Map, Snapshot, VmInfo
from tracer.model.text import LIMIT, printable
from tracer.report.changelog import changelog
from tracer.report.compare import Comparison, compare
from tracer.report.comparison_json import comparison_json
from tracer.report.comparison_view import comparison_document
from tracer.report.document import Document, Section, Table
from tracer.report.formats import OF_COMPARISONS, write_comparison
from tracer.report.report import Bucket, Report, UpdateSeconds
from tracer.report.report_view import quantile, report_document

# --- figures ---


def test_figures_as_text() -> None:
    assert [number(value) for value in (0, 1234567, None)] == ["0", "1,234,567", "?"]
    figures = (Fraction(13), Fraction(27, 2), 0.125, 1e6, None)
    assert [rate(value) for value in figures] == ["13", "13.50", "0.12", "1,000,000", "?"]
    assert [share(*pair) for pair in ((11, 13), (0, 7), (None, 7), (3, 0), (3, None))] == ["84.6%", "0.0%", "", "", ""]
    assert [percent(Fraction(30), Fraction(n)) for n in (13, 30, 60)] == ["-56.7%", "0.0%", "+100.0%"]
    assert (percent(Fraction(0), Fraction(1)), percent(None, None)) == ("", "")
    rates = (12345.6, 1000, 999.94, 0.1, 0.0123, 0, None)
    assert [per_second(value) for value in rates] == ["12,346", "1,000", "999.9", "0.1", "0.01", "0.0", "?"]
    assert (listed(["a"]), listed(["a", "b", "c"])) == ("a", "a, b and c")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (0.0, "0 ns"),
        (5e-9, "5 ns"),
        (1.28e-7, "128 ns"),
        (8.192e-6, "8.19 µs"),
        (0.99949e-3, "999 µs"),
        (0.9996e-3, "1,000 µs"),
        (0.0694, "69.4 ms"),
        (1.0, "1 s"),
        (86400, "86,400 s"),
        (1e12, "1,000,000,000,000 s"),
    ],
)
def test_durations_have_three_digits_and_a_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_quantiles_are_bucket_bounds() -> None:
    def bucket(le: float | None, count: int) -> Bucket:
        return Bucket(le=le, count=count)

    seconds = UpdateSeconds(buckets=[bucket(1e-6, 50), bucket(2e-6, 49), bucket(None, 1)], sum=1.0, count=100)
    assert [quantile(seconds, part) for part in (0.5, 0.51, 0.99, 1.0)] == [1e-6, 2e-6, 2e-6, None]
    assert quantile(UpdateSeconds(buckets=[], sum=1.0, count=100), 0.5) is None


# --- a report ---


def test_the_first_line_is_the_verdict() -> None:
    for made, verdict in ((patched(), "patch present: 101 "), (unpatched(), "patch missing: 1,717 calls ")):
        text = report_document(made).text()
        assert text.startswith(verdict)
        assert text.splitlines()[0] == verdict.partition(":")[0] + ": " + made.verdict.why
    assert report_document(report(Snapshot("toggle"))).text().startswith("patch undecided: too little seen")


def test_the_text_of_a_report() -> None:
    lines = report_document(unpatched()).text().splitlines()
    assert lines[1] == "30 calls per filter update, 28 of them redundant (17 enables, 13 disables)"
    assert lines[2] == "101 filter updates, 3,037 calls, 2,828 of them redundant, 1 vCPU of 1 VMM seen, in 2.5 s"
    cells = [re.split(r"  +", line.strip()) for line in lines]
    assert ["0xc0000100", "FS_BASE", "read", "disable", "filter_change", "101", "0", "0.0%", "50"] in cells
    assert ["filter_change", "vmx_msr_filter_changed", "3,030", "2,828", "93.3%"] in cells
    assert lines[lines.index("Not seen") + 1] == "  nothing"
    assert "  ran: workload --updates 101" in lines
    assert lines[lines.index("Host") + 1 :][:2] == ["  ada", "  6.1.0-53-amd64 #1 SMP Debian 6.1.192-1"]
    assert not [line for line in lines if line != line.rstrip()]


def test_the_text_of_a_report_on_amd() -> None:
    lines = report_document(amd(svm_pass(404))).text().splitlines()
    assert lines[:2] == [
        "patch not applicable: KVM never had this patch for AMD SVM; 404 filter updates made 18,988 calls, 47 each, "
        "of which 46 changed nothing",
        "47 calls per filter update, 46 of them redundant (37 enables, 10 disables)",
    ]
    cells = [re.split(r"  +", line.strip()) for line in lines]
    assert ["0xc0000100", "FS_BASE", "read_write", "disable", "filter_change", "404", "0", "0.0%", "202"] in cells
    assert [
        "0x49",
        "IA32_PRED_CMD",
        "read_write",
        "disable_write",
        "filter_change",
        "404",
        "404",
        "100.0%",
        "0",
    ] in cells
    assert ["vcpu_reset", "init_vmcb", "1", "1", "100.0%"] in cells
    assert any(line.endswith("msrtrace 0.1.0, AMD SVM, layout pass, kprobe, redundancy exact") for line in lines)
    assert "  kvm_amd: avic=N nested=1" in lines
    intel = report_document(patched()).text()
    assert "Intel VMX, layout toggle, kprobe, redundancy exact\n  kvm_intel: ept=Y nested=Y\n" in intel


@pytest.mark.parametrize("made", [amd(), amd(svm_recalc()), amd(svm_pass(exact=False, module_unloads=2))])
def test_no_view_of_an_amd_host_speaks_of_intel(made: Report) -> None:
    for name, text in views(made, made).items():
        assert not re.search("intel|vmx|patch (missing|present|undecided)", text, re.IGNORECASE), name


def test_a_lower_bound_comes_first() -> None:
    lines = report_document(report(toggle(maps=(Map("calls", 9, 9, 3),)))).text().splitlines()
    assert lines[1] == "LOWER BOUND, the true counts may be higher: 3 updates of map calls dropped"


def test_what_cannot_be_observed_is_not_shown_as_0() -> None:
    counted = Snapshot("filter-only", updates={0: times(7)}, calls_observable=False)
    text = report_document(report(counted)).text()
    assert "7 filter updates, calls not observable" in text
    assert "Calls per MSR\n  not observable on this kernel\n" in text
    assert "calls per filter update: unknown\n" in text
    text = report_document(report(replace(toggle(), updates={}, updates_observable=False))).text()
    assert "filter updates not observable" in text
    assert "Filter update times\n  not observable\n" in text
    text = report_document(report(toggle(exact=False))).text()
    assert "13 calls per filter update, ? of them redundant" in text
    text = report_document(report(Snapshot("toggle"))).text()
    assert "calls per filter update: unknown, as there was no filter update" in text
    assert "Calls per MSR\n  none were made\n" in text


OTHERWISE = "for other reasons than a new filter or the creation of a vCPU"


def test_the_text_of_recalculations() -> None:
    text = report_document(report(recalculated())).text()
    assert text.splitlines()[3] == f"7 recalculations {OTHERWISE}, 8 calls each, 1 of them redundant"
    assert "Recalculation times\n  9 µs on average; half took at most 16.4 µs, 99% at most 16.4 µs, " in text
    text = report_document(report(recalculated(1, exact=False))).text()
    assert f"\n1 recalculation {OTHERWISE}, 8 calls each, ? of them redundant\n" in text
    text = report_document(report(recalculated(7, calls={}, calls_observable=False))).text()
    assert f"\n7 recalculations {OTHERWISE}\n" in text
    assert f"\n0 recalculations {OTHERWISE}\n" in report_document(report(recalc())).text()
    assert "Recalculation times" not in report_document(report(recalc())).text()
    text = report_document(report(recalculated(creations_observable=False))).text()
    assert "\n7 recalculations for other reasons than a new filter, 8 calls each, 1 of them redundant\n" in text
    markdown = report_document(report(recalculated())).markdown()
    assert f"\n7 recalculations {OTHERWISE}, 8 calls each, 1 of them redundant\n" in markdown
    assert "### Recalculation times\n" in markdown


def test_the_text_of_creations() -> None:
    text = report_document(report(created(3))).text()
    assert text.splitlines()[3:5] == [
        f"1 recalculation {OTHERWISE}, 8 calls each, 1 of them redundant",
        "3 vCPUs created, 16 calls each, 9 of them redundant, in 2 recalculations",
    ]
    text = report_document(report(created(1, recalculations=1))).text()
    assert "\n1 vCPU created, 8 calls each, 1 of them redundant, in 1 recalculation\n" in text
    assert "\n2 vCPUs created, 7 calls each, 0 of them redundant\n" in report_document(report(toggle(vcpus=2))).text()
    assert "\n2 vCPUs created\n" in report_document(report(toggle(calls={}, calls_observable=False, vcpus=2))).text()
    assert "vCPU created" not in report_document(report(toggle(creations_observable=False))).text()


def test_recalculations_that_cannot_be_observed_are_not_mentioned() -> None:
    for counted in (toggle(), recalculated(updates={}, updates_observable=False)):
        assert "ecalculation" not in report_document(report(counted)).text()


def test_the_table_of_vms_has_recalculations() -> None:
    counted = recalculated(
        updates={100: times(3)}, recalcs={0: times(1), 100: times(2)}, by_vm=True, vms={100: VmInfo("web")}
    )
    cells = [re.split(r"  +", line.strip()) for line in report_document(report(counted)).text().splitlines()]
    assert ["VM", "pid", "filter updates", "mean", "recalculations", "calls", "redundant"] in cells
    assert ["web", "100", "3", "6 µs", "2", "0", "0"] in cells


def test_the_table_of_vms() -> None:
    both = toggle(5, pid=100).after(toggle(7, pid=200)).after(toggle(3))
    made = report_document(report(replace(both, by_vm=True, vms={100: VmInfo("web"), 200: VmInfo("")}))).text()
    cells = [re.split(r"  +", line.strip()) for line in made.splitlines()]
    assert ["web", "100", "5", "6 µs", "72", "55"] in cells
    assert ["(ended before it could be named)", "200", "7", "6 µs", "98", "77"] in cells
    assert ["(no known VM)", "0", "3", "6 µs", "46", "33"] in cells


def test_notes_and_the_exit_status_are_shown() -> None:
    text = report_document(patched(notes=["n one", "n two"], exit_status=7)).text()
    assert "Notes\n  n one\n  n two\n" in text
    assert "  which ended with status 7\n" in text


# --- a comparison ---


def test_the_json_of_a_comparison() -> None:
    found = json.loads(comparison_json(compare([unpatched()], [patched()])))
    assert (found["schema"], found["unit"], found["forced"], found["warnings"]) == (
        "msrtrace-comparison/1",
        "call",
        [],
        [],
    )
    assert found["sentence"].endswith("17 fewer calls, -56.7%")
    assert found["base"]["per_filter_update"] == {"calls": 30, "redundant": 28}
    assert found["new"]["verdict"]["patched"] is True
    row = {"msr": "0x10", "name": "IA32_TSC", "direction": "write"}
    assert row | {"base": {"calls": 1, "redundant": 1}, "new": {"calls": 0, "redundant": 0}} in found["bits"]
    assert found["base"]["filter_update_seconds"]["coverage"] is None


CHANGELOG = """\
Unpatched makes 30 calls a filter update, 28 of them redundant; patched 13,
11 redundant: 17 fewer calls, -56.7%.

MSR-intercept calls, per filter update of a vCPU, counted by msrtrace on
Linux 6.1.0-53-amd64 (Intel VMX) under

  workload --updates 101

                     unpatched  patched   change
  -----------------  ---------  -------  -------
  calls                     30       13   -56.7%
  of them redundant         28       11   -60.7%
  enable calls              17        0  -100.0%
  disable calls             13       13     0.0%

Touched by unpatched only: IA32_TSC W, IA32_SPEC_CTRL RW, IA32_PRED_CMD RW,
IA32_XFD RW, IA32_XFD_ERR RW, CORE_C3_RESIDENCY RW, CORE_C6_RESIDENCY RW,
CORE_C7_RESIDENCY RW, CORE_C1_RES RW.

Unpatched: ada, Linux 6.1.0-53-amd64, 2026-11-22.
Patched: ada, Linux 6.1.0-53-amd64, 2026-11-22.
"""


def test_the_changelog_of_a_comparison() -> None:
    assert changelog(compare([unpatched()], [patched()])) == CHANGELOG


def test_a_comparison_says_where_and_when_each_side_was_made_in_every_format() -> None:
    one, other = unpatched(), report(toggle(), replace(HOST, name="eve", kernel="6.12.9"), label="patched")
    later, old = replaced(other, started="2026-11-24T01:00:00Z"), replaced(unpatched(), name="")
    for base, new, expected in (
        ([one], [other], ("ada, Linux 6.1.0-53-amd64, 2026-11-22", "eve, Linux 6.12.9, 2026-11-22")),
        ([old], [other, later], ("Linux 6.1.0-53-amd64, 2026-11-22", "eve, Linux 6.12.9, 2026-11-22 to 2026-11-24")),
        ([one, old], [replaced(other, name="b"), other], ("ada, Linux 6.1", "b and eve, Linux 6.12.9, 2026-11-22")),
    ):
        comparison = compare(base, new, force=True)
        for fmt in OF_COMPARISONS:
            text = write_comparison(comparison, fmt).decode()
            for title, origin in zip(("unpatched", "patched"), expected, strict=True):
                assert origin in " ".join(text.split()), (fmt, title)
    named, unnamed = (compare([base], [other], force=True).differences for base in (one, old))
    assert (named[0].what, named[0].base, named[0].new) == ("host", "ada", "eve")
    assert "host" not in {difference.what for difference in unnamed}


def test_the_hosts_of_a_large_side_are_not_all_named() -> None:
    many = [replaced(patched(), name=f"host{n}") for n in range(9)]
    assert compare(many, many).base.origin == (
        "host0, host1, host2, host3, host4 and 4 more (all: --format json), Linux 6.1.0-53-amd64, 2026-11-22"
    )


def replaced(made: Report, *, started: str | None = None, name: str | None = None) -> Report:
    """The report with another start, or another name of its host."""
    host = made.host if name is None else changed(made.host, name=name)
    return changed(made, host=host, started=started or made.started)


def test_a_changelog_names_both_kernels() -> None:
    """Debian's kernel names have 20 characters."""
    base, new = (report(host=replace(HOST, kernel=f"6.12.{n}+deb13-amd64")) for n in (116, 117))
    assert re.search(
        r"^ +6\.12\.116\+deb13-amd64 +6\.12\.117\+deb13-amd64 +change$", changelog(compare([base], [new])), re.M
    )


def test_a_changelog_says_on_which_hardware_each_kernel_ran() -> None:
    text = changelog(compare([amd(label="6.12")], [amd(svm_recalc(), label="6.18")])).replace("\n", " ")
    assert "counted by msrtrace on Linux 6.12.117+deb13-amd64 (AMD SVM) under" in text
    assert "Bits that MSR-intercept calls name, per filter update" in text
    text = changelog(compare([patched()], [amd(label="amd")])).replace("\n", " ")
    assert "on Linux 6.1.0-53-amd64 (Intel VMX) and Linux 6.12.117+deb13-amd64 (AMD SVM) under" in text
    assert re.search(r"disable calls +13 +10 +-23.1%", text)


long = st.one_of(
    st.text("abc", max_size=300),
    st.text("ab -_/.;", max_size=300),
    st.integers(1, 4096).map(lambda n: "x" * n),
    st.sampled_from(["a b " * 99, "/" * 80, "-" * 200, "6.12.117+deb13-amd64-" * 9]),
)


@given(long, long, st.lists(long, max_size=3), st.lists(long, max_size=3), st.booleans())
def test_changelogs_are_narrow_and_plain(one: str, other: str, command: list[str], ran: list[str], exact: bool) -> None:
    base = report(toggle(patched=False, exact=exact), replace(HOST, kernel=other), label=one, command=command)
    new = report(toggle(7), replace(HOST, kernel=one), label=other, command=ran, exit_status=9)
    narrow(changelog(compare([base], [new], force=True)))


@given(any_reports, any_reports)
def test_any_changelog_is_narrow(one: Report, other: Report) -> None:
    narrow(changelog(compare([one, other], [other], force=True)), plain=False)


def narrow(text: str, plain: bool = True) -> None:
    assert [line for line in text.split("\n") if len(line) > 75] == []
    assert text.isascii() or not plain
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


# --- hostile text ---


def test_printable_escapes_and_cuts() -> None:
    assert printable("a b|\u6f22\u00e9") == "a b|\u6f22\u00e9"
    shown = printable("\x1b[31m\n\r\t\0\x7f\x9b\u202e\u2028\ud800\ufeff\U000e0001")
    assert shown == r"\x1b[31m\n\r\t\x00\x7f\x9b\u202e\u2028\ud800\ufeff\U000e0001"
    assert printable(shown) == shown
    assert (printable("x" * LIMIT), printable("x" * (LIMIT + 1))) == ("x" * LIMIT, "x" * (LIMIT - 3) + "...")
    assert len(printable("\0" * 10**7)) == LIMIT


@given(st.text(), st.integers(4, 50))
def test_any_text_becomes_printable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    assert shown == printable(shown, limit)
    shown.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_escaped_everywhere(text: str) -> None:
    host = replace(HOST, kernel=text, version=text, cpu=text, module_parameters={text: text})
    counted = toggle(pid=100, vms={100: VmInfo(text)}, maps=(Map(text, 9, 9, 3),), layout="toggle", backend=text)
    harmless(views(report(counted, host, label=text, command=[text, text], notes=[text], version=text), patched()))


@settings(max_examples=min(60, settings().max_examples))
@given(any_reports, any_reports)
def test_hostile_reports_cannot_control_a_terminal(one: Report, other: Report) -> None:
    harmless(views(one, other))


def harmless(shown: dict[str, str]) -> None:
    """Check that no character controls a terminal, and that all line breaks are the view's own."""
    for form, text in shown.items():
        bad = {c for c in text if not c.isprintable() and c != "\n"}
        assert not bad, form
        if form.endswith("markdown"):
            tables_are_tables(text)


def tables_are_tables(markdown: str) -> None:
    """Whether every row has as many cells as the row of dashes, by GitHub's rules."""
    columns = 0
    for line in markdown.split("\n"):
        cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))
        if not line.startswith("|"):
            columns = 0
            assert cells == 0, line
            continue
        assert cells == (columns or cells), line
        assert line.endswith("|")
        columns = cells


@pytest.mark.parametrize("columns", [40, 80, 132])
@pytest.mark.parametrize(
    "made",
    [
        unpatched(),
        amd(),
        report(recalculated(7, by_vm=True, vms={0: VmInfo("v" * 128)})),
        report(toggle(), replace(HOST, cpu="c" * 300, version="#1 " * 20 + "x"), label="l" * 90, command=["x" * 300]),
    ],
)
def test_text_fits_the_width(made: Report, columns: int) -> None:
    for text in (report_document(made).text(columns), comparison_document(both(made)).text(columns)):
        assert [line for line in text.splitlines() if len(line) > columns] == []
    whole, narrow = (report_document(made).text(width) for width in (None, columns))
    assert Counter(re.sub(r"[\s-]", "", narrow)) == Counter(re.sub(r"[\s-]", "", whole)), "nothing is lost"


def both(made: Report) -> Comparison:
    """A comparison of a report with another one."""
    return compare([made], [patched()], force=True)


def test_numbers_go_below_the_names_where_the_table_is_too_wide() -> None:
    table = Table(
        ("name", "access", "calls", "redundant"),
        (("FS", "read_write", "18,988", "1"), ("a b c d", "read", "1", "1,000")),
        names=2,
    )
    assert table.within(99) == table.drawn("simple")
    assert table.within(22).splitlines()[:2] == ["name     access", "     calls  redundant"]
    assert max(map(len, table.within(22).splitlines())) <= 22
    words = Table(("name", "text"), (("x", "some words here"),), names=2)
    assert words.within(14) == "name  text\n----  --------\nx     some\n      words\n      here"


def test_markdown_is_escaped() -> None:
    table = Table(("a|b", "n"), (("`x`|\\", "1"), ("y", "2")))
    text = Document(
        "t", "lead *", ("line _",), (Section("S #", ("- <b>",), table), Section("empty", table=Table((), ())))
    ).markdown()
    assert text == (
        "**lead \\***\n\nline \\_\n\n### S \\#\n\n- - \\<b\\>\n\n"
        "| a\\|b      |   n |\n|-----------|-----|\n| \\`x\\`\\|\\\\ |   1 |\n| y         |   2 |\n\n### empty\n"
    )


CELLS = st.text("ab|1.,% \u6f22\u00e9-", max_size=12).map(str.strip)
ROWS = st.integers(1, 5).flatmap(lambda columns: st.lists(st.tuples(*[CELLS] * columns), min_size=2, max_size=4))


@given(ROWS, st.integers(0, 5))
def test_tables_are_those_of_tabulate(rows: list[tuple[str, ...]], names: int) -> None:
    table = Table(rows[0], tuple(rows[1:]), names)
    align = ["left" if column < names else "right" for column in range(len(rows[0]))]
    for style in ("simple", "github"):
        theirs = tabulate(rows[1:], rows[0], tablefmt=style, colalign=align, disable_numparse=True)
        ours = table.drawn(style)
        assert [line.rstrip() for line in ours.splitlines()] == [line.rstrip() for line in theirs.splitlines()]


def test_a_table_without_rows() -> None:
    assert Table(("a", "b"), ()).drawn("simple") == "a      b\n---  ---"


def test_a_long_cell_does_not_make_all_rows_long() -> None:
    table = Table(("a", "b"), (("|" * 4096, "1"), *[("x", "2")] * 9))
    assert max(map(len, table.drawn("simple").splitlines())) == 128 + 2 + 3
    assert max(map(len, Document("", "", (), (Section("", table=table),)).markdown().splitlines())) < 300
