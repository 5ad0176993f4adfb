# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits in comparisons."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from made import any_reports, patched, unpatched
from made_exits import EXITS, TOTAL, TSC_DEADLINE, exiting, with_exits

from tracer.model.exits import FILTERED, SLOW, Exit
from tracer.report.changelog import changelog
from tracer.report.compare import Comparison, compare
from tracer.report.comparison_json import comparison_json
from tracer.report.comparison_view import comparison_document
from tracer.report.document import Section
from tracer.report.exit_comparing import ExitAccess, exit_changes, exits_of
from tracer.report.formats import OF_COMPARISONS, write_comparison
from tracer.report.report import Report

OPEN = {kind: count for kind, count in EXITS.items() if kind.result != FILTERED}
FILTERED_SIDE = with_exits(label="filtered")
OPEN_SIDE = with_exits(exiting(counts=OPEN), label="open", duration=5.0)


def compared(*sides: list[Report]) -> Comparison:
    base, new = sides or ([FILTERED_SIDE], [OPEN_SIDE])
    return compare(base, new)


def sections(comparison: Comparison) -> list[Section]:
    return [one for one in comparison_document(comparison).sections if one.title.startswith("Exits")]


def test_exits_are_compared_by_access() -> None:
    [found] = sections(compared())
    assert found.title == "Exits (a second)"
    assert found.table
    assert found.table.headers == ("MSR", "name", "access", "filtered", "open", "change")
    assert found.table.rows == (
        ("0xc0000100", "FS_BASE", "write", "31,000 (12,400)", "0 (0.0)", "-100.0%"),
        ("0x6e0", "IA32_TSC_DEADLINE", "write", "60,000 (24,000)", "60,000 (12,000)", "-50.0%"),
        ("0x1c4", "IA32_XFD", "write", "500 (200.0)", "0 (0.0)", "-100.0%"),
        ("0x6e0", "IA32_TSC_DEADLINE", "write, L2", "70 (28.0)", "70 (14.0)", "-50.0%"),
        ("0xce", "PLATFORM_INFO", "read", "7 (2.8)", "7 (1.4)", "-50.0%"),
        ("0xdeadbeef", "", "read", "5 (2.0)", "5 (1.0)", "-50.0%"),
        ("0xc0000102", "KERNEL_GS_BASE", "read", "3 (1.2)", "3 (0.6)", "-50.0%"),
        ("0xc0000100", "FS_BASE", "write, L2", "2 (0.8)", "2 (0.4)", "-50.0%"),
        ("all exits", "", "", "91,587 (36,635)", "60,087 (12,017)", "-67.2%"),
    )


def test_the_json_has_exact_counts() -> None:
    found = json.loads(comparison_json(compared()))
    assert found["exits"][0] == {
        "msr": "0xc0000100",
        "name": "FS_BASE",
        "access": "write",
        "guest": "l1",
        "base": {"exits": 31000, "per_second": 12400},
        "new": {"exits": 0, "per_second": 0},
    }
    assert (found["base"]["exits"], found["new"]["exits"]) == (TOTAL, sum(OPEN.values()))


def test_repeats_are_pooled() -> None:
    pooled = exits_of([FILTERED_SIDE, OPEN_SIDE, OPEN_SIDE])
    assert pooled
    assert (pooled.total, pooled.seconds) == (TOTAL + 2 * sum(OPEN.values()), Fraction(25, 2))
    deadline = ExitAccess(TSC_DEADLINE, "write", "l1")
    assert pooled.counts[deadline] == 180_000
    assert pooled.per_second(180_000) == 14_400


@pytest.mark.parametrize("swapped", [False, True])
def test_where_one_side_lacks_them_that_is_said(swapped: bool) -> None:
    sides = ([FILTERED_SIDE], [unpatched()])
    comparison = compared(*(reversed(sides) if swapped else sides))
    [found] = sections(comparison)
    assert found.lines == ("unpatched: exits were not counted (--exits), so there is nothing to compare",)
    assert found.table is None
    made = json.loads(comparison_json(comparison))
    assert made["exits"] is None
    assert {made["base"]["exits"], made["new"]["exits"]} == {None, TOTAL}


def test_a_side_of_which_a_report_lacks_them_has_no_sum() -> None:
    [found] = sections(compared([FILTERED_SIDE, patched()], [OPEN_SIDE]))
    assert found.lines[0].startswith("filtered: exits were not counted in all of its reports (--exits)")


def test_without_exits_there_is_no_section() -> None:
    comparison = compared([unpatched()], [patched()])
    assert sections(comparison) == []
    assert json.loads(comparison_json(comparison))["exits"] is None


def test_no_time_has_no_rate() -> None:
    [found] = sections(compared([with_exits(duration=0.0, label="none")], [OPEN_SIDE]))
    assert found.table
    assert found.table.rows[-1] == ("all exits", "", "", "91,587 (?)", "60,087 (12,017)", "")
    made = json.loads(comparison_json(compared([with_exits(duration=0.0)], [OPEN_SIDE])))
    assert made["exits"][0]["base"]["per_second"] is None


def test_of_many_rows_some_are_shown() -> None:
    kinds = {Exit(0x10000 + n, "read", SLOW, "invalid", "l1"): n + 1 for n in range(100)}
    [found] = sections(compared([with_exits(exiting(counts=kinds), label="many")], [OPEN_SIDE]))
    assert "40 of 106 rows are shown here: --format json has all" in found.lines
    assert found.table
    assert len(found.table.rows) == 41


def test_every_format_has_them_but_the_commit_message() -> None:
    for fmt in OF_COMPARISONS:
        text = write_comparison(compared(), fmt).decode()
        assert ("DEADLINE" in text) == (fmt != "changelog"), fmt
    without = replace(exiting(), exits=None)
    sides = with_exits(without, label="filtered"), with_exits(without, label="open", duration=5.0)
    assert changelog(compared()) == changelog(compare([sides[0]], [sides[1]]))


@given(one=any_reports, other=any_reports)
def test_all_exits_are_compared_once(one: Report, other: Report) -> None:
    base, new = exits_of([one]), exits_of([other])
    if base is None or new is None:
        assert None in (one.exits, one.totals.exits, other.exits, other.totals.exits)
        return
    changes = exit_changes(base, new)
    assert len({change.of for change in changes}) == len(changes)
    assert sum(change.base for change in changes) == sum(row.exits for row in one.exits or ())
    assert sum(change.new for change in changes) == sum(row.exits for row in other.exits or ())
